"""The test that a module declared token-wise has to pass.

On random numbers, in float64 where the module takes that: for tokens chosen in any way (a first part, the rest, one
token many times, another order) it must yield what it yields for them among all tokens, and the gradients of parts
must be those of the whole. One token many times shows what a limit on the tokens of an expert would do. What the module
draws is taken to be constant meanwhile.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks.operators import base_name, draws
from memo_runtime.capture.subject import TOKENS, Facts, Seen, Subject, moved_copy, refused
from memo_runtime.records import TokenAxis

_CUT = 11
#: Most relative difference (L2) by precision. A module may round to float32 inside.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE = 0.05
#: Parameters with more bytes than this in float64 are tested in their own precision.
_WIDE_BYTES = 4 << 30


def tested_layouts(name: str, live: nn.Module, subject: Subject, facts: Facts, seen: Seen) -> tuple[str, ...]:
    """In which layouts of merged dimensions it is token-wise; ``subject``: in its own precision.

    Raises:
        CaptureRefusedError: in none; says which number differs by how much.
    """
    wide = sum(one.numel() * 8 for one in live.parameters()) <= _WIDE_BYTES
    found = _layouts_in_double(name, live, facts, seen) if wide else None
    return _layouts(name, subject, facts, seen) if found is None else found


class _Constants(TorchDispatchMode):
    """Random operators yield what they yield on average: keep everything, the middle of a range."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not draws(str(func)):
            return func(*args, **kwargs)
        base = base_name(str(func))
        if base == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if base in ("bernoulli", "bernoulli_"):
            return args[0].fill_(1.0) if base == "bernoulli_" else torch.ones_like(args[0])
        if base == "uniform_":
            low, high = (args[place] if len(args) > place else place - 1.0 for place in (1, 2))
            return args[0].fill_((low + high) / 2)
        if base == "normal_":
            return args[0].fill_(args[1] if len(args) > 1 else 0.0)
        if base in ("rand", "randn"):
            return torch.full(args[0], 0.5 if base == "rand" else 0.0, **kwargs)
        if base in ("rand_like", "randn_like"):
            return torch.full_like(args[0], 0.5 if base == "rand_like" else 0.0, **kwargs)
        raise _NotTestableError(f"{func} draws random numbers in a way that cannot be tested token by token")


class _NotTestableError(Exception):
    """A random operator without a constant that could stand for it."""


def _layouts_in_double(name: str, live: nn.Module, facts: Facts, seen: Seen) -> tuple[str, ...] | None:
    """As ``_layouts``, in float64; None: the module does not take it."""
    subject = Subject(moved_copy(live, torch.float64), facts.template, facts.leaves, facts.autocast, torch.float64)
    inputs = subject.random(facts.inputs, TOKENS, facts.device)
    try:
        with _constants(seen):
            leaves = [one.requires_grad_() if one.is_floating_point() else one for one in inputs]
            results = [one for one in subject.tensors(leaves) if one.requires_grad]
            if results:
                torch.autograd.grad(results, [one for one in leaves if one.requires_grad],
                                    [torch.ones_like(one) for one in results], allow_unused=True)  # fmt: skip
    except _NotTestableError as error:
        raise refused(name, str(error)) from error
    except Exception:
        return None  # kernels of one precision; the module's own is tested instead
    return _layouts(name, subject, facts, seen)


def _constants(seen: Seen) -> contextlib.AbstractContextManager[Any]:
    return _Constants() if seen.random else contextlib.nullcontext()  # type: ignore[no-untyped-call]


def _layouts(name: str, subject: Subject, facts: Facts, seen: Seen) -> tuple[str, ...]:
    """In which it is token-wise.

    Raises:
        CaptureRefusedError: in none; says which number differs by how much.
    """
    merged = any(factor > 1 for shape in (*facts.inputs, *seen.outputs) for factor in shape.factors)
    found, worst = [], []
    for layout in ("outer", "inner") if merged else ("outer",):
        try:
            with _constants(seen):
                difference, what = _difference(subject, facts, seen, layout)
        except _NotTestableError as error:
            raise refused(name, str(error)) from error
        if difference <= 1.0:
            found.append(layout)
        worst.append((difference, what))
    if not found:
        raise refused(name, f"it mixes tokens: {min(worst)[1]}")
    return tuple(found)


