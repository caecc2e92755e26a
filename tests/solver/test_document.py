import pytest

from benchmarks.solver import document
from benchmarks.solver.table import read_rows

PROVENANCE = {
    "cpu": "A CPU", "commit": "c0ffee0000", "threads": 2, "workers": 7, "load_average": 0.5, "python": "3.12.1",
    "versions": {"ortools": "9.15", "omnimalloc": "1.0.0", "pulp": "3.3.2"},
}  # fmt: skip


def row(section, group, instance, contender, limit=15.0, **values):
    names = {"section": section, "group": group, "instance": instance, "contender": contender}
    return {**names, "limit_seconds": limit, "provenance": PROVENANCE, **values}


ROWS = [
    row("planted-small", "planted", "seed 0", "memo_solver", solved=False, seconds=15.0),
    row("planted-small", "planted", "seed 0", "memo_solver", solved=True, seconds=0.25),
    row("planted-small", "planted", "seed 1", "memo_solver", solved=False, seconds=15.0),
    row("planted-small", "planted", "seed 0", "cp-sat", solved=False, seconds=15.0),
    row("traces", "trace", "a", "memo_solver", waste=0.00125, seconds=8.5, peak_rss_mib=90, num_requests=20000),
    row("traces", "trace", "a", "omnimalloc omni", waste=None, seconds=60.0, peak_rss_mib=None, num_requests=20000),
    row("layered", "step", "80 layers", "memo_solver bi-level", 3.0, num_requests=51960, ratio=1.002, seconds=2.1,
        flat_heuristic_ratio=1.003, rectangle_ratio=1.01),
    row("layered", "block", "block f0", "memo_solver and MIP", 40.0, num_requests=12, lower_bound=10,
        memo_solver_peak=10, memo_solver_status="optimal", memo_solver_seconds=0.004, mip_peak=20,
        mip_status="feasible", mip_seconds=40.1),
    row("refused", "load", "20 seeds", "memo_solver", num_instances=37, num_refused_with_proof=37, seconds_max=0.07),
    row("fuzz", "files", "100 files", "memo_solver readers", num_read=10, num_refused=90, num_crashed=0),
    row("fuzz", "files", "200 files", "memo_solver readers", error="killed"),
]  # fmt: skip


def test_every_kind_of_row_has_its_line_and_the_last_row_of_a_job_counts():
    made = document.text(ROWS)
    for line in (
        "| planted | 15 s | memo_solver | 1 of 2 | 0.25 s | 0.25 s |",
        "| planted | 15 s | cp-sat | 0 of 1 | - | - |",
        "| a | 20,000 | 0.125 % | 8.5 s | 90 MiB | none | 60.0 s |",
        "| 80 layers | 1.0020 | 2.1 s | 1.0030 | 1.0100 |",
        "| block f0 | 12 | 1.000 (optimal) | 0.004 s | 2.000 (feasible) | 40.1 s |",
    ):
        assert line + "\n" in made
    assert "37 of 37 instances" in made
    assert "100 mutated files, 90 refused and 10 read, none crashed" in made
    assert "commit c0ffee000." in made


def test_only_what_stands_between_the_marks_is_replaced():
    before = f"head\n{document.BEGIN}old\n{document.END}tail\n"
    assert document.replaced(before, "new\n") == f"head\n{document.BEGIN}new\n{document.END}tail\n"


@pytest.mark.skipif(not document.ROWS.exists(), reason="the document still shows rows of the older files")
def test_the_figures_of_the_document_are_those_of_the_rows():
    shown = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.replaced(shown, document.text(read_rows(document.ROWS), read_rows(document.PUBLISHED))) == shown


def test_the_document_has_its_marks():
    shown = document.DOCUMENT.read_text(encoding="utf-8")
    assert (shown.count(document.BEGIN), shown.count(document.END)) == (1, 1)
