"""Logits that are not computed until something reads them.

A language model's forward makes logits [..., V] and hands them to a loss. ``LazyLogits`` is a tensor of that
shape without bytes: it knows the head's operands and what was done to the logits since (a factor, a tanh cap,
a cast, a choice of tokens), and a loss that knows the type takes the operands instead.

    lm_head(h) -> LazyLogits --- / 30, tanh, * 30, .float(), [:, -n:] ---> LazyLogits --> loss by tiles
                                  anything else (argmax, numpy, +, in place)             --> real logits

A wrapper subclass with ``__torch_dispatch__``, below autograd, not ``__torch_function__``, above it: shape,
dtype, device, requires_grad, grad_fn, hooks and views are then PyTorch's own; kernels reached through C++ or
through another autograd.Function still get real logits; and gradients of whatever was computed from them flow
back into the hidden states and the weight through one ordinary node (``_LogitsNode``). DDP walks its graph,
accelerate calls ``.float()`` on it and FSDP registers a hook on it, and no logits are made.

The real logits are a function of the weight: asked for after the optimizer step they would be other logits.
That is an error (``LogitsUnavailableError``), not a different answer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from memo_runtime.errors import MemoError
from memo_runtime.units import format_bytes

logger = logging.getLogger("memo_runtime")

aten = torch.ops.aten

#: An operator that chooses among tokens, with its arguments after the tensor.
View = tuple[Callable[..., Tensor], tuple[Any, ...]]


class LogitsUnavailableError(MemoError, RuntimeError):
    """Lazy logits cannot be had: what they depend on changed since, or a loss was computed without them."""


@dataclass(slots=True)
class Notice:
    """Says once that logits were computed after all; shared by the forwards of one installation."""

    said: bool = False

    def say(self, shape: torch.Size, dtype: torch.dtype) -> None:
        """Warn, the first time, with the size of the logits."""
        if self.said:
            return
        self.said = True
        size = format_bytes(math.prod(shape) * dtype.itemsize)
        logger.warning(
            "the logits %s were read, so %s of %s logits exist now beside the loss; read the loss alone to "
            "avoid them, or give loss='native' if every step needs them (said once)",
            tuple(shape),
            size,
            str(dtype).removeprefix("torch."),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What was done to the head's output: ``after * tanh(before * x)`` with a cap, else ``before * x``."""

    before: float = 1.0
    capped: bool = False
    after: float = 1.0

    def times(self, factor: float) -> Chain:
        """The chain followed by a multiplication."""
        if self.capped:
            return replace(self, after=self.after * factor)
        return replace(self, before=self.before * factor)

    def cap(self) -> Chain | None:
        """The chain followed by tanh; None where that cannot be expressed."""
        return None if self.capped else replace(self, capped=True)

    def scale_and_softcap(self) -> tuple[float, float | None]:
        """``logit_scale`` and ``softcap`` of ``linear_cross_entropy``."""
        if not self.capped:
            return self.before, None
        scale = self.before * self.after
        # 1/49 * 49 is not 1 in floating point; a cap alone is.
        return (1.0 if math.isclose(scale, 1.0, rel_tol=1e-14) else scale), self.after

    def apply(self, logits: Tensor) -> Tensor:
        """The chain on real logits."""
        if self.before != 1.0:
            logits = logits * self.before
        if self.capped:
            logits = torch.tanh(logits)
        return logits if self.after == 1.0 else logits * self.after


