import logging

import pytest

from memo_solver import Problem, Request, SolveParams, Status, solve_bilevel, validate
from memo_solver.bilevel import Block, Iteration, flatten
from memo_solver.cyclic import unroll
from memo_solver.errors import InputError
from memo_solver.training import layered_step

PARAMS = SolveParams(time_limit_seconds=6, num_threads=2)


@pytest.mark.parametrize("num_wrapping", [0, 6])
def test_a_layered_step_is_never_above_the_flat_heuristic(num_wrapping):
    blocks, iteration = layered_step(1500, seed=1, num_layers=8, num_across=30, num_wrapping=num_wrapping)
    result = solve_bilevel(blocks, iteration, PARAMS)
    requests = flatten(blocks, iteration)
    solution = result.solution
    assert result.num_distinct_blocks == 2
    assert solution.peak <= result.flat_peak
    assert solution.peak <= result.rectangle_peak
    assert solution.peak >= solution.lower_bound
    assert solution.placement.problem.requests == requests
    offsets = solution.placement.by_id()
    pieces = unroll(requests, iteration.period)
    owner = {p: name for names in (pieces.heads, pieces.tails) for name, p in names.items()}
    validate(pieces.problem, [offsets[owner.get(r.id, r.id)] for r in pieces.problem.requests])
    assert len(pieces.heads) == num_wrapping


def test_room_inside_the_rectangles_is_won_back():
    # The block is an L: a tall moment, then a low one during which the long request starts.
    block = (Request("tall", 0, 2, 8), Request("low", 0, 6, 2))
    blocks = [Block(id=f"f{k}", lower=6 * k, upper=6 * k + 6, requests=block) for k in range(3)]
    iteration = Iteration(requests=tuple(Request(f"x{k}", 6 * k + 3, 6 * k + 5, 8) for k in range(3)))
    result = solve_bilevel(blocks, iteration, PARAMS)
    assert result.rectangle_peak >= result.solution.peak
    assert (result.solution.status, result.solution.peak) == (Status.OPTIMAL, 10)


def test_requests_that_wrap_keep_one_address_over_the_boundary():
    iteration = Iteration(
        requests=(Request("w", 8, 13, 4), Request("v", 9, 11, 2), Request("a", 0, 3, 5), Request("b", 3, 9, 5)),
        period=10,
    )
    result = solve_bilevel([], iteration, PARAMS)
    offsets = result.solution.placement.by_id()
    assert result.solution.peak == 11
    assert not offsets["w"] <= offsets["a"] < offsets["w"] + 4
    assert not offsets["w"] <= offsets["b"] < offsets["w"] + 4


def test_a_request_longer_than_the_period_is_refused():
    with pytest.raises(InputError, match="at most one period"):
        unroll((Request("a", 1, 12, 1),), 10)
    with pytest.raises(InputError, match="leaves the window"):
        Block(id="f", lower=0, upper=3, requests=(Request("a", 0, 4, 1),))


def test_level_one_is_cached_by_content(tmp_path, caplog):
    blocks, iteration = layered_step(400, seed=2, num_layers=4, num_across=10)
    first = solve_bilevel(blocks, iteration, PARAMS, cache_dir=tmp_path)
    again = solve_bilevel(blocks, iteration, PARAMS, cache_dir=tmp_path)
    assert (first.num_cached_blocks, again.num_cached_blocks) == (0, 2)
    assert again.rectangle_peak == first.rectangle_peak
    for entry in tmp_path.iterdir():
        entry.write_text(entry.read_text().replace('"offsets": [', '"offsets": [1, '))
    with caplog.at_level(logging.WARNING, logger="memo_solver"):
        damaged = solve_bilevel(blocks, iteration, PARAMS, cache_dir=tmp_path)
    assert damaged.num_cached_blocks == 0
    assert "ignored" in caplog.text


def test_a_capacity_is_answered():
    iteration = Iteration(requests=(Request("a", 0, 3, 5), Request("b", 1, 3, 5)), capacity=9)
    assert solve_bilevel([], iteration, PARAMS).solution.status is Status.INFEASIBLE
    fits = Iteration(requests=iteration.requests, capacity=10)
    solution = solve_bilevel([], fits, PARAMS).solution
    assert solution.status is Status.OPTIMAL
    validate(Problem(requests=fits.requests), solution.placement.offsets)


def test_alignments_without_a_common_multiple_of_64_bits_get_the_flat_placement():
    huge = 2**62
    requests = (Request("p", 0, 1, 3, huge - 1), Request("q", 0, 1, 3, huge - 3), Request("r", 0, 1, 5))
    params = SolveParams(time_limit_seconds=0.5, num_threads=2)
    result = solve_bilevel([Block(id="b", lower=0, upper=1, requests=requests)], Iteration(requests=()), params)
    assert result.rectangle_peak is None
    assert result.solution.peak == result.flat_peak
    validate(result.solution.placement.problem, result.solution.placement.offsets)
    assert any("block 'b' as a whole" in stage.note for stage in result.solution.stages)


def test_a_block_higher_than_64_bits_gets_the_flat_placement():
    requests = tuple(Request(f"r{k}", 0, 1, 2**62) for k in range(3))
    result = solve_bilevel([Block(id="b", lower=0, upper=1, requests=requests)], Iteration(requests=()), PARAMS)
    assert (result.rectangle_peak, result.solution.peak) == (None, 3 * 2**62)


def test_ids_of_users_do_not_meet_those_that_are_made():
    """Pseudo-requests are called 'block x' and pieces 'x@start': a user may call requests just so."""
    blocks = [Block(id="x", lower=0, upper=2, requests=(Request("r", 0, 2, 2),))]
    names = ("block x", "w@start", "w@end", "w@start'", "block x'")
    iteration = Iteration(requests=(Request("w", 8, 13, 4), *(Request(n, 4, 6, 1) for n in names)), period=10)
    solution = solve_bilevel(blocks, iteration, PARAMS).solution
    assert solution.peak == 6
    assert set(solution.placement.by_id()) == {"x/r", "w", *names}
    assert set(solution.proof.request_ids) <= {"x/r", "w", *names}


@pytest.mark.parametrize("period", [0, -3, 2.5, True, "10"])
def test_a_period_that_is_no_number_of_moments_is_refused(period):
    with pytest.raises(InputError, match="period must be an integer of at least 1"):
        Iteration(requests=(), period=period)
