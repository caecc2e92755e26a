"""Copies of a declared module, run on random numbers: what one run shows of it.

Refused by name is what parts of the tokens could not keep: attributes and buffers that a run changes, writes to
arguments, results without tokens or of a size that depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line
from memo_runtime.blocks.operators import draws, operator_flops
from memo_runtime.capture.assigned import Tables
from memo_runtime.capture.copying import structural_copy
from memo_runtime.capture.declared import TENSOR, Choices, Shape
from memo_runtime.capture.key import changed, state_key
from memo_runtime.errors import CaptureRefusedError

#: Tokens of a run: no multiple of anything, since a last tile is not either.
TOKENS, FEWER = 37, 26


@dataclass(frozen=True, slots=True)
class Facts:
    """One call of a declared module: arguments without tensors, where and what those are, precision and device."""

    template: BlockCall
    leaves: tuple[int, ...]
    inputs: tuple[Shape, ...]
    autocast: AutocastState
    device: torch.device


@dataclass(slots=True)
class Subject:
    """A copy of the module over parameters that were moved a little; ``dtype``: of all floats, None: their own."""

    module: nn.Module
    template: BlockCall
    leaves: tuple[int, ...]
    autocast: AutocastState
    dtype: torch.dtype | None = None

    def call(self, inputs: Sequence[torch.Tensor]) -> Any:
        """Run it."""
        args, kwargs = self.template.replaced(dict(zip(self.leaves, inputs, strict=True))).arguments()
        with self.autocast.uncached().restored():
            return self.module.forward(*args, **kwargs)

    def tensors(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run it; what it yields without constants."""
        leaves = _pytree.tree_leaves(self.call(inputs))
        return [one for one in leaves if isinstance(one, torch.Tensor)]

    def random(self, shapes: Sequence[Shape], tokens: int, device: torch.device) -> list[torch.Tensor]:
        """Inputs; numbers that are no floats are 0 or 1, as good an index as any."""
        found = []
        for shape in shapes:
            size = shape.empty(tokens, torch.device("meta")).shape
            if shape.dtype.is_floating_point:
                found.append(torch.randn(size, device=device, dtype=self.dtype or shape.dtype))
            else:
                found.append(torch.randint(0, 2, size, device=device).to(shape.dtype))
        return found