@dataclass(eq=False, slots=True, kw_only=True)
class HeadCall:
    """One call of a linear head: hidden [..., D], weight [V, D], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    notice: Notice
    versions: tuple[int, ...] = field(init=False)
    touched: bool = False  # real logits were changed, or a view of them given away, where versions do not count
    passed_by: bool = False  # a loss was computed from the operands: its gradient does not come through the logits
    watched: bool = False  # a hook waits for the gradient of logits

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def choose(self, views: tuple[View, ...]) -> Tensor:
        """The hidden states of the chosen tokens, [..., D], with their graph."""
        hidden = self.hidden
        for operator, arguments in views:
            if operator in _RESHAPES:
                # The logits could be viewed so; the hidden states may be laid out otherwise.
                hidden = hidden.reshape(*arguments[0][:-1], hidden.shape[-1])
            else:
                hidden = operator(hidden, *arguments)
        return hidden

    def logits(self, views: tuple[View, ...]) -> Tensor:
        """The head's output for the chosen tokens.

        Raises:
            LogitsUnavailableError: an operand is not what it was when the head was called.
        """
        freed = any(part.untyped_storage().nbytes() == 0 and part.numel() for part in self._operands())
        if freed or self._versions() != self.versions:
            raise LogitsUnavailableError(
                "these logits were not computed in forward and cannot be any more: "
                f"{'the weight has been freed' if freed else 'the weight changed'} since. Read them before "
                "the optimizer step, or wrap with loss='native'"
            )
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            parts = [None if part is None else part.to(self.compute) for part in (self.weight, self.bias)]
            weight, bias = parts
            assert weight is not None, "a head has a weight"
            return functional.linear(self.choose(views).to(self.compute), weight, bias)

    def _operands(self) -> list[Tensor]:
        return [part for part in (self.hidden, self.weight, self.bias) if part is not None]

    def _versions(self) -> tuple[int, ...]:
        return tuple(-1 if part.is_inference() else part._version for part in self._operands())


class LazyLogits(Tensor):
    """Logits [..., V] of a ``HeadCall``; see the module's description. Make them with ``lazy_linear``."""

    _call: HeadCall
    _views: tuple[View, ...]
    _chain: Chain
    _real: Tensor | None
    _base_logits: LazyLogits | None
    _after_loss: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def make(
        cls, call: HeadCall, shape: torch.Size, dtype: torch.dtype, stride: tuple[int, ...] | None = None
    ) -> LazyLogits:
        """Lazy logits without history, contiguous unless strides are given."""
        made: LazyLogits = Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=dtype, device=call.hidden.device, storage_size=0
        )
        made._call, made._views, made._chain = call, (), Chain()
        made._real = made._base_logits = None
        made._after_loss = call.passed_by
        return made

    def _like(self, *, chain: Chain | None = None, dtype: torch.dtype | None = None) -> LazyLogits:
        made = LazyLogits.make(self._call, self.shape, dtype or self.dtype)
        made._views, made._chain = self._views, chain or self._chain
        return made

    def _choose(self, operator: Callable[..., Tensor], arguments: tuple[Any, ...]) -> LazyLogits:
        view = operator(torch.empty_strided(self.shape, self.stride(), device="meta"), *arguments)
        made = LazyLogits.make(self._call, view.shape, self.dtype, view.stride())
        made._views, made._chain = (*self._views, (operator, arguments)), self._chain
        made._base_logits = self
        return made

    @property
    def changed(self) -> bool:
        """Whether the operands do not tell all: real logits may have been written to, or a hook waits for them."""
        return self._call.watched or (self._call.touched if self.is_inference() else self._version > 0)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden [..., D] of the chosen tokens, weight [V, D], bias [V] or None; detached if these are."""
        hidden, weight, bias = self._call.choose(self._views), self._call.weight, self._call.bias
        self._call.passed_by = True
        if self.requires_grad:
            return hidden, weight, bias
        return hidden.detach(), weight.detach(), None if bias is None else bias.detach()

    def scale_and_softcap(self) -> tuple[float, float | None]:
        """``logit_scale`` and ``softcap`` of ``linear_cross_entropy`` that give these logits."""
        return self._chain.scale_and_softcap()

    def values(self) -> Tensor:
        """The real logits, computed once, without history.

        Raises:
            LogitsUnavailableError: the weight or the hidden states changed since the head was called.
        """
        if self._base_logits is not None and self.changed:
            self.share_values()
        if self._real is None:
            self._call.notice.say(self.shape, self.dtype)
            with torch.no_grad():
                self._real = self._chain.apply(self._call.logits(self._views)).to(self.dtype)
        return self._real

    def share_values(self) -> Tensor:
        """The real logits as a view of those they were chosen from, so that writes reach both."""
        if self._base_logits is None:
            return self.values()
        operator, arguments = self._views[-1]
        with torch.no_grad():
            self._real = operator(self._base_logits.share_values(), *arguments)
        return self._real

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        record = _RECORDED.get(func)
        if record is not None and isinstance(args[0], cls) and args[0]._real is None and not args[0].changed:
            lazy = record(func, args[0], args[1:], kwargs or {})
            if lazy is not None:
                return lazy
        return _compute(func, args, kwargs or {})

    # What waits for a gradient that a loss by tiles does not send through the logits would wait for ever.

    def register_hook(self, hook: Any) -> Any:
        """As ``Tensor.register_hook``.

        Raises:
            LogitsUnavailableError: the loss was computed without these logits.
        """
        # Engines only want to know when backward starts, and have a hook on the loss too.
        if not _module_of(hook).startswith(_ENGINES):
            self._watch("a hook on these logits")
        return super().register_hook(hook)  # type: ignore[no-untyped-call]

    def retain_grad(self) -> None:
        """As ``Tensor.retain_grad``.

        Raises:
            LogitsUnavailableError: the loss was computed without these logits.
        """
        self._watch("retain_grad() on these logits")
        super().retain_grad()

    def _watch(self, what: str) -> None:
        if self._after_loss:
            return  # made from logits that the loss was computed without: no part of it
        if self._call.passed_by:
            raise LogitsUnavailableError(
                f"{what} would see nothing of the model's loss, which was computed by tiles from the hidden states: "
                "wrap with loss='native', or compute a loss of your own from the logits in a forward without labels"
            )
        self._call.watched = True

    # What reads memory without an operator would find none.

    def numpy(self, *, force: bool = False) -> Any:
        """As ``Tensor.numpy``, of the real logits."""
        if self.requires_grad and not force:
            raise RuntimeError("the logits require grad: use logits.detach().numpy()")
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        """As ``Tensor.tolist``, of the real logits."""
        return self.values().tolist()

    def data_ptr(self) -> int:
        """As ``Tensor.data_ptr``, of the real logits, which live as long as these."""
        return self.values().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As ``Tensor.untyped_storage``, of the real logits once there are any; before that it is empty."""
        return super().untyped_storage() if self._real is None else self._real.untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.values().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if self.requires_grad:
            raise RuntimeError("only leaf tensors can be deep-copied: detach the logits first")
        copied: Tensor = self.values().clone()
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._real is not None:
            return repr(self._real)
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed)"


