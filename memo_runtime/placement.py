"""Where requests for memory live: the rows that a layout consists of and a plan carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRequest:
    """Where one request of the step lives: ``size`` bytes at ``offset`` of the arena, from event ``lower`` until just
    before event ``upper`` of the step.
    """

    id: str
    lower: int
    upper: int
    size: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaReport:
    """How much of the latest planned step was where its plan put it.

    Attributes:
        state: ``planned``, or why not, or that the latest step was not. plans: kinds of steps that have one.
        arena_bytes: of the arena that they share.
        planned_peak, lower_bound: of that step's plan, and what no plan is below.
        requests, served, bytes, served_bytes: of the step, bytes as requested. misses: (cause, requests) of the rest:
            ``resident`` ones that outlive the step, ``outside`` of a step, ``other_stream``, ``unplanned`` size,
            ``occupied`` or ``unordered`` bytes.
        resident_bytes: most bytes of the step that its plan leaves to PyTorch's allocator, since they outlive it.
        reserved_bytes: ``torch.cuda.memory_reserved`` now.
    """

    state: str
    plans: int = 0
    arena_bytes: int = 0
    planned_peak: int = 0
    lower_bound: int = 0
    requests: int = 0
    served: int = 0
    bytes: int = 0
    served_bytes: int = 0
    misses: tuple[tuple[str, int], ...] = ()
    resident_bytes: int = 0
    reserved_bytes: int = 0
