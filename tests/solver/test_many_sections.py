"""Problems that fall apart into very many sections: progress, limits and order."""

from __future__ import annotations

import random
import time
from pathlib import Path

from memo_solver import Problem, Request, SolveParams, solve, solve_bilevel
from memo_solver.bilevel import Block, Iteration
from memo_solver.reading import read_problem
from memo_solver.validator import validate


def test_progress_costs_no_more_than_the_solve():
    requests = tuple(Request(f"r{i}", i, i + 1, i % 99 + 1) for i in range(6_000))
    heard = []
    start = time.process_time()
    solution = solve(Problem(requests=requests), SolveParams(time_limit_seconds=0.1), progress=heard.append)
    # 6 s when every section counted all others.
    assert time.process_time() - start < 3
    assert solution.peak == 99
    assert heard


def hard_core(copies):
    """A section whose load cannot be reached, many times over."""
    draw = random.Random(32908)
    core = []
    for i in range(9):
        lower = draw.randint(0, 7)
        core.append(Request(f"a{i}", lower, lower + draw.randint(1, 5), draw.randint(1, 12)))
    return tuple(
        Request(f"{k}_{r.id}", r.lower + 20 * k, r.upper + 20 * k, r.size) for k in range(copies) for r in core
    )


def test_the_limit_holds_for_many_sections_without_an_answer():
    problem = Problem(requests=hard_core(1_500))
    start = time.process_time()
    solution = solve(problem, SolveParams(time_limit_seconds=0.5, num_threads=1))
    # One pass of first fit over every section has to be; 4 s more when each section began what it had no time for.
    assert time.process_time() - start < 2
    validate(problem, solution.placement.offsets)


def test_sections_of_equal_size_are_tried_in_the_order_of_time():
    """Two sections of as many requests, one whose load is excluded by search, one that first fit leaves above it."""
    problem = read_problem(Path(__file__).with_name("two_sections.csv"))
    half = len(problem.requests) // 2
    swapped = Problem(requests=problem.requests[half:] + problem.requests[:half])
    params = SolveParams(time_limit_seconds=20, num_threads=2)
    assert solve(problem, params).placement.by_id() == solve(swapped, params).placement.by_id()


def test_blocks_of_mixed_alignments_keep_each_of_them():
    """A base that is a multiple of 4 puts what needs a multiple of 3 where it must not be."""
    requests = (Request("p", 0, 1, 3, 3), Request("q", 0, 1, 1, 4), Request("r", 1, 2, 5, 3))
    blocks = [Block(id=name, lower=2 * i, upper=2 * i + 2, requests=requests) for i, name in enumerate("bc")]
    iteration = Iteration(requests=(Request("x", 0, 4, 4, 2), Request("y", 2, 4, 2)))
    solution = solve_bilevel(blocks, iteration).solution
    validate(solution.placement.problem, solution.placement.offsets)
