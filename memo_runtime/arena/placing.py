"""Addresses for steps of one length, and of all shorter ones where two recorded lengths say what those ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

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
            trace = self.sample.trace if self.pair is None else self.pair.at(tokens)
            plan = as_arena_plan(fitted(self.solved, trace), trace, self.sample.handles, device)
            self.plans.put(tokens, plan)
        return plan