def _difference(subject: Subject, facts: Facts, seen: Seen, layout: str) -> tuple[float, str]:
    """(largest difference in units of what is allowed, in words)."""
    axes = [shape.axis(layout) for shape in facts.inputs], [shape.axis(layout) for shape in seen.outputs]
    inputs = subject.random(facts.inputs, TOKENS, facts.device)
    compare = _Comparison(_tolerance(subject, facts))
    with torch.no_grad():
        whole = subject.tensors(inputs)
        for index in _choices_of_tokens(facts.device):
            part = subject.tensors(_taken(inputs, axes[0], index))
            compare("result", part, _taken(whole, axes[1], index))
    results = [torch.randn_like(one) if one.is_floating_point() else one for one in whole]
    every = torch.arange(TOKENS, device=facts.device)
    cuts = [every[:_CUT], every[_CUT:]]
    theirs, states = _gradients(subject, inputs, results)
    sums: list[torch.Tensor | None] = [None] * len(states)
    for index in cuts:
        mine, share = _gradients(subject, _taken(inputs, axes[0], index), _taken(results, axes[1], index))
        expected = _taken(theirs, [axis for axis, one in zip(axes[0], inputs, strict=True)
                                   if one.is_floating_point()], index)  # fmt: skip
        compare("gradient of argument", mine, expected)
        sums = [one if total is None else total + one for total, one in zip(sums, share, strict=True)]
    compare("gradient of a parameter", [one for one in sums if one is not None], states)
    return compare.worst


def _choices_of_tokens(device: torch.device) -> list[torch.Tensor]:
    every = torch.arange(TOKENS, device=device)
    return [every[:_CUT], every[_CUT:], every.flip(0), *(torch.full_like(every, one) for one in range(0, TOKENS, 2))]


def _taken(tensors: Sequence[torch.Tensor], axes: Sequence[Any], index: torch.Tensor) -> list[torch.Tensor]:
    """Tokens ``index`` of each."""
    found = []
    for one, axis in zip(tensors, axes, strict=True):
        if isinstance(axis, TokenAxis):
            split = one.unflatten(axis.dim, (axis.outer, -1, axis.inner)).index_select(axis.dim + 1, index)
            one = split.flatten(axis.dim, axis.dim + 2)
        found.append(one)
    return found


def _gradients(
    subject: Subject, inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of (the inputs, the parameters) under ``weights`` of the results; zeros where there is none."""
    leaves = [one.detach().requires_grad_(one.is_floating_point()) for one in inputs]
    outputs = subject.tensors(leaves)
    pairs = [(out, weight) for out, weight in zip(outputs, weights, strict=True) if out.requires_grad]
    states = (*subject.module.parameters(), *subject.module.buffers())
    sought = [one for one in (*leaves, *states) if one.requires_grad]
    found: Sequence[torch.Tensor | None] = [None] * len(sought)
    if pairs and sought:
        results, tangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, sought, tangents, allow_unused=True)
    filled = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(sought, found, strict=True)]
    count = sum(one.requires_grad for one in leaves)
    return filled[:count], filled[count:]


def _tolerance(subject: Subject, facts: Facts) -> Callable[[torch.dtype], float]:
    lowered = subject.dtype is None and bool(facts.autocast.signature())
    return lambda dtype: _TOLERANCE if lowered else _TOLERANCES.get(dtype, _TOLERANCE)


class _Comparison:
    """Keeps the largest difference."""

    def __init__(self, tolerance: Callable[[torch.dtype], float]) -> None:
        self._tolerance = tolerance
        self.worst: tuple[float, str] = (0.0, "")

    def __call__(self, kind: str, mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
        """Compare tensors of parts with those of the whole."""
        scale = max((_rms(one) for one in theirs), default=0.0)
        for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            a, b = one.double().nan_to_num(), other.double().nan_to_num()
            size = max(float(b.norm()), 1e-3 * scale * b.numel() ** 0.5)
            error = float((a - b).norm())
            share = error / size if size else (float("inf") if error else 0.0)
            allowed = share / self._tolerance(other.dtype)
            if not allowed <= self.worst[0]:
                text = f"{kind} {number} of a part of the tokens differs by {share:.2g} (relative) from the whole's"
                self.worst = (allowed, text)


def _rms(one: torch.Tensor) -> float:
    return float(one.double().nan_to_num().norm()) / math.sqrt(max(one.numel(), 1))
