import pytest

from benchmarks.harness.timing import percentiles, predicted_seconds, step_counts


@pytest.mark.parametrize(
    ("tokens", "steady", "warm"),
    [(1024, 5, 2), (65_536, 5, 2), (65_537, 3, 1), (131_072, 3, 1), (131_073, 1, 1), (2**20, 1, 1)],
)
def test_long_steps_are_measured_less_often(tokens, steady, warm):
    assert step_counts(tokens) == (steady, warm)


def test_a_cap_bounds_both():
    assert step_counts(1024, 2) == (2, 2)
    assert step_counts(131_072, 2) == (2, 1)


def test_percentiles_lie_within_what_was_measured():
    assert percentiles([3.0, 1.0, 2.0]) == {
        "step_seconds": 2.0,
        "p20": pytest.approx(1.4),
        "p80": pytest.approx(2.6),
        "n": 3,
    }
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0])["p20"] == pytest.approx(1.8)
    assert percentiles([4.0]) == {"step_seconds": 4.0, "p20": 4.0, "p80": 4.0, "n": 1}


def test_predictions_grow_with_square_and_length():
    # 7 steps of 4 times 2 s, and twice the 3 s beside them
    assert predicted_seconds(1024, 2.0, 3.0, tokens=2048, cap=None) == pytest.approx(7 * 8 + 6)
    # One step is measured, and the one before it is rehearsed.
    assert predicted_seconds(131_072, 2.0, 3.0, tokens=262_144, cap=None) == pytest.approx(8 + 6)
