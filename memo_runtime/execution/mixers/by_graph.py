"""A mixer that the user has named (``memo.register_mixer``), through autograd's own graph.

The operator runs once, in forward, and autograd saves what its backward needs. Of that, nothing is held that can be had
again: its arguments (rebuilt before backward) and its results (stashed anyway) are remembered by place. What is left (a
log-sum-exp, states of a scan) is stashed like the results. Between forward and backward the graph has no tensor at all.

    forward    arguments -> operator -> results           graph: "argument 2", "result 0", "stash 0"
    backward   the same arguments, results and stash -> graph -> gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

Operator = Callable[[Sequence[torch.Tensor]], Any]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor that autograd saved is to be had: in a group, as a view of one of its members."""

    group: str
    index: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Handle:
    """What the graph holds in place of a tensor."""

    tensor: torch.Tensor | None
    place: _Place | None = None


@dataclass(slots=True)
class _Store:
    handles: list[_Handle] = field(default_factory=list)
    groups: dict[str, Sequence[torch.Tensor]] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> _Handle:
        self.handles.append(_Handle(tensor.detach()))
        return self.handles[-1]

    def unpack(self, handle: _Handle) -> torch.Tensor:
        place = handle.place
        assert place is not None, "every handle has a place once the forward is over"
        base = self.groups[place.group][place.index]
        if base.size() == place.size and base.stride() == place.stride and not place.offset:
            return base
        return base.as_strided(place.size, place.stride, base.storage_offset() + place.offset)

    def settle(self, arguments: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Let go of every tensor; yields those that are neither arguments nor results that will be there."""
        stash: list[torch.Tensor] = []
        known = [(group, at, one) for group, members in (("argument", arguments), ("result", results))
                 for at, one in enumerate(members)]  # fmt: skip
        for handle in self.handles:
            saved = handle.tensor
            assert saved is not None, "settled once"
            found = next((entry for entry in known if _inside(saved, entry[2])), None)
            if found is None:
                found = ("stash", len(stash), saved)
                stash.append(saved)
                known.append(found)
            group, at, base = found
            offset = int(saved.storage_offset() - base.storage_offset())
            handle.place = _Place(group, at, tuple(saved.size()), saved.stride(), offset)
            handle.tensor = None
        self.handles.clear()
        return stash


def _inside(saved: torch.Tensor, base: torch.Tensor) -> bool:
    """``saved`` is a view of ``base``."""
    same = saved.untyped_storage()._cdata == base.untyped_storage()._cdata and saved.dtype == base.dtype
    start = saved.storage_offset() - base.storage_offset()
    return same and start >= 0 and start + _reach(saved) <= _reach(base)


def _reach(tensor: torch.Tensor) -> int:
    """Elements from its first to its last in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


class _Source(torch.autograd.Function):
    """Arguments as results of one node, which takes their gradients and holds none of them."""

    @staticmethod
    def forward(ctx: Any, sink: list[Any], wanted: Sequence[bool], anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.sink = sink
        ctx.set_materialize_grads(False)
        outputs = tuple(one.detach() for one in tensors)
        ctx.mark_non_differentiable(*(one for one, want in zip(outputs, wanted, strict=True) if not want))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.sink.append(grads)
        return (None,) * (3 + len(grads))


@dataclass(slots=True)
class MixerGraph:
    """One call's graph."""

    store: _Store
    sink: list[Any]
    anchor: torch.Tensor
    edges: list[GradientEdge | None]

    def backward(
        self,
        grads: Sequence[torch.Tensor | None],
        arguments: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        stash: Sequence[torch.Tensor],
        *,
        retain: bool,
    ) -> Sequence[torch.Tensor | None]:
        """Gradients of the arguments, from those of the results; ``retain``: there will be another one."""
        pairs = [(edge, grad) for edge, grad in zip(self.edges, grads, strict=True)
                 if edge is not None and grad is not None]  # fmt: skip
        if not pairs:
            return [None] * len(arguments)
        self.store.groups = {"argument": arguments, "result": results, "stash": stash}
        try:
            edges, tangents = zip(*pairs, strict=True)
            torch.autograd.grad(edges, [self.anchor], tangents, retain_graph=retain, allow_unused=True)
            found: Sequence[torch.Tensor | None] = self.sink.pop() if self.sink else [None] * len(arguments)
        finally:
            self.store.groups = {}
            self.sink.clear()
        return found


def run_with_graph(
    operator: Operator, arguments: Sequence[torch.Tensor], wanted: Sequence[bool], held: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor], MixerGraph]:
    """(results, stash, graph) of ``operator`` on ``arguments``.

    ``wanted``: which arguments need a gradient. ``held``: which results will be there in backward.
    """
    store, sink = _Store(), list[Any]()
    anchor = torch.zeros((), device=arguments[0].device, requires_grad=True)
    with torch.enable_grad():
        inputs = _Source.apply(sink, wanted, anchor, *arguments)  # type: ignore[no-untyped-call]
        with torch.autograd.graph.saved_tensors_hooks(store.pack, store.unpack):
            found = operator(inputs)
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    edges = [get_gradient_edge(one) if one.requires_grad else None for one in results]
    results = [one.detach() for one in results]
    return results, store.settle(arguments, [results[at] for at in held]), MixerGraph(store, sink, anchor, edges)
