"""Head and loss of Hugging Face causal language models by tiles, with no patch per family.

Three things are put into the model, all in instance ``__dict__``s and all left out of copies and pickles:

    model.forward(labels=...)    pre-hook      notes that labels were given
      h = blocks(...)
      logits = lm_head(h)        forward       with labels: LazyLogits, else what it was
      logits = logits / 8.0                    recorded by LazyLogits (Granite, Cohere, Gemma)
      self.loss_function(logits, labels, ...)  linear_cross_entropy on h and lm_head.weight

Without labels (``generate``, a loss of one's own) nothing is lazy. transformers is never imported from here:
its classes are found by name in the ``__mro__`` of what the user's model consists of.
"""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from memo_runtime.config import Loss
from memo_runtime.errors import ArgumentError
from memo_runtime.execution import install as instance
from memo_runtime.integrations.causal_loss import CausalLoss
from memo_runtime.losses.lazy_logits import Notice, lazy_linear

logger = logging.getLogger("memo_runtime")

#: Logits with fewer elements than this (4 MiB in float32) are made whole, as the unwrapped model does.
SMALL_LOGITS = 1 << 20


@dataclass(slots=True)
class _Switch:
    """What the pre-hook, the head and the loss know of each other. Not part of any copy of the model."""

    labelled: bool = False
    notice: Notice = field(default_factory=Notice)
    reasons: set[str] = field(default_factory=set)

    def stay_native(self, reason: str) -> None:
        """Log once why a forward with labels makes full logits."""
        if reason not in self.reasons:
            self.reasons.add(reason)
            logger.info("full logits in this forward: %s", reason)


class _LabelWatch:
    """Forward pre-hook of a module on the way to the language model: were labels given?"""

    def __init__(self, module: nn.Module, model: nn.Module, loss: CausalLoss, switch: _Switch) -> None:
        names = list(inspect.signature(type(module).forward).parameters)
        self._position = names.index("labels") - 1 if "labels" in names else None
        self._model = weakref.ref(model)
        self._loss, self._switch = loss, switch

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None and self._position is not None and self._position < len(args):
            labels = args[self._position]
        model = self._model()
        current = None if model is None else model.__dict__.get("_loss_function")
        self._switch.labelled = labels is not None and current is self._loss
        if labels is not None and current is not self._loss:
            self._switch.stay_native("the model's loss_function was replaced after wrap")


class _Head:
    """``forward`` of the output head: lazy logits in a forward with labels, once."""

    def __init__(self, module: nn.Module, switch: _Switch) -> None:
        self._module = weakref.ref(module)
        self._switch = switch

    def __call__(self, input: Tensor) -> Tensor:
        module = self._module()
        assert isinstance(module, nn.Linear), "a head outlives its forward"
        labelled, self._switch.labelled = self._switch.labelled, False
        if torch.compiler.is_compiling():
            # Dynamo cannot trace the lazy type; a compiled forward has the logits that its graph has.
            _say_compiled()
        elif labelled:
            reason = _obstacle_now(module, input) or full_logits_reason(input, module.out_features)
            if reason is None:
                return lazy_linear(input, module.weight, module.bias, notice=self._switch.notice)
            self._switch.stay_native(reason)
        return functional.linear(input, module.weight, module.bias)


def full_logits_reason(hidden: Tensor, vocabulary: int) -> str | None:
    """Why full logits are the better choice for ``hidden`` [..., D]; None: they are not.

    Tiles sum in another order than one product. Where that order is all there is to gain, the unwrapped model's bits
    are worth more: for logits of a few megabytes, and in float64, which transformers' loss takes down to float32 in
    a way that no tiling repeats to the last bit.
    """
    if hidden.dtype == torch.float64:
        return "float64: equal to the unwrapped model, whose loss is float32"
    if hidden[..., 0].numel() * vocabulary <= SMALL_LOGITS:
        return f"they have at most {SMALL_LOGITS:,} elements"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say_compiled() -> bool:
    """Runs while Dynamo traces, once per graph, and leaves nothing in the graph."""
    logger.info("full logits in this forward: it is compiled, and torch.compile cannot trace logits made when read")
    return True


def _obstacle_now(head: nn.Linear, hidden: Tensor) -> str | None:
    """Why this call of the head has to compute; what may change between calls."""
    for part in (head.weight, head.bias, hidden):
        if part is not None and type(part) not in (Tensor, nn.Parameter):
            return f"an operand of the output head is a {type(part).__name__}"
    if head._forward_hooks or head._backward_hooks or head._backward_pre_hooks:
        # Also a head that FSDP manages on its own: its weight is gone again when the loss is computed.
        return "the output head has hooks on its output"
    return None


