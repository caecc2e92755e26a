"""The compiled searches against their Python twins."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_solver import Problem, Request, cpsat, first_fit, native, python_search
from memo_solver.bounds import contention
from memo_solver.instances import planted_packing, random_requests
from memo_solver.orders import exact_orders, heuristic_names, heuristic_order
from memo_solver.outcome import Outcome, StopFlag
from memo_solver.sections import split
from memo_solver.validator import find_violation
from tests.solver.problems import problems

pytestmark = pytest.mark.skipif(not native.native_status().available, reason="needs the compiled search")
LONG = {"stop": StopFlag(), "seconds": 60.0}


def placed(problem, section, offsets, capacity):
    """Whether the offsets of a section are right by the independent validator."""
    requests = tuple(problem.requests[i] for i in section.index)
    return find_violation(
        Problem(requests=requests), [o * section.unit for o in offsets], capacity=capacity * section.unit
    )


@pytest.mark.parametrize("name", heuristic_names())
@pytest.mark.parametrize("num_fixed", [0, 5])
@pytest.mark.parametrize("alignment", [1, 8])
def test_repair_gives_the_same_placement_as_its_twin(name, num_fixed, alignment):
    problem = random_requests(80, seed=3, max_alignment=alignment)
    for section in split(problem):
        order = heuristic_order(section, name, contention(section))
        limits = {"num_fixed": num_fixed, "target": 0, "max_passes": 20, "seed": 5, **LONG}
        compiled = native.NativeSection(section).squeaky_wheel(order, **limits)
        assert compiled == first_fit.squeaky_wheel(section, order, **limits)
        assert placed(problem, section, compiled.offsets, 10**9) is None


@settings(max_examples=150, deadline=None)
@given(problem=problems(max_requests=8, max_alignment=3), slack=st.integers(-1, 2))
def test_exact_searches_agree(problem, slack):
    for section in split(problem):
        capacity = max(section.loads()) + slack
        compiled = native.NativeSection(section)
        order = exact_orders(section)[0]
        limits = {"capacity": capacity, "max_nodes": 10**6, **LONG}
        expected = python_search.canonical_search(section, order, **limits)
        results = [compiled.canonical_search(order, **limits) for order in exact_orders(section)]
        if all(alignment == 1 for alignment in section.alignment):
            results += [compiled.valley_search(seed=seed, **limits) for seed in (0, 1)]
        for result in results:
            assert result.outcome is expected.outcome
            if result.offsets is not None:
                assert placed(problem, section, result.offsets, capacity) is None


def full_loads(seed):
    """Requests that fill the load to the brim with no packing behind it; a few seeds cannot be packed."""
    rng = random.Random(seed)
    num_times, height, num_requests = rng.randint(4, 9), rng.randint(5, 9), rng.randint(8, 16)
    load, requests = [0] * num_times, []
    for _ in range(400):
        lower = rng.randrange(num_times)
        upper = min(num_times, lower + rng.randint(1, 4))
        size = min(rng.randint(1, 4), height - max(load[lower:upper]))
        if size > 0 and len(requests) < num_requests:
            load[lower:upper] = [value + size for value in load[lower:upper]]
            requests.append(Request(f"r{len(requests)}", lower, upper, size))
    return Problem(requests=tuple(requests))


UNPACKABLE = (302, 3964, 5210, 5801, 6271, 9302, 9571, 10272, 10701, 12619, 14860, 15261, 16624, 16898, 17363, 17501)


def test_valley_search_refuses_and_finds_what_the_canonical_search_does():
    counts = Counter()
    for seed in (*range(300), *UNPACKABLE):
        for section in split(full_loads(seed)):
            limits = {"capacity": max(section.loads()), "max_nodes": 10**6, **LONG}
            compiled = native.NativeSection(section)
            expected = compiled.canonical_search(exact_orders(section)[0], **limits)
            for search_seed in (0, 3):
                found = compiled.valley_search(seed=search_seed, **limits)
                assert found.outcome is expected.outcome, seed
            counts[expected.outcome] += 1
    assert counts[Outcome.INFEASIBLE] == len(UNPACKABLE)
    assert counts[Outcome.FOUND] >= 300


@pytest.mark.parametrize(("num_requests", "seed"), [(149, 0), (179, 5)])
def test_coarse_packings_are_solved_within_few_nodes(num_requests, seed):
    # Without the chains of list_links 300,000 nodes are not enough for either.
    problem = planted_packing(num_requests, seed=seed, width=60, height=100)
    (section,) = split(problem)
    limits = {"capacity": problem.capacity // section.unit, "max_nodes": 100_000, **LONG}
    found = native.NativeSection(section).valley_search(seed=0, **limits)
    assert found.outcome is Outcome.FOUND
    assert placed(problem, section, found.offsets, limits["capacity"]) is None


def test_cpsat_agrees_with_the_canonical_search():
    for seed in range(12):
        problem = random_requests(9, seed=seed, horizon=6, max_size=5, max_alignment=4)
        for section in split(problem):
            for capacity in range(max(section.loads()) - 1, max(section.loads()) + 3):
                limits = cpsat.CpSatLimits(seconds=60)
                found = cpsat.search(section, capacity=capacity, limits=limits, stop=StopFlag())
                expected = python_search.canonical_search(
                    section, exact_orders(section)[0], capacity=capacity, max_nodes=10**7, **LONG
                )
                assert found.outcome is expected.outcome
                if found.offsets is not None:
                    assert placed(problem, section, found.offsets, capacity) is None


def test_limits_and_flags_end_a_search():
    (section,) = split(planted_packing(40, seed=1, width=50, height=50))[:1]
    compiled = native.NativeSection(section)
    order = exact_orders(section)[0]
    capacity = max(section.loads())
    few = compiled.valley_search(capacity=capacity, seed=0, max_nodes=1, **LONG)
    assert few.outcome is Outcome.LIMIT
    flag = StopFlag()
    flag.set()
    stopped = compiled.squeaky_wheel(
        order, num_fixed=0, target=0, max_passes=10**9, seed=0, stop=flag, seconds=60
    )
    assert stopped.effort <= 2
