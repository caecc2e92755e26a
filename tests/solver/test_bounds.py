from hypothesis import given, settings

from memo_solver.bounds import ReachableHeights, contention, load_bound
from memo_solver.sections import split
from tests.solver.brute_force import optimum, peak_load
from tests.solver.problems import problems


@settings(max_examples=150, deadline=None)
@given(problems(max_requests=6, max_alignment=4))
def test_bounds_never_exceed_the_optimum(problem):
    bounds = [load_bound(section).bound * section.unit for section in split(problem)]
    assert peak_load(problem) <= max(bounds, default=0) <= optimum(problem)


@settings(max_examples=150, deadline=None)
@given(problems(max_requests=7))
def test_slots_lose_no_conflict_and_add_none(problem):
    sections = split(problem)
    place = {i: (k, s, n) for n, s in enumerate(sections) for k, i in enumerate(s.index)}
    for i, a in enumerate(problem.requests):
        for j, b in enumerate(problem.requests):
            if i == j or a.is_empty or b.is_empty:
                continue
            (p, s, n), (q, _, m) = place[i], place[j]
            meet = n == m and s.first[p] <= s.last[q] and s.first[q] <= s.last[p]
            assert meet == (a.lower < b.upper and b.lower < a.upper)


@settings(max_examples=100, deadline=None)
@given(problems(max_requests=6))
def test_the_optimum_is_a_reachable_height(problem):
    best = optimum(problem)
    for section in split(problem):
        heights = ReachableHeights(section, 2 * sum(section.size))
        for height in range(sum(section.size)):
            assert heights.at_most(heights.above(height)) == heights.above(height) or height >= best


@settings(max_examples=100, deadline=None)
@given(problems(max_requests=8))
def test_contention_is_the_highest_load_of_a_lifetime(problem):
    for section in split(problem):
        loads = section.loads()
        expected = [max(loads[f : t + 1]) for f, t in zip(section.first, section.last, strict=True)]
        assert contention(section) == expected
