"""Stand-ins for kernels that mix tokens, in PyTorch's dispatcher.

While ``StandIns`` is open, the fused operators of attention of one device type have other kernels, beneath autograd and
every mode: in eager and compiled code, in reruns of checkpoints and of replay, in tiles, for any model. A stand-in
allocates what the kernel it replaces would (``laws.py``) and writes the results (``kernels.py``). Operators named with
``memo.register_mixer`` are replaced where their library says what they yield; what they take inside is not known.

Attention in plain products (PyTorch's math kernel, tiles in chunks of queries) and flex attention stay what they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch.library import Library

from memo_runtime.blocks.operators import registered_mixers
from memo_runtime.blocks.real_kernels import forget_interrupted, real_kernels_wanted
from memo_runtime.errors import RehearsalError
from memo_runtime.rehearsal.kernels import (
    GRADS,
    KERNELS,
    MASKS,
    Kernel,
    Named,
    call_named,
    fill_backward,
    fill_forward,
    first_of,
    forward_arguments,
    named_arguments,
)
from memo_runtime.rehearsal.laws import Law, Layout, as_results, learn, lengths
from memo_runtime.rehearsal.named import outlined, replaceable
from memo_runtime.rehearsal.short import short_layout, shortened, zeros

aten = torch.ops.aten
#: Operators of this project run as they are: what does the work in them are kernels that are replaced.
_OWN = "memo_runtime."
_DISPATCH = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(slots=True)
class Calls:
    """How often one kernel was replaced, and the most bytes that it would have allocated inside."""

    forward: int = 0
    backward: int = 0
    inside_bytes: int = 0


@dataclass(slots=True)
class StandIns:
    """Replaces kernels of ``device`` while it is open (``with``); one at a time in a process.

    ``calls``: by kernel, since it was opened or cleared.
    """

    device: torch.device
    calls: dict[str, Calls] = field(default_factory=dict)
    _libraries: list[Library] = field(default_factory=list)
    _laws: dict[Any, Law] = field(default_factory=dict)

    def __enter__(self) -> Self:
        if _open:
            raise RehearsalError(
                "a rehearsal is under way in this process, and kernels are replaced for all of it: rehearse one model "
                "after the other"
            )
        if self.device.type not in KERNELS:
            raise RehearsalError(
                f"kernels of device type '{self.device.type}' cannot be replaced; there is: {', '.join(KERNELS)}"
            )
        forget_interrupted()
        _open.append(self)
        try:
            for kernel in KERNELS[self.device.type]:
                names = [f"aten::{one}" for one in (kernel.operator, kernel.backward)]
                fused = _Fused(kernel, self, *(self._real(name) for name in names))
                self._replace(names[0], fused.forward)
                self._replace(names[1], fused.backward)
            for mixer in sorted(name for name in registered_mixers() if not name.startswith(_OWN)):
                for func in replaceable(mixer):
                    self._replace(func._name, _Named(func, self, self._real(func._name)))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._libraries:
            self._libraries.pop()._destroy()
        if self in _open:
            _open.remove(self)

    def _real(self, operator: str) -> Any:
        return torch.library.get_kernel(operator, _DISPATCH[self.device.type])

    def _replace(self, operator: str, stand_in: Callable[..., Any]) -> None:
        namespace, _, name = operator.partition("::")
        library = Library(namespace, "IMPL")
        self._libraries.append(library)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            library.impl(name, stand_in, _DISPATCH[self.device.type], with_keyset=True)

    def clear(self) -> None:
        """Count anew."""
        self.calls.clear()

    def count(self, kernel: str, *, backward: bool, inside: int = 0) -> None:
        """One call was replaced."""
        calls = self.calls.setdefault(kernel, Calls())
        calls.forward += not backward
        calls.backward += backward
        calls.inside_bytes = max(calls.inside_bytes, inside)

    def law(self, key: Any, make: Callable[[], Law]) -> Law:
        """The law of calls like ``key``; learned now if it is the first of its kind."""
        if key not in self._laws:
            self._laws[key] = make()
        return self._laws[key]


_open: list[StandIns] = []


def _layout(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return None
    return *_alike(tuple(tensor.shape), tensor.stride()), tensor.dtype


def _alike(shape: Sequence[int], stride: Sequence[int]) -> Layout:
    """The same for tensors that lie alike in memory: the stride of a dimension of one element means nothing."""
    return tuple(shape), tuple(0 if size == 1 else step for size, step in zip(shape, stride, strict=True))


def _tokens(named: Mapping[str, Any]) -> int:
    """The length in which everything is a line: that of queries, or of keys if they are more."""
    return max(int(named["query"].shape[2]), int(named["key"].shape[2]))


@dataclass(slots=True)
class _Fused:
    """Stands in for one fused kernel of attention."""

    kernel: Kernel
    stand_ins: StandIns
    real_forward: Any
    real_backward: Any

    def forward(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the kernel's forward."""
        if real_kernels_wanted():
            return self.real_forward.call_boxed(keyset, *args, **kwargs)
        named = named_arguments(self._operator, args, kwargs)
        tokens = _tokens(named)
        law = self._law(named, (), partial(self._forward_of, keyset, named))
        if named.get("compute_log_sumexp", True):
            # Learned here already: in backward there may be no room for it.
            self._backward_law(keyset, named, law.layout(0, tokens), [True, True, True, False])
        return self._stand_in(law, named, tokens, fill_forward)

    def backward(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the kernel's backward."""
        if real_kernels_wanted():
            return self.real_backward.call_boxed(keyset, *args, **kwargs)
        named = named_arguments(self._backward_operator, args, kwargs)
        grad = first_of(named, GRADS)
        layout = (tuple(grad.shape), grad.stride())
        law = self._backward_law(keyset, forward_arguments(self._operator, named), layout, named.get("grad_input_mask"))
        return self._stand_in(law, named, _tokens(named), fill_backward)

    @property
    def _operator(self) -> Any:
        return getattr(aten, self.kernel.operator).default

    @property
    def _backward_operator(self) -> Any:
        return getattr(aten, self.kernel.backward).default

    def _stand_in(
        self, law: Law, named: Named, tokens: int, fill: Callable[[Named, Sequence[Any]], None]
    ) -> tuple[Any, ...]:
        outputs, size = law.make(tokens), law.inside_bytes(tokens)
        inside = torch.empty(size, dtype=torch.uint8, device=named["query"].device)
        fill(named, outputs)
        del inside
        self.stand_ins.count(self.kernel.name, backward=fill is fill_backward, inside=size)
        return tuple(outputs)

    def _law(self, named: Named, more: tuple[Any, ...], prepare: Callable[[int], Callable[[], Any]]) -> Law:
        layouts = tuple(_layout(named[name]) for name in ("query", "key", "value"))
        settings = (_layout(first_of(named, MASKS)), named["dropout_p"], named["is_causal"])
        key = (self.kernel.name, layouts, settings, named.get("compute_log_sumexp"), more)
        device = self.stand_ins.device
        rows = (int(named[name].shape[2]) for name in ("query", "key"))
        return self.stand_ins.law(key, lambda: learn(prepare, lengths(device.type, *rows), device))

    def _backward_law(self, keyset: Any, named: Named, grad: Layout, wanted: list[bool] | None) -> Law:
        """The law of a backward whose forward has the arguments ``named``."""
        wanted = wanted if "grad_input_mask" in str(self._backward_operator._schema) else None
        more = ("backward", _alike(*grad), tuple(wanted) if wanted is not None else None)
        return self._law(
            {**named, "compute_log_sumexp": True}, more, partial(self._backward_of, keyset, named, grad, wanted)
        )

    def _forward_of(self, keyset: Any, named: Named, tokens: int) -> Callable[[], Any]:
        """A call of the real forward with ``tokens`` of the arguments ``named``."""
        given = shortened(named, tokens, _tokens(named))
        return partial(call_named, self.real_forward, keyset, self._operator, given)

    def _backward_of(
        self, keyset: Any, named: Named, grad: Layout, wanted: list[bool] | None, tokens: int
    ) -> Callable[[], Any]:
        """A call of the real backward behind the real forward."""
        whole = _tokens(named)
        given = shortened(named, tokens, whole)
        found = as_results(call_named(self.real_forward, keyset, self._operator, given))
        given |= dict(zip(self.kernel.saved, found, strict=False)) | {"grad_input_mask": wanted}
        upstream = zeros(short_layout(grad, tokens, whole), found[0])
        given |= dict.fromkeys(GRADS, upstream)
        return partial(call_named, self.real_backward, keyset, self._backward_operator, given)


@dataclass(slots=True)
class _Named:
    """Stands in for an operator that the user has named."""

    func: Any
    stand_ins: StandIns
    real: Any

    def __call__(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if real_kernels_wanted():
            return self.real.call_boxed(keyset, *args, **kwargs)
        outputs = outlined(self.func, args, kwargs)
        self.stand_ins.count(self.func._name, backward=False)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
