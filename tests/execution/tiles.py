"""Running one block as it is and by tiles, and comparing all that it yields and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from memo_runtime.execution.tiled import TiledBlock
from tests.exactness.models import Family

TOLERANCE = 1e-12
#: Gradients that are zero but for rounding (the bias of keys) are measured against the largest.
SMALL = 1e-6


@dataclass
class Call:
    """One call of a block with leaves of its own, so that gradients can be asked for."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """Everything that wants a gradient."""
        leaves = _pytree.tree_leaves((self.args, self.kwargs))
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        return wanted + [one for one in self.block.parameters() if one.requires_grad]


def call_of(block: nn.Module, *args: Any, **kwargs: Any) -> Call:
    return Call(block, args, kwargs)


def _fresh(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return leaf


def calls_of(family: Family, *, tokens: int = 17, rows: int = 3, **changes: Any) -> list[Call]:
    """The calls that a model makes of each kind of block, in double precision; ``changes``: of its configuration."""
    model = family.make(**changes)
    seen: dict[type, tuple[nn.Module, Any, Any]] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault(type(module), (module, args, kwargs))

    stacks = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) >= 2]
    handles = [block.register_forward_pre_hook(remember, with_kwargs=True) for stack in stacks for block in stack]
    no_cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    model(**family.batch(rows=rows, tokens=tokens), **no_cache)
    for handle in handles:
        handle.remove()
    return [Call(module, *_pytree.tree_map(_fresh, (args, kwargs))) for module, args, kwargs in seen.values()]


def run(call: Call, forward: Callable[..., Any]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(outputs, gradients of all inputs and parameters under random weights of the outputs)."""
    outputs = [one for one in _pytree.tree_leaves(forward(*call.args, **call.kwargs)) if isinstance(one, Tensor)]
    wanted = [one for one in outputs if one.requires_grad]
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one) for one in wanted]
    return list(outputs), list(torch.autograd.grad(wanted, call.inputs, weights, allow_unused=True))


def worst(mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """Largest relative L2 difference; infinite where one has a tensor and the other none."""
    assert len(mine) == len(theirs)
    largest = max(float(one.detach().double().norm()) for one in theirs if one is not None)
    error = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and b is not None:
            assert a.shape == b.shape
            a, b = a.detach().double(), b.detach().double()
            error = max(error, float((a - b).norm()) / max(float(b.norm()), SMALL * largest))
    return error


def assert_exact(call: Call, tiled: TiledBlock, *, tolerance: float = TOLERANCE) -> None:
    """Outputs and gradients by tiles are those of the block."""
    theirs = run(call, call.block.forward)
    mine = run(call, tiled)
    assert worst(mine[0], theirs[0]) <= tolerance
    assert worst(mine[1], theirs[1]) <= tolerance
