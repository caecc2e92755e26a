import pytest

from memo_solver import Placement, Problem, Request, Solution, Status
from memo_solver.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("", 0, 1, 1), "id"),
        ((3, 0, 1, 1), "id"),
        (("a", 2, 1, 1), "upper"),
        (("a", 0, 1, -1), "negative"),
        (("a", 0, 1, 2**63), "64 bits"),
        (("a", 0, 1, 1, 0), "alignment"),
        (("a", 0, 1, 1.5), "integer"),
        (("a", 0, True, 1), "integer"),
    ],
)
def test_a_request_refuses_what_no_placement_can_honour(arguments, word):
    with pytest.raises(InputError, match=word):
        Request(*arguments)


def test_a_problem_refuses_duplicate_ids_and_a_capacity_below_the_largest_request():
    with pytest.raises(InputError, match="more than one"):
        Problem(requests=(Request("a", 0, 1, 1), Request("a", 0, 1, 1)))
    with pytest.raises(InputError, match="at least 5"):
        Problem(requests=(Request("a", 0, 1, 5),), capacity=4)
    with pytest.raises(InputError, match="capacity"):
        Problem(requests=(), capacity=-1)


def test_the_gap_is_over_the_lower_bound():
    problem = Problem(requests=(Request("a", 0, 1, 10),))
    placement = Placement(problem=problem, offsets=(1,))
    solution = Solution(status=Status.FEASIBLE, placement=placement, lower_bound=10)
    assert solution.peak == 11
    assert solution.gap == pytest.approx(0.1)
    assert Solution(status=Status.UNKNOWN, placement=None, lower_bound=10).gap is None
