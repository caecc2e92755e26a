import pytest

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.names import NAMES, ContenderError, parse_contenders


def labels(*given, **named):
    return [entry.label for entry in parse_contenders(*given, **named)]


def test_every_name_is_a_contender():
    assert set(NAMES) == set(CONTENDERS)


def test_memo_runs_with_the_peak_of_another_before_it_runs_without():
    found = labels("kernels,selective,memo-auto,memo-none,checkpoint", budget_from="selective")
    assert found == ["kernels", "selective", "memo-auto@selective", "memo-auto", "memo-none", "checkpoint"]
    assert labels("selective, memo-swap@selective") == ["selective", "memo-swap@selective"]


def test_memo_runs_with_a_budget_of_its_own():
    entries = parse_contenders("selective,memo-tiled@24GiB,memo-tiled", budget_from="selective")
    assert [entry.label for entry in entries] == ["selective", "memo-tiled@24GiB", "memo-tiled@selective", "memo-tiled"]
    assert [entry.budget for entry in entries] == [None, 24 << 30, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "contender 'nonsense' is unknown; there are: kernels, unwrapped"),
        ("memo-auto@nonsense", "contender 'nonsense' is unknown"),
        ("memo-auto@24GiBi", "'memo-auto@24GiBi': '24GiBi'"),
        ("checkpoint@24GiB", "checkpoint takes no budget"),
        ("selective,checkpoint@selective", "checkpoint takes no budget"),
        ("memo-auto@selective,selective", "takes its budget from selective, which has to run before it"),
        ("unwrapped,unwrapped", "'unwrapped' is named twice"),
        (" , ", "no contender is named"),
    ],
)
def test_what_cannot_run_is_refused(text, message):
    with pytest.raises(ContenderError, match=message):
        parse_contenders(text)