def moved_copy(live: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy over parameters moved a little, so that a zero hides nothing; ``dtype``: of all floats."""
    memo: dict[int, torch.Tensor] = {}
    for one in live.buffers():
        made = one.detach().clone()
        made = made.to(dtype) if dtype is not None and made.is_floating_point() else made
        memo[id(one)] = made.requires_grad_(one.requires_grad)
    for one in live.parameters():
        moved = one.detach().clone()
        if moved.is_floating_point():
            moved = moved.to(dtype) if dtype is not None else moved
            moved.add_(torch.randn_like(moved), alpha=0.02)
        memo[id(one)] = nn.Parameter(moved, requires_grad=one.requires_grad)
    return structural_copy(live, memo)


def refused(name: str, reason: str) -> CaptureRefusedError:
    """The error that says why the module called ``name`` is not run by tiles."""
    return CaptureRefusedError(f"memo.token_wise module '{name}'" if name else "memo.token_wise block", reason)


@dataclass(frozen=True, slots=True)
class Seen:
    """What runs show: results, choices of ``topk``, random numbers, FLOPs and bytes for backward by token."""

    outputs: tuple[Shape, ...]
    constants: tuple[Any, ...]
    spec: Any
    choices: tuple[Shape, ...]
    random: bool
    flops: float
    saved_bytes: float


class _Watch(TorchDispatchMode):
    """Counts FLOPs, and sees whether random numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.random = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += operator_flops(func, args, kwargs or {}, out)
        self.random = self.random or draws(str(func))
        return out


def look(name: str, subject: Subject, facts: Facts) -> Seen:
    """Run it at two lengths, as it is."""
    before, versions, tables = state_key(subject.module), _versions(subject.module), Tables(subject.module)
    inputs = subject.random(facts.inputs, TOKENS, facts.device)
    given = [one._version for one in inputs]
    with _Watch() as watch:
        first, choices = _leaves(name, subject, inputs)
        if [one._version for one in inputs] != given:
            raise refused(name, "it writes to its argument")
    assigned = tables.assigned()
    if assigned:
        raise refused(name, f"{assigned} changes when it runs, and each tile would change it")
    written = next((key for key, old in versions.items() if _versions(subject.module)[key] != old), None)
    if written is not None:
        raise refused(name, f"it writes to '{written}', and each tile would")
    after = state_key(subject.module)
    if before != after:
        raise refused(name, f"{changed(before, after)} changes when it runs, and each tile would change it")
    second, fewer = _leaves(name, subject, subject.random(facts.inputs, FEWER, facts.device))
    leaves, spec = _pytree.tree_flatten(first, is_leaf=lambda leaf: leaf is None)
    others = _pytree.tree_leaves(second, is_leaf=lambda leaf: leaf is None)
    pairs = list(zip(leaves, others, strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)]
    if len(leaves) != len(others) or not tensors or any(
        not isinstance(a, torch.Tensor) and repr(a) != repr(b) for a, b in pairs
    ):
        raise refused(name, f"what it yields for {TOKENS} tokens and for {FEWER} is not alike")
    return Seen(
        outputs=tuple(_grown(name, f"result {at}", a, b) for at, (a, b) in enumerate(tensors)),
        constants=tuple(TENSOR if isinstance(one, torch.Tensor) else one for one in leaves),
        spec=spec,
        choices=tuple(_grown(name, "the choice of its topk", a, b) for a, b in _paired(name, choices, fewer)),
        random=watch.random,
        flops=watch.flops / TOKENS,
        saved_bytes=_saved_bytes(subject, facts) / TOKENS,
    )


def _leaves(name: str, subject: Subject, inputs: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    try:
        with Choices() as choices:
            return subject.call(inputs), choices.seen
    except Exception as error:
        text = f"it does not run on {TOKENS} or {FEWER} tokens alone: {type(error).__name__}: {first_line(error)}"
        raise refused(name, text) from error


def _paired(
    name: str, choices: Sequence[torch.Tensor], fewer: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if len(choices) != len(fewer):
        raise refused(name, "how often it calls topk depends on data")
    return list(zip(choices, fewer, strict=True))


def _versions(module: nn.Module) -> dict[str, int]:
    return {name: one._version for name, one in (*module.named_parameters(), *module.named_buffers())}


def _grown(name: str, what: str, one: torch.Tensor, other: torch.Tensor) -> Shape:
    """The shape of a result that was seen with ``TOKENS`` and with ``FEWER``."""
    if one.dim() != other.dim() or one.dtype != other.dtype:
        raise refused(name, f"{what} has another number of dimensions or dtype at another length")
    factors, sizes = [], []
    for size, fewer in zip(one.shape, other.shape, strict=True):
        grows = size != fewer
        if grows and (size % TOKENS or size * FEWER != fewer * TOKENS):
            text = f"{what} has a size of {size} for {TOKENS} tokens and of {fewer} for {FEWER}"
            raise refused(name, f"{text}, which depends on data or mixes tokens")
        factors.append(size // TOKENS if grows else 0)
        sizes.append(0 if grows else size)
    if sum(factor > 0 for factor in factors) != 1:
        raise refused(name, f"{what} has {'no' if not any(factors) else 'two'} token dimensions")
    return Shape(tuple(sizes), tuple(factors), one.dtype)


def _saved_bytes(subject: Subject, facts: Facts) -> int:
    """Bytes that its backward needs, beside parameters and arguments."""
    inputs = [one.requires_grad_() if one.is_floating_point() else one
              for one in subject.random(facts.inputs, TOKENS, facts.device)]  # fmt: skip
    given = {one.untyped_storage()._cdata for one in (*inputs, *subject.module.parameters(), *subject.module.buffers())}
    sizes: dict[int, int] = {}
    held = []

    def pack(one: torch.Tensor) -> torch.Tensor:
        storage = one.untyped_storage()
        held.append(storage)
        sizes[storage._cdata] = 0 if storage._cdata in given else storage.nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        subject.call(inputs)
    return sum(sizes.values())
