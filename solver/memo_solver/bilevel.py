"""MEMO's bi-level form (arXiv 2407.12117, section 4.2), and the repair that it lacks.

Level 1 places the requests of each distinct block once. Level 2 places the whole
step with every block as one pseudo-request, as tall as its level-1 peak, beside
the requests that live across blocks. An address is level-2 base + level-1 offset.

    address |  requests that live across blocks         |
            |  +-------+            +-------+           |
            |  |block 0|  +-------+ |block 2|           |   a pseudo-request is a
            |  +-------+  |block 1| +-------+           |   full rectangle, so room
            +-------------+-------+---------------------+   inside it is lost

That room is won back: the placement is flattened to single requests, pushed
down, and repaired. The flat heuristic runs as well, and the lower of the two is
returned; so the result is never above either.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memo_solver.cyclic import Unrolled, solve_unrolled, unroll, unused_name
from memo_solver.engine import solve
from memo_solver.errors import InputError
from memo_solver.level_cache import Level1, LevelCache, content_hash
from memo_solver.params import ProgressListener, SolveParams, Switch
from memo_solver.records import MAX_VALUE, Placement, Problem, Request, Solution, Stage, Status
from memo_solver.validator import validate


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One run of a block (forward or backward): its window and its own requests.

    Times of `requests` are relative to `lower`; they lie within the window.
    """

    id: str
    lower: int
    upper: int
    requests: tuple[Request, ...]

    def __post_init__(self) -> None:
        """Refuse requests that outlive the window."""
        for r in self.requests:
            if r.lower < 0 or r.upper > self.upper - self.lower:
                raise InputError(
                    f"block '{self.id}': request '{r.id}' [{r.lower}, {r.upper}) leaves the "
                    f"window of {self.upper - self.lower} time units; give it to the iteration"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """Requests outside and across blocks, in the clock of the step.

    With a `period` the step repeats, and a request may end after it (see cyclic.py).
    """

    requests: tuple[Request, ...]
    period: int | None = None
    capacity: int | None = None

    def __post_init__(self) -> None:
        """Refuse a period that is no number of moments."""
        if self.period is not None and (type(self.period) is not int or self.period < 1):
            raise InputError(f"period must be an integer of at least 1, got {self.period!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BilevelSolution:
    """The flat solution, and what each level gave (bytes)."""

    solution: Solution
    flat_peak: int
    """Of the flat heuristic alone."""
    rectangle_peak: int | None
    """Of level 2 with whole rectangles, as MEMO plans; None where a block has none of 64 bits: its height or
    the common multiple of its alignments is larger."""
    num_distinct_blocks: int
    num_cached_blocks: int


def solve_bilevel(
    blocks: Sequence[Block],
    iteration: Iteration,
    params: SolveParams | None = None,
    *,
    cache_dir: str | Path | None = None,
    progress: ProgressListener | None = None,
) -> BilevelSolution:
    """Place a step of repeated blocks; ids of block requests become 'block/request'.

    `cache_dir` keeps level-1 placements for later runs. The placement of the
    solution is that of the flat problem, in the order of `flatten`.
    """
    return _Bilevel(blocks, iteration, params or SolveParams(), cache_dir, progress).run()


def flatten(blocks: Sequence[Block], iteration: Iteration) -> tuple[Request, ...]:
    """All requests of a step in its clock: blocks in their order, then the iteration's."""
    flat = [
        Request(f"{b.id}/{r.id}", b.lower + r.lower, b.lower + r.upper, r.size, r.alignment)
        for b in blocks
        for r in b.requests
    ]
    return (*flat, *iteration.requests)


class _Bilevel:
    def __init__(
        self,
        blocks: Sequence[Block],
        iteration: Iteration,
        params: SolveParams,
        cache_dir: str | Path | None,
        progress: ProgressListener | None,
    ) -> None:
        self.start = time.monotonic()
        self.blocks = blocks
        self.iteration = iteration
        self.params = params
        self.progress = progress
        self.cache = LevelCache(None if cache_dir is None else Path(cache_dir))
        self.requests = flatten(blocks, iteration)
        self.unrolled = unroll(self.requests, iteration.period)
        self.stages: list[Stage] = []
        self.num_cached = 0
        self.keys = [content_hash(block.requests) for block in blocks]
        self.build_seconds = time.monotonic() - self.start

    def limited(self, share: float) -> SolveParams:
        """Parameters with a share of the time that is left."""
        # Putting the answer together costs about as much as building the flat problem did.
        kept = 1.5 * self.build_seconds
        left = self.params.time_limit_seconds - (time.monotonic() - self.start) - kept
        return replace(self.params, time_limit_seconds=max(left * share, 0.05))

    def stage(self, name: str, since: float, peak: int | None, note: str) -> None:
        self.stages.append(Stage(name=name, seconds=time.monotonic() - since, peak=peak, note=note))

    def run(self) -> BilevelSolution:
        flat = self.place_flat()
        assert flat.placement is not None
        flat_peak = flat.placement.peak
        level1 = self.place_blocks()
        pseudo = self.rectangles(level1)
        start = None if pseudo is None else self.start_from(level1, self.place_rectangles(pseudo))
        solution = flat
        if flat_peak > flat.lower_bound:
            since = time.monotonic()
            solution = self.repair(flat, start)
            self.stage("flatten, push down, repair", since, solution.peak, "")
        return BilevelSolution(
            solution=self.finish(solution),
            flat_peak=flat_peak,
            rectangle_peak=None if start is None else start.peak,
            num_distinct_blocks=len(set(self.keys)),
            num_cached_blocks=self.num_cached,
        )

    def place_flat(self) -> Solution:
        """The flat heuristic: every request of the step by itself, blocks forgotten."""
        since = time.monotonic()
        params = replace(self.limited(0.3), exact=Switch.OFF)
        solution = solve_unrolled(self.unrolled, params, progress=self.progress)
        self.stage("flat heuristic", since, solution.peak, f"{len(self.requests)} requests")
        return solution

    def repair(self, flat: Solution, start: Placement | None) -> Solution:
        """Push the lower of both placements down and repair it, if there is time for a pass."""
        assert flat.placement is not None
        best = flat
        if start is not None and start.peak < flat.placement.peak:
            validate(start.problem, start.offsets)
            best = replace(flat, placement=start, proof=flat.proof)
        assert best.placement is not None
        overhead = sum(stage.seconds for stage in flat.stages if stage.name != "heuristics")
        params = self.limited(1.0)
        if params.time_limit_seconds < 1.2 * overhead:
            return best
        # The repair's own reductions and validation are part of the time that is left.
        params = replace(params, time_limit_seconds=params.time_limit_seconds - overhead / 2)
        hint = best.placement
        repaired = solve_unrolled(self.unrolled, params, progress=self.progress, hint=hint)
        if repaired.placement is None or repaired.placement.peak >= hint.peak:
            return best
        return repaired

    def place_blocks(self) -> dict[str, Level1]:
        """Level 1: each distinct request sequence once."""
        since = time.monotonic()
        distinct = dict(zip(self.keys, self.blocks, strict=True))
        placed: dict[str, Level1] = {}
        for number, (key, block) in enumerate(distinct.items()):
            problem = Problem(requests=block.requests)
            entry = self.cache.get(key, problem)
            if entry is None:
                solution = solve(problem, self.limited(0.2 / (len(distinct) - number)))
                assert solution.placement is not None
                entry = Level1(
                    offsets=solution.placement.offsets,
                    peak=solution.placement.peak,
                    lower_bound=solution.lower_bound,
                )
                self.cache.put(key, entry)
            else:
                self.num_cached += 1
            placed[key] = entry
        proved = sum(entry.peak == entry.lower_bound for entry in placed.values())
        note = f"{len(distinct)} distinct blocks, {proved} proved optimal, {self.num_cached} cached"
        self.stage("level 1", since, max((e.peak for e in placed.values()), default=0), note)
        return placed

    def rectangles(self, level1: dict[str, Level1]) -> list[Request] | None:
        """Each block as one pseudo-request; None when one of them would not be a request of 64 bits."""
        taken = {r.id for r in self.iteration.requests}
        pseudo = []
        for key, block in zip(self.keys, self.blocks, strict=True):
            alignment = math.lcm(*(r.alignment for r in block.requests))
            if max(alignment, level1[key].peak) > MAX_VALUE:
                note = f"left out: block '{block.id}' as a whole is no request of 64 bits"
                self.stage("level 2", time.monotonic(), None, note)
                return None
            name = unused_name(f"block {block.id}", taken)
            pseudo.append(Request(name, block.lower, block.upper, level1[key].peak, alignment))
        return pseudo

    def place_rectangles(self, pseudo: list[Request]) -> tuple[int, ...]:
        """Level 2: blocks as pseudo-requests beside what lives across them; offsets in this order."""
        since = time.monotonic()
        requests = (*pseudo, *self.iteration.requests)
        unrolled = unroll(requests, self.iteration.period)
        solution = solve_unrolled(unrolled, self.limited(0.3))
        assert solution.placement is not None
        self.stage("level 2", since, solution.peak, f"{len(requests)} requests")
        return unrolled.offsets(solution.placement, requests)

    def start_from(self, level1: dict[str, Level1], rectangles: tuple[int, ...]) -> Placement:
        """Level-2 base + level-1 offset for every request, as a placement of the pieces."""
        offsets: dict[str, int] = {}
        for key, block, base in zip(self.keys, self.blocks, rectangles, strict=False):
            for r, offset in zip(block.requests, level1[key].offsets, strict=True):
                offsets[f"{block.id}/{r.id}"] = base + offset
        across = rectangles[len(self.blocks) :]
        offsets |= {r.id: offset for r, offset in zip(self.iteration.requests, across, strict=True)}
        return _as_pieces(self.unrolled, offsets)

    def finish(self, solution: Solution) -> Solution:
        """The same solution over the original requests, with the stages of both levels."""
        assert solution.placement is not None
        offsets = self.unrolled.offsets(solution.placement, self.requests)
        problem = Problem(requests=self.requests, capacity=self.iteration.capacity)
        placement: Placement | None = Placement(problem=problem, offsets=offsets)
        status = Status.OPTIMAL if solution.placement.peak <= solution.lower_bound else Status.FEASIBLE
        if problem.capacity is not None:
            fits = solution.placement.peak <= problem.capacity
            status = Status.OPTIMAL if fits else Status.UNKNOWN
            if solution.lower_bound > problem.capacity:
                status = Status.INFEASIBLE
            placement = placement if fits else None
        proof = solution.proof
        if proof is not None:
            owners = self.unrolled.owners
            proof = replace(proof, request_ids=tuple(dict.fromkeys(owners.get(i, i) for i in proof.request_ids)))
        return replace(solution, status=status, placement=placement, proof=proof, stages=tuple(self.stages))


def _as_pieces(unrolled: Unrolled, offsets: dict[str, int]) -> Placement:
    owner = unrolled.owners
    free = Problem(requests=unrolled.problem.requests)
    placed = tuple(offsets[owner.get(r.id, r.id)] for r in free.requests)
    return Placement(problem=free, offsets=placed)
