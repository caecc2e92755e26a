import pytest

from tests.house import sizes


@pytest.mark.slow  # ``make test`` asks that itself
def test_nothing_is_larger_than_its_ceiling():
    assert sizes.broken() == []


def test_the_table_names_every_package():
    table = sizes.report()
    assert "memo_runtime" in table
    assert "longest functions" in table


def test_the_ninth_decile():
    assert sizes.p90([1]) == 1
    assert sizes.p90(list(range(1, 11))) == 10
    assert sizes.p90(list(range(1, 101))) == 91
