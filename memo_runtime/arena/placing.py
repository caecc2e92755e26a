"""Addresses for steps of one length, and of all shorter ones where two recorded lengths say what those ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from memo_runtime.allocator.library import Counts
from memo_runtime.arena.lengths import Pair, Sample, fitted
from memo_runtime.arena.plan import ArenaPlan, as_arena_plan
from memo_runtime.arena.solving import Solved
from memo_runtime.recent import Recent

#: Lengths whose plans a placement remembers; others are made again from its addresses.
_MOST_LENGTHS = 32


@dataclass(slots=True)
class Placement:
    """Addresses for steps of ``tokens``, and where ``pair`` is there, of fewer ones too."""

    tokens: int
    sample: Sample
    pair: Pair | None
    solved: Solved
    plans: Recent[ArenaPlan] = field(default_factory=lambda: Recent(_MOST_LENGTHS))

    def serves(self, tokens: int) -> bool:
        """Whether it has addresses for a step of ``tokens``."""
        return tokens == self.tokens or (self.pair is not None and tokens < self.tokens)

    def plan(self, tokens: int, device: int) -> ArenaPlan:
        """That for steps of ``tokens``, made once.

        Raises:
            AllocatorPlanError: it places nothing.
        """
        plan = self.plans.get(tokens)
        if plan is None:
            plan = self._plan(tokens, device)
            self.plans.put(tokens, plan)
        return plan

    def _plan(self, tokens: int, device: int) -> ArenaPlan:
        if self.pair is None:
            return as_arena_plan(self.solved, self.sample.trace, self.sample.handles, device)
        trace = self.pair.at(tokens)
        layout = fitted(self.solved, trace)
        rows = zip(self.solved.placed, layout.rows, self.solved.rows, strict=True)
        bounds = self.pair.bounds(tokens, {index: (row.size, placed.size) for index, row, placed in rows})
        plan = as_arena_plan(layout, trace, self.sample.handles, device)
        # What has no room counts as a step that has changed.
        without_room = sum(trace.requests[index].size for index in self.solved.placed) - plan.planned_bytes
        step_bytes = plan.step_bytes - without_room
        return replace(plan, bounds=tuple(bounds), places=self.solved.rows, step_bytes=step_bytes)

    def learn(self, tokens: int, plan: ArenaPlan, misfits: Sequence[tuple[int, int]], counts: Counts) -> int:
        """A step of ``tokens`` by ``plan`` had ``misfits``: (slot, bytes). Returns the bytes of those without room."""
        if self.pair is None:
            return 0
        order = plan.order() if misfits else []
        sizes = {row: size for slot, size in misfits if (row := order[slot]) is not None}
        found = {self.solved.placed[row]: size for row, size in sizes.items()}
        new = self.pair.learn(tokens, found)
        # Each was asked for once, and what was not served is known.
        lost = counts.unplanned + counts.occupied + counts.unordered + counts.outside + counts.other_stream
        known = sum(not least <= sizes[row] <= most for row, (least, most) in enumerate(plan.bounds) if row in sizes)
        if counts.requests == len(plan.rows) + len(plan.residents) and lost <= known:
            new = self.pair.confirm(tokens, set(self.solved.placed) - set(found)) or new
        if new:
            self.plans = Recent(_MOST_LENGTHS)
        return sum(size for row, size in sizes.items() if -(-size // 512) > -(-self.solved.rows[row].size // 512))
