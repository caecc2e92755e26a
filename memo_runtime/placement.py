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
