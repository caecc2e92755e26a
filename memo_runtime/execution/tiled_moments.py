"""What of a block is alive at full length while it runs by tiles: the schedule of ``tiled_run`` walked without running.

Counted is what a block holds beside its stash (inputs, results of attention, log-sum-exps) and beside its parameters:

    forward    mixer: its inputs | segment: the inputs of the next mixer, or what the block yields
    backward   the gradients that came, and
               segment: those that it makes | mixer: queries, keys, values and their gradients, and that of its result

Gradients that are written over those that came (``tiled_overwrite.py``) are counted once. For a block of one attention
the worst moment is the backward of that attention: beside x and o there are dx over dy, do, q, k, v, dq, dk, dv, seven
tensors in all as long and as wide as x where keys and values have a quarter of its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from memo_runtime.capture.captured import Captured
from memo_runtime.capture.rules import arguments_of
from memo_runtime.capture.split import Mixer, Segment
from memo_runtime.execution.tiled_gradients import sum_dtype
from memo_runtime.execution.tiled_overwrite import overwritten, sole_holders
from memo_runtime.execution.tiled_programs import Cost
from memo_runtime.records import Growth, Moment

#: Bytes by tokens that attention takes beside its tensors: (forward, backward).
Workspace = tuple[float, float]


@dataclass(slots=True)
class Needs:
    """What the walk is told about the parts of a block.

    Args:
        costs: of each segment's programs, by stage: at a tile, and at one of twice its tokens.
        tile: tokens of the smaller one.
        workspaces: of each mixer.
    """

    costs: Mapping[int, tuple[Cost, Cost]]
    tile: int
    workspaces: Mapping[fx.Node, Workspace]


def polynomial(size: Callable[[int], float], tokens: int) -> Growth:
    """The polynomial through ``size`` at one, two and three times ``tokens``; sizes are polynomials themselves."""
    one, two, three = (size(count * tokens) for count in (1, 2, 3))
    quadratic = (three - 2 * two + one) / (2 * tokens**2)
    linear = (two - one) / tokens - 3 * tokens * quadratic
    return Growth(constant=one - linear * tokens - quadratic * tokens**2, linear=linear, quadratic=quadratic)


@dataclass(slots=True)
class _Walk:
    """``alive``: values by name, with the element bytes that are counted for them."""

    captured: Captured
    needs: Needs
    tokens: int
    over: Mapping[fx.Node, fx.Node]
    alive: dict[str, tuple[fx.Node, int]] = field(default_factory=dict)
    fixed: int = 0
    moments: list[Moment] = field(default_factory=list)

    def add(self, kind: str, node: fx.Node, dtype: torch.dtype | None = None) -> None:
        """``node``'s value (or its gradient: ``kind``) is there from now on."""
        self.alive.setdefault(f"{kind} {node.name}", (node, (dtype or node.meta["val"].dtype).itemsize))

    def drop(self, kind: str, nodes: Sequence[fx.Node]) -> None:
        """They are gone."""
        for node in nodes:
            self.alive.pop(f"{kind} {node.name}", None)

    def look(self, index: int | None = None, *, backward: bool, extra: float = 0.0) -> None:
        """Note this moment; ``index``: of the segment whose tiles run, ``extra``: more bytes by token."""
        held = list(self.alive.values())

        def full(tokens: int) -> float:
            sizes = (item * self.captured.size(node.meta["val"].numel(), tokens) for node, item in held)
            return float(sum(sizes)) + extra * tokens

        tile = self._tile(index, backward)
        self.moments.append(Moment(full=polynomial(full, self.tokens), tile=tile, fixed=self.fixed))

    def _tile(self, index: int | None, backward: bool) -> Growth:
        if index is None:
            return Growth()
        first, second = (
            cost.backward_bytes if backward else cost.forward_bytes for cost in self.needs.costs[index]
        )
        per_token = max(0.0, (second - first) / self.needs.tile)
        return Growth(constant=max(0.0, first - per_token * self.needs.tile), linear=per_token)

    # ---- the schedule

    def feeds(self, index: int) -> Segment | None:
        """The segment that computes the inputs of stage ``index``."""
        before = self.captured.stages.stages[index - 1] if index else None
        return before if isinstance(before, Segment) and not before.by_rows else None

    def dropped(self, segment: Segment) -> list[fx.Node]:
        """What of it is dropped once the mixer behind it has run."""
        return [node for node in segment.outputs if node not in self.captured.outputs]

    def forward(self) -> None:
        """As ``Run.forward``."""
        for index, stage in enumerate(self.captured.stages.stages):
            before = self.feeds(index)
            if isinstance(stage, Mixer):
                self.look(backward=False, extra=self.needs.workspaces[stage.node][0])
            elif stage.by_rows:
                self.look(index, backward=False)
            else:
                for node in stage.outputs:
                    self.add("value", node)
                self.look(index, backward=False)
                continue
            if before is not None:
                self.drop("value", self.dropped(before))

    def backward(self) -> None:
        """As ``Run.backward``: what came stays to the end, since its owner holds it."""
        stages = self.captured.stages
        for node in self.captured.outputs:
            if isinstance(node, fx.Node) and node in stages.differentiable:
                self.add("given gradient", node)
        for index in range(len(stages.stages) - 1, -1, -1):
            stage = stages.stages[index]
            before = self.feeds(index) if isinstance(stage, Mixer) or stage.by_rows else None
            if before is not None:
                for node in before.outputs:
                    self.add("value", node)
                self.look(index - 1, backward=False)
            if isinstance(stage, Mixer):
                self._mixer_backward(stage)
            else:
                self._segment_backward(index, stage)
            if before is not None:
                self.drop("value", self.dropped(before))
        self.look(backward=True)

    def _mixer_backward(self, mixer: Mixer) -> None:
        named = arguments_of(mixer.node)
        for name in ("query", "key", "value", "attn_mask"):
            if named[name] is not None and named[name] in self.captured.stages.differentiable:
                self.add("gradient", named[name])
        self.look(backward=True, extra=self.needs.workspaces[mixer.node][1])
        self.drop("gradient", [mixer.node])

    def _segment_backward(self, index: int, segment: Segment) -> None:
        wanted = self.captured.stages.differentiable
        for node in segment.sources:
            if node not in wanted:
                continue
            dtype = sum_dtype(node.meta["val"].dtype)
            if segment.axes[node] is not None:
                if node not in self.over:
                    self.add("gradient", node)
            elif self.captured.traced.token.dims(node.meta["val"]):
                self.add("gradient", node, dtype)
            elif f"gradient {node.name}" not in self.alive:
                self.alive[f"gradient {node.name}"] = (node, 0)
                self.fixed += int(node.meta["val"].numel()) * dtype.itemsize
        self.look(index, backward=True)
        self.drop("gradient", segment.outputs)


def moments(captured: Captured, needs: Needs, tokens: int) -> tuple[tuple[Moment, ...], tuple[Moment, ...]]:
    """(those of forward, those of backward), for sequences of ``tokens`` and longer."""
    device = captured.arguments[0][0].meta["val"].device
    over = overwritten(captured) if sole_holders(device.type) is not None else {}
    forward, backward = (_Walk(captured, needs, tokens, over) for _ in range(2))
    forward.forward()
    backward.backward()
    return tuple(forward.moments), tuple(backward.moments)
