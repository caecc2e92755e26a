import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_solver import Problem, Request, SolveParams, Status, solve, validate
from memo_solver.instances import loose_packing, planted_packing, random_requests
from memo_solver.native import native_status
from memo_solver.params import Switch
from tests.solver.brute_force import optimum, peak_load
from tests.solver.problems import problems

PARAMS = SolveParams(time_limit_seconds=20, num_threads=2)
PYTHON = SolveParams(time_limit_seconds=20, num_threads=2, native=Switch.OFF, cpsat=Switch.OFF)


@pytest.mark.parametrize("params", [PARAMS, PYTHON], ids=["default", "python"])
@settings(max_examples=120, deadline=None)
@given(problem=problems(max_requests=6, max_alignment=4))
def test_tiny_problems_equal_brute_force(params, problem):
    solution = solve(problem, params)
    assert solution.status is Status.OPTIMAL
    assert solution.peak == optimum(problem)
    assert solution.lower_bound == solution.peak
    validate(problem, solution.placement.offsets)


@settings(max_examples=120, deadline=None)
@given(problem=problems(max_requests=6), slack=st.integers(-2, 3))
def test_fits_exactly_when_brute_force_fits(problem, slack):
    best = optimum(problem)
    largest = max((r.size for r in problem.requests), default=0)
    capacity = max(best + slack, largest, 0)
    solution = solve(Problem(requests=problem.requests, capacity=capacity), PARAMS)
    assert solution.status is (Status.OPTIMAL if capacity >= best else Status.INFEASIBLE)
    if solution.placement is not None:
        assert solution.placement.peak <= capacity


@pytest.mark.skipif(not native_status().available, reason="needs the compiled search")
@pytest.mark.parametrize("seed", range(6))
def test_planted_packings_are_solved_exactly(seed):
    problem = planted_packing(120, seed=seed)
    assert peak_load(problem) == problem.capacity
    solution = solve(problem, PARAMS)
    assert solution.status is Status.OPTIMAL
    assert solution.peak == solution.lower_bound == problem.capacity


@pytest.mark.parametrize("seed", range(3))
def test_thinned_packings_never_end_below_the_load(seed):
    problem = loose_packing(60, seed=seed)
    solution = solve(Problem(requests=problem.requests), SolveParams(time_limit_seconds=2))
    assert solution.peak >= solution.lower_bound >= peak_load(problem)
    validate(problem, solution.placement.offsets, capacity=solution.peak)


def test_one_unit_below_the_load_is_refused_with_the_requests_that_prove_it():
    problem = planted_packing(150, seed=3)
    solution = solve(Problem(requests=problem.requests, capacity=problem.capacity - 1), PARAMS)
    assert solution.status is Status.INFEASIBLE
    assert solution.placement is None
    assert solution.seconds < 1.0
    by_id = {r.id: r for r in problem.requests}
    proof = solution.proof
    alive = [by_id[i] for i in proof.request_ids]
    assert all(r.lower <= proof.time < r.upper for r in alive)
    assert sum(r.size for r in alive) == proof.bound == problem.capacity


# Load 7 at every moment, and yet no packing of height 7: found by random search over small steps.
GAP = (
    (0, 1, 3), (0, 2, 4), (1, 3, 1), (2, 3, 3), (1, 4, 1), (2, 4, 1), (3, 4, 2), (1, 5, 1), (3, 5, 2), (4, 5, 4),
)  # fmt: skip


@pytest.mark.parametrize("params", [PARAMS, PYTHON], ids=["default", "python"])
def test_an_optimum_above_the_load_is_proved_by_search(params):
    problem = Problem(requests=tuple(Request(f"r{k}", *row) for k, row in enumerate(GAP)))
    assert peak_load(problem) == 7
    solution = solve(problem, params)
    assert (solution.status, solution.peak, solution.lower_bound) == (Status.OPTIMAL, 8, 8)
    assert "exhaustive search" in solution.proof.reason
    refused = solve(Problem(requests=problem.requests, capacity=7), params)
    assert refused.status is Status.INFEASIBLE


def test_a_bound_of_rounded_sizes_says_so():
    problem = Problem(requests=tuple(Request(f"r{k}", 0, 2, 3, 8) for k in range(3)))
    proof = solve(problem, PARAMS).proof
    assert (proof.bound, proof.request_ids) == (19, ("r0", "r1", "r2"))
    assert proof.reason == "these requests are alive together, and each but the topmost takes a multiple of 8"
    plain = solve(Problem(requests=tuple(Request(f"r{k}", 0, 2, 16, 8) for k in range(3))), PARAMS).proof
    assert plain.reason == "these requests are alive together"