@dataclass(slots=True, eq=False)
class Installation:
    """What ``install`` put into a model, or why nothing.

    Attributes:
        active: whether forwards with labels run head and loss by tiles.
        note: one sentence for a log or a report.
    """

    active: bool
    note: str
    _model: nn.Module | None = None
    _head: nn.Module | None = None
    _loss: CausalLoss | None = None
    _hooks: list[tuple[nn.Module, RemovableHandle]] = field(default_factory=list)
    _switch: _Switch = field(default_factory=_Switch)

    @property
    def full_logits(self) -> tuple[str, ...]:
        """Why forwards with labels made full logits all the same; empty if none did."""
        return tuple(sorted(self._switch.reasons))

    @property
    def tiles_loss(self) -> bool:
        """Whether a forward with labels has no full logits, as far as its plan is concerned."""
        return self.active

    def remove(self) -> None:
        """Restore the model; a ``loss_function`` set by the user since stays. May be called again."""
        if not self.active:
            return
        assert self._model is not None, "an active installation has a model"
        assert self._head is not None, "and a head"
        self.active = False
        for module, handle in self._hooks:
            instance.remove_pre_hook(module, handle)
        self._hooks.clear()
        instance.remove_forward(self._head)
        current = self._model.__dict__.get("_loss_function")
        instance.take_back(self._model, "_loss_function")
        if current is not self._loss:
            self._model.__dict__["_loss_function"] = current
        self._model = self._head = self._loss = None


def install(model: nn.Module, *, loss: Loss = Loss.AUTO) -> Installation:
    """Let the head and loss of a Hugging Face causal language model run by tiles while labels are given.

    Works on the model itself and on what wraps it in place of it (PeftModel, DistributedDataParallel,
    torch.compile's OptimizedModule). Anything else is left as it is, and ``note`` says why.

    Args:
        model: any module.
        loss: ``auto`` uses Liger where it can, ``tiled`` the tiles of this package, ``native`` is off.

    Raises:
        ArgumentError: ``loss="tiled"`` for a model where that cannot be done.
    """
    if loss is Loss.NATIVE:
        return Installation(active=False, note="loss='native': the logits of a forward are one tensor")
    path = _find_language_model(model)
    reason = "no Hugging Face model with an output head in it" if path is None else _obstacle(path[-1])
    if reason is not None:
        if loss is Loss.TILED:
            raise ArgumentError(
                f"loss='tiled' is not possible for this model: {reason}; loss='auto' leaves it as it is"
            )
        if path is not None:
            logger.info("head and loss stay as they are, with full logits: %s", reason)
        return Installation(active=False, note=f"head and loss as they were: {reason}")
    assert path is not None, "without a model there is a reason"
    return _install(path, "tiled" if loss is Loss.TILED else "auto")


def can_tile_loss(model: nn.Module) -> bool:
    """Whether ``install`` would let head and loss run by tiles."""
    path = _find_language_model(model)
    return path is not None and _obstacle(path[-1]) is None


def _install(path: list[nn.Module], backend: str) -> Installation:
    language_model: Any = path[-1]
    head = language_model.get_output_embeddings()
    switch, causal = _Switch(), CausalLoss(language_model.loss_function, backend)
    made = Installation(
        active=True,
        note=f"{type(language_model).__name__}: head and loss by tiles while labels are given ({backend})",
        _model=language_model,
        _head=head,
        _loss=causal,
        _switch=switch,
    )
    instance.place(language_model, "_loss_function", causal)
    instance.install_forward(head, _Head(head, switch))
    for module in path:
        watch = _LabelWatch(module, language_model, causal, switch)
        made._hooks.append((module, instance.install_pre_hook(module, watch)))
    return made


def _find_language_model(root: nn.Module) -> list[nn.Module] | None:
    """Modules from ``root`` down to the outermost Hugging Face model with an output head.

    peft calls the inner model's ``forward`` past its hooks, so everything on the way is watched.
    """
    for name, module in root.named_modules():
        if _is_pretrained(module) and _output_head(module) is not None:
            return [*_ancestors(root, name), module]
    return None


def _ancestors(root: nn.Module, name: str) -> Iterator[nn.Module]:
    parts = name.split(".") if name else []
    for depth in range(len(parts)):
        yield root.get_submodule(".".join(parts[:depth]))


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        base.__name__ == "PreTrainedModel" and base.__module__ == "transformers.modeling_utils"
        for base in type(module).__mro__
    )


def _output_head(module: Any) -> nn.Module | None:
    try:
        head = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # models without a head say so in either way
        return None
    return head if isinstance(head, nn.Module) else None


def _obstacle(model: Any) -> str | None:
    """Why head and loss of this Hugging Face model stay as they are; None when they need not."""
    name, head = type(model).__name__, _output_head(model)
    causal = getattr(sys.modules.get("transformers.loss.loss_utils"), "ForCausalLMLoss", None)
    current = getattr(model, "loss_function", None)
    if causal is None or current is None:
        return f"{name} has no loss_function (transformers 5.17 or newer is needed)"
    if isinstance(current, CausalLoss):
        return f"{name} has them by tiles already"
    if current is not causal:
        own = getattr(current, "__name__", type(current).__name__)
        return f"{name}.loss_function is {own}, not ForCausalLMLoss"
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        return f"the output head is a {type(head).__name__} with a forward of its own, not a plain nn.Linear"
    return None
