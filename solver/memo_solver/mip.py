"""MEMO's big-M mixed-integer program (arXiv 2407.12117, section 4.2) through PuLP.

The only module that imports pulp. Kept as the published reference: it is much
weaker than clique CP-SAT or the searches of this package, and is never raced.

    min M   s.t.  A_i + S_i <= M <= M_cap,  A_i >= 0
            A_i + S_i <= A_j + z_ij * M_cap          for requests i, j alive together
            A_j + S_j <= A_i + (1 - z_ij) * M_cap    z_ij = 0: i below j; 1: j below i

Alignments above 1 become A_i = alignment * k_i with k_i integer.
"""

from __future__ import annotations

import math
import time
from typing import Any

from memo_solver.bounds import load_bound
from memo_solver.errors import InputError, MissingSolverError
from memo_solver.records import Placement, Problem, Solution, Stage, Status
from memo_solver.sections import Section, split
from memo_solver.validator import validate

MAX_PAIRS = 200_000
"""Conflicting pairs up to which the program is built; it has two rows and a binary for each."""


def solve_mip(problem: Problem, *, time_limit_seconds: float = 300.0, num_threads: int = 1) -> Solution:
    """Minimise the peak with PuLP's default solver (CBC); sections one after the other."""
    start = time.monotonic()
    offsets = [0] * len(problem.requests)
    bound, proved, complete = 0, True, True
    for section in split(problem):
        bound = max(bound, load_bound(section).bound * section.unit)
        left = time_limit_seconds - (time.monotonic() - start)
        placed, optimal = _solve_section(section, max(left, 0.1), num_threads)
        proved = proved and optimal
        if placed is None:
            complete = False
            break
        for i, offset in zip(section.index, placed, strict=True):
            offsets[i] = offset * section.unit
    seconds = time.monotonic() - start
    if not complete:
        stage = Stage(name="MIP", seconds=seconds, note="nothing found")
        return Solution(status=Status.UNKNOWN, placement=None, lower_bound=bound, stages=(stage,))
    free = Problem(requests=problem.requests)
    validate(free, offsets)
    placement = Placement(problem=free, offsets=tuple(offsets))
    optimal = proved or placement.peak <= bound
    return Solution(
        status=Status.OPTIMAL if optimal else Status.FEASIBLE,
        placement=placement,
        lower_bound=placement.peak if optimal else bound,
        stages=(Stage(name="MIP", seconds=seconds, peak=placement.peak),),
    )


def conflicts(section: Section) -> list[tuple[int, int]]:
    """Pairs of requests of a section that are alive together."""
    order = sorted(range(section.num_requests), key=lambda i: section.first[i])
    alive: list[int] = []
    pairs: list[tuple[int, int]] = []
    for i in order:
        alive = [j for j in alive if section.last[j] >= section.first[i]]
        pairs += [(j, i) for j in alive]
        alive.append(i)
        if len(pairs) > MAX_PAIRS:
            raise InputError(
                f"the MIP would need more than {MAX_PAIRS} conflicting pairs; "
                "use solve(), which needs no list of conflicts"
            )
    return pairs


def _solve_section(section: Section, seconds: float, num_threads: int) -> tuple[list[int] | None, bool]:
    """Offsets in units (None when nothing was found) and whether they are proved optimal."""
    pulp = _import()
    model = pulp.LpProblem("memory", pulp.LpMinimize)
    cap = sum(section.size) + sum(section.alignment)
    peak = pulp.LpVariable("M", load_bound(section).bound, cap)
    model += peak
    addresses = [_address(pulp, section, i, cap) for i in range(section.num_requests)]
    for i, address in enumerate(addresses):
        model += address + section.size[i] <= peak
    for i, j in conflicts(section):
        above = pulp.LpVariable(f"z_{i}_{j}", cat="Binary")
        model += addresses[i] + section.size[i] <= addresses[j] + above * cap
        model += addresses[j] + section.size[j] <= addresses[i] + (1 - above) * cap
    solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, threads=num_threads)
    status = model.solve(solver)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, False
    values = [pulp.value(address) for address in addresses]
    placed = _round(section, [0.0 if value is None else float(value) for value in values])
    return placed, bool(status == pulp.LpStatusOptimal and model.sol_status == pulp.LpSolutionOptimal)


def _address(pulp: Any, section: Section, i: int, cap: int) -> Any:  # noqa: ANN401 - PuLP has no types
    alignment = section.alignment[i]
    if alignment == 1:
        return pulp.LpVariable(f"A_{i}", 0, cap)
    return alignment * pulp.LpVariable(f"k_{i}", 0, math.ceil(cap / alignment), cat="Integer")


def _round(section: Section, values: list[float]) -> list[int]:
    """Integers in the solver's order: it works in floating point, to a tolerance.

    Placing by rising address, each request above those it meets, gives back the
    same packing, in whole units.
    """
    order = sorted(range(section.num_requests), key=lambda i: (values[i], i))
    top = [0] * section.num_slots
    offsets = [0] * section.num_requests
    for i in order:
        span = range(section.first[i], section.last[i] + 1)
        floor = max(top[slot] for slot in span)
        offsets[i] = -(-floor // section.alignment[i]) * section.alignment[i]
        for slot in span:
            top[slot] = offsets[i] + section.size[i]
    return offsets


def _import() -> Any:  # noqa: ANN401 - a module without types
    try:
        import pulp
    except ImportError as error:
        raise MissingSolverError("the MIP was asked for and PuLP is missing: pip install pulp") from error
    return pulp