def test_what_was_refused_before_it_was_placed_has_no_peak():
    problem = Problem(requests=(Request("a", 0, 2, 3), Request("b", 1, 2, 3)), capacity=5)
    assert [stage.peak for stage in solve(problem, PARAMS).stages] == [None]
    assert [stage.peak for stage in solve(Problem(requests=()), PARAMS).stages][-1] == 0


def test_more_threads_than_cores_are_not_used_and_that_is_said_once(caplog):
    cores = len(os.sched_getaffinity(0))
    for _ in range(2):
        assert SolveParams(num_threads=cores + 397).threads == cores
    said = f"{cores + 397} threads asked for, {cores} used: one for each core"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_empty_problem_is_answered():
    solution = solve(Problem(requests=()))
    assert (solution.status, solution.peak, solution.gap) == (Status.OPTIMAL, 0, 0.0)


def test_row_order_names_and_time_scaling_change_nothing():
    problem = random_requests(60, seed=5)
    params = SolveParams(time_limit_seconds=60, num_threads=2, seed=4)
    reference = solve(problem, params).placement.by_id()
    rows = list(problem.requests)
    random.Random(1).shuffle(rows)
    assert solve(Problem(requests=tuple(rows)), params).placement.by_id() == reference
    times = sorted({t for r in rows for t in (r.lower, r.upper)})
    stretched = {t: 1000 + 7 * k * k for k, t in enumerate(times)}
    scaled = [Request(r.id, stretched[r.lower], stretched[r.upper], r.size) for r in rows]
    assert solve(Problem(requests=tuple(scaled)), params).placement.by_id() == reference
    named = [Request(f"x{r.id}", r.lower, r.upper, r.size) for r in rows]
    renamed = solve(Problem(requests=tuple(named)), params).placement.by_id()
    assert {f"x{name}": offset for name, offset in reference.items()} == renamed


def test_same_seed_same_placement():
    problem = planted_packing(140, seed=11)
    params = SolveParams(time_limit_seconds=60, num_threads=2, seed=9)
    assert solve(problem, params).placement == solve(problem, params).placement


def test_sizes_near_the_limit_do_not_overflow():
    big = 2**62
    problem = Problem(requests=tuple(Request(f"r{k}", 0, 2, big + k) for k in range(5)))
    solution = solve(problem, PARAMS)
    assert solution.status is Status.OPTIMAL
    assert solution.peak == 5 * big + 10


def test_the_time_limit_is_hard_and_the_best_so_far_is_returned():
    problem = random_requests(1500, seed=2, max_size=1000)
    solution = solve(problem, SolveParams(time_limit_seconds=0.5))
    assert solution.seconds < 2.0
    assert solution.status in (Status.FEASIBLE, Status.OPTIMAL)
    validate(problem, solution.placement.offsets)


def test_a_hint_is_never_made_worse():
    problem = random_requests(200, seed=8)
    first = solve(problem, SolveParams(time_limit_seconds=1)).placement
    again = solve(problem, SolveParams(time_limit_seconds=0.2), hint=first)
    assert again.peak <= first.peak


def test_progress_is_told():
    told = []
    solve(planted_packing(80, seed=2), PARAMS, progress=told.append)
    assert told
    assert told[-1].peak == told[-1].lower_bound


def test_thousands_of_sections_stay_within_the_time():
    requests = tuple(Request(f"r{k}", 2 * k, 2 * k + 1, 5 + k % 3) for k in range(5_000))
    solution = solve(Problem(requests=requests), SolveParams(time_limit_seconds=30, num_threads=2))
    assert (solution.status, solution.peak) == (Status.OPTIMAL, 7)
    assert solution.seconds < 10


def test_few_requests_without_the_compiled_search_keep_the_time_limit():
    # Alignments that no placement can meet below twice the load: the repair would go on for a minute.
    huge = 2**63
    problem = Problem(requests=(Request("a", 0, 4, 3, huge - 1), Request("b", 0, 4, 3, huge - 2)))
    start = time.monotonic()
    solution = solve(problem, SolveParams(time_limit_seconds=1.0, native=Switch.OFF, cpsat=Switch.OFF))
    assert time.monotonic() - start < 3.0
    assert solution.peak >= huge


def test_ctrl_c_during_the_last_validation_keeps_the_placement(monkeypatch):
    calls = []

    def validate_once_interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        validate(*arguments)

    monkeypatch.setattr("memo_solver.engine.validate", validate_once_interrupted)
    solution = solve(planted_packing(30, seed=1), PARAMS)
    assert (solution.interrupted, len(calls)) == (True, 2)
    assert solution.placement is not None


def test_an_undecided_search_has_a_time_of_its_own():
    problem = loose_packing(150, seed=5, slack=0.05)
    solution = solve(problem, SolveParams(time_limit_seconds=2.0, native=Switch.OFF, cpsat=Switch.OFF))
    assert "exact search and repair" in [stage.name for stage in solution.stages]
