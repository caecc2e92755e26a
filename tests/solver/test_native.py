"""The compiled searches against their Python twins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memo_solver import Problem, cpsat, first_fit, native, python_search
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
        order = heuristic_order(section, name)
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