#: Packages whose hooks on outputs look and change nothing.
_ENGINES = ("torch.distributed", "deepspeed", "accelerate")


def _module_of(hook: Any) -> str:
    """Where a hook was written."""
    return str(getattr(getattr(hook, "func", hook), "__module__", ""))


def lazy_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, notice: Notice | None = None) -> LazyLogits:
    """``torch.nn.functional.linear(hidden, weight, bias)``, computed when read.

    Args:
        hidden: [..., D].
        weight: [V, D].
        bias: [V] or None.
        notice: says that logits were computed; shared by calls that belong together.
    """
    kind = hidden.device.type
    compute = hidden.dtype
    if compute is not torch.float64 and torch.is_autocast_enabled(kind):
        compute = torch.get_autocast_dtype(kind)
    call = HeadCall(hidden=hidden, weight=weight, bias=bias, compute=compute, notice=notice or Notice())
    logits: LazyLogits = _LogitsNode.apply(hidden, weight, bias, call)  # type: ignore[no-untyped-call]
    return logits


class _LogitsNode(torch.autograd.Function):
    """The place of the head in the graph of everything that is computed from real logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall) -> LazyLogits:
        # DDP hands on undefined gradients for outputs that no loss used; zeros would be full logits.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        ctx.compute = call.compute
        ctx.bias_dtype = None if bias is None else bias.dtype
        return LazyLogits.make(call, torch.Size((*hidden.shape[:-1], weight.shape[0])), call.compute)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return None, None, None, None
        hidden, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        by_hidden = by_weight = by_bias = None
        flat = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient.unsqueeze(0)
        if needs[0]:
            by_hidden = (gradient @ weight.to(ctx.compute)).to(hidden.dtype)
        if needs[1]:
            by_weight = (flat.t() @ hidden.reshape(-1, hidden.shape[-1]).to(ctx.compute)).to(weight.dtype)
        if needs[2]:
            by_bias = flat.sum(dim=0).to(ctx.bias_dtype)
        return by_hidden, by_weight, by_bias, None


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on real logits; in-place operators write into them and return the lazy ones."""
    written: list[LazyLogits] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if isinstance(value, LazyLogits) and argument.alias_info is not None:
            value._call.touched = True
            if argument.alias_info.is_write:
                written.append(value)
                value.share_values()
    real_args, real_kwargs = tree_map_only(LazyLogits, LazyLogits.values, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    for lazy in written:
        if result is lazy._real:
            return lazy
    return result


# Recorders: (operator, logits, other arguments, keyword arguments) -> lazy logits, or None to compute.

_Recorder = Callable[[Any, LazyLogits, tuple[Any, ...], dict[str, Any]], LazyLogits | None]


def _record_multiply(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    if kwargs or len(args) != 1 or isinstance(args[0], bool) or not isinstance(args[0], (int, float)):
        return None
    factor = float(args[0])
    if factor == 0.0 or not math.isfinite(factor):
        return None
    return logits._like(chain=logits._chain.times(1.0 / factor if func in _DIVISIONS else factor))


def _record_tanh(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    chain = logits._chain.cap()
    return None if chain is None else logits._like(chain=chain)


def _record_cast(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    dtype = kwargs.get("dtype") or logits.dtype
    device = kwargs.get("device")
    if args or not dtype.is_floating_point or (device is not None and torch.device(device) != logits.device):
        return None
    if kwargs.get("layout") not in (None, torch.strided) or kwargs.get("pin_memory"):
        return None
    return logits._like(dtype=dtype)


def _record_same(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    return logits._like()


def _record_alias(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    return logits._choose(aten.alias.default, ())


def _record_tokens(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    dim = args[0] if args else 0
    if kwargs or dim % logits.dim() == logits.dim() - 1:
        return None  # a choice among the vocabulary
    return logits._choose(func, args)


def _record_reshape(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    shape = args[0]
    if kwargs or len(shape) < 2 or shape[-1] != logits.shape[-1]:
        return None
    return logits._choose(func, args)


_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
_RESHAPES = {aten.view.default, aten._unsafe_view.default}
_RECORDED: dict[Any, _Recorder] = {
    aten.mul.Tensor: _record_multiply,
    aten.mul.Scalar: _record_multiply,
    aten.div.Tensor: _record_multiply,
    aten.div.Scalar: _record_multiply,
    aten.tanh.default: _record_tanh,
    aten._to_copy.default: _record_cast,
    aten.clone.default: _record_same,
    aten.alias.default: _record_alias,
    aten.detach.default: _record_alias,
    aten.slice.Tensor: _record_tokens,
    aten.select.int: _record_tokens,
    aten.view.default: _record_reshape,
    aten._unsafe_view.default: _record_reshape,
}
