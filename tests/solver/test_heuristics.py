import pytest

from memo_solver import SolveParams, solve, validate
from memo_solver.native import native_status
from memo_solver.params import Switch
from memo_solver.pipelined import pipelined_trace


@pytest.mark.skipif(not native_status().available, reason="needs the compiled search")
@pytest.mark.parametrize("routed", [False, True])
def test_a_pipeline_with_many_micro_batches_ends_near_the_load(routed):
    # Orders by contention or size, which suit a spike, waste 8 to 20 % of this.
    problem = pipelined_trace(16, 16, seed=1, routed=routed)
    assert len(problem.requests) == 16 * 16 * 19
    solution = solve(problem, SolveParams(time_limit_seconds=20, num_threads=2, exact=Switch.OFF))
    validate(problem, solution.placement.offsets)
    assert solution.gap < 0.005


@pytest.mark.skipif(not native_status().available, reason="needs the compiled search")
def test_the_same_seed_gives_the_same_placement_of_a_large_trace():
    problem = pipelined_trace(8, 8, seed=2, routed=True)
    params = SolveParams(time_limit_seconds=60, num_threads=2, exact=Switch.OFF)
    assert solve(problem, params).placement == solve(problem, params).placement
