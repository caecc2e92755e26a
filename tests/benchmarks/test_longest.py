"""The search for the longest length: how close it comes, how many rehearsals it takes, what ends it."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.longest import PRECISION, next_lengths
from benchmarks.harness.rehearsing import rehearse
from benchmarks.harness.rows import RowError, read_rows
from benchmarks.harness.runner import main
from benchmarks.harness.table import run_table
from benchmarks.harness.worker import walk
from memo_runtime.errors import RehearsalError
from tests.benchmarks.test_table import row

FIRST, LAST, MEMORY = 131_072, 4_194_304, 80_000_000_000


def search(peak, *, first=FIRST, last=LAST):
    """(rows, number of processes) of a search on a contender whose peak is ``peak`` of the length."""
    rows, processes = [], 0
    while lengths := next_lengths(rows, first, last):
        processes += 1
        assert list(lengths) == sorted(set(lengths))
        assert not set(lengths) & {one["seq_len"] for one in rows}
        for tokens in lengths:
            fits = peak(tokens) <= MEMORY
            facts = {"status": "ok", "peak_allocated": peak(tokens)} if fits else {"status": "oom", "error": "x"}
            rows.append({"seq_len": tokens, "details": {"memory": MEMORY}, **facts})
            if not fits:
                break
    return rows, processes


def longest(rows):
    return max((one["seq_len"] for one in rows if one["status"] == "ok"), default=0)


@pytest.mark.parametrize("limit", [140_000, 262_144, 525_000, 1_930_000])
def test_peaks_on_a_line_are_found_in_a_few_rehearsals(limit):
    rows, processes = search(lambda tokens: int(5e9 + (MEMORY - 5e9) * tokens / limit))
    assert longest(rows) <= limit <= longest(rows) * (1 + PRECISION)
    assert processes <= 7
    assert len(rows) <= 12


@pytest.mark.parametrize("limit", [140_000, 1_930_000])
def test_a_runtime_that_fills_its_budget_at_any_length_is_found_by_halves(limit):
    rows, _ = search(lambda tokens: MEMORY if tokens <= limit else MEMORY + 1)
    assert longest(rows) <= limit <= longest(rows) * (1 + PRECISION)
    assert len(rows) <= 14


def test_what_ends_a_search():
    assert next_lengths([], 48, 192) == (48, 96, 192)
    assert longest(search(lambda tokens: 1)[0]) == LAST
    assert [one["seq_len"] for one in search(lambda tokens: MEMORY + 1)[0]] == [FIRST]
    assert next_lengths([{"seq_len": 48, "status": "error"}], 48, 192) == ()
    # One that began at a length that did not fit goes on below it.
    assert next_lengths([{"seq_len": 192, "status": "oom"}], 48, 768) == (48, 96)
    assert next_lengths([{"seq_len": 192, "status": "oom"}], 48, 96) == (48, 96)
    assert next_lengths([{"seq_len": 192, "status": "oom"}], 192, 768) == ()
    rows, _ = search(lambda tokens: MEMORY * tokens // 77, first=16, last=512)
    assert longest(rows) in (76, 77)


def test_a_rehearsed_run(in_process, arguments, capsys):
    given = arguments("unwrapped,checkpoint", "--rehearse", lengths="48,96")
    assert main(given) == 0
    assert main(given) == 0
    assert [(job.contender, job.lengths) for job in in_process] == [
        ("unwrapped", (48, 96)), ("checkpoint", (48, 96)),
    ]  # fmt: skip
    rows, _ = read_rows(Path(given[given.index("--out") + 1]))
    assert all(one["rehearsed"] and one["status"] == "ok" and one["step_seconds"] is None for one in rows)
    assert [one["details"]["replaced"]["cpu"][1] for one in rows] == [2] * 4
    peaks = {(one["contender"], one["seq_len"]): one["peak_allocated"] for one in rows}
    assert peaks["checkpoint", 96] < peaks["unwrapped", 96]
    assert "longest length by rehearsal (attention replaced)" in capsys.readouterr().out
    # A real step is no row of this run.
    assert main(arguments("unwrapped", lengths="48,96")) == 2
    assert "was measured with config" in capsys.readouterr().err


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if "+" in name or name.startswith("mem") else [])
    if name != "memo-auto" else name
    for name in sorted(set(CONTENDERS) - {"kernels"})
])  # fmt: skip
def test_every_contender_is_rehearsed_through_its_interface(make_job, name):
    """With the same stand-ins in as many calls as its real step would make; longer sequences take more."""
    job = make_job(name, (256, 512), blocks=2)
    out = io.StringIO()
    walk(replace(job, settings=replace(job.settings, rehearse=True)), out)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    if rows[0]["status"] == "skipped":
        pytest.skip(rows[0]["error"])
    assert [(row["seq_len"], row["status"], row.get("error")) for row in rows] == [(256, "ok", None), (512, "ok", None)]
    assert rows[0]["peak_allocated"] < rows[1]["peak_allocated"]
    for one in rows:
        (calls,) = one["details"]["replaced"].values()
        assert calls[0] >= calls[1] == 2


def test_a_real_step_of_each_at_its_longest(in_process, arguments, capsys, monkeypatch):
    assert main(arguments("checkpoint", "--rehearse", lengths="48,96")) == 0
    assert main(arguments("unwrapped,checkpoint", "--rehearse", lengths="48,96")) == 0
    given = arguments("checkpoint,unwrapped", "--confirm", "test", "--run", "real")
    at = given.index("--lengths")
    given[at : at + 2] = []
    path = Path(given[given.index("--out") + 1])
    # As if unwrapped had not reached 96.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1] |= {"status": "oom", "error": "no"}
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert main(given) == 0
    assert main(given) == 0
    real = [one for one in read_rows(path)[0] if one["run"] == "real"]
    assert [(one["contender"], one["seq_len"], one["n"], one["rehearsed"]) for one in real] == [
        ("checkpoint", 96, 1, False), ("unwrapped", 48, 1, False),
    ]  # fmt: skip
    for wrong, said in (
        (["--confirm", "nonsense"], "has no rehearsed run of that name"),
        (["--confirm", "real"], "has no rehearsed run of that name"),
        (["--dtype", "float64"], "it was rehearsed with dtype = 'float32', here it is 'float64'"),
        (["--scope", "step"], "it was rehearsed with scope = 'blocks', here it is 'step'"),
        (["--contenders", "selective"], "selective reached no length there; checkpoint, unwrapped did"),
        (["--lengths", "48"], "give --lengths, such as 16K,32K, or --confirm RUN"),
        (["--rehearse"], "leave --rehearse out"),
        ([], "it was rehearsed with allocator = None, here it is 'expandable_segments:True'"),
    ):
        if not wrong:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*given, *wrong])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_a_contender_whose_attention_is_not_replaced_is_refused(make_job, monkeypatch):
    job = make_job("unwrapped", (64,), attention="math")
    job = replace(job, settings=replace(job.settings, rehearse=True))
    with pytest.raises(RehearsalError, match="unwrapped calls none of the kernels of attention"):
        rehearse(CONTENDERS["unwrapped"](job), job, 64)


def test_an_interrupted_search_goes_on_where_it_stopped(in_process, arguments):
    given = arguments("checkpoint,unwrapped", "--rehearse", lengths="48,96")
    path = Path(given[given.index("--out") + 1])
    assert main(given) == 0
    whole = path.read_text().splitlines(keepends=True)
    before = [(row["contender"], row["seq_len"]) for row in map(json.loads, whole)]
    for kept in (1, 2):
        path.write_text("".join(whole[:kept]) + whole[kept][:50])
        in_process.clear()
        assert main(given) == 0
        rows, _ = read_rows(path)
        assert [(row["contender"], row["seq_len"]) for row in rows] == before
        assert [(job.contender, tokens) for job in in_process for tokens in job.lengths] == before[kept:]


def test_a_table_of_rehearsals_has_no_times_and_no_real_rows():
    rows = [
        row("memo-auto", 1_048_576, peak=70 * 2**30, status="ok", rehearsed=True),
        row("memo-auto", 2_097_152, status="oom", error="OutOfMemoryError: tried to allocate", rehearsed=True),
        row("unwrapped", 131_072, status="oom", error="OutOfMemoryError: no", rehearsed=True),
    ]
    lines = run_table(rows).splitlines()
    assert next(line.split() for line in lines if line.startswith("memo-auto ")) == [
        "memo-auto", "1,048,576", "2,097,152", "70.00",
    ]  # fmt: skip
    assert next(line.split() for line in lines if line.startswith("unwrapped ")) == ["unwrapped", "none", "131,072"]
    assert lines[-1] == "unwrapped at 131,072: oom, OutOfMemoryError: no"
    skipped = row("liger", 131_072, status="skipped", error="SkippedError: no", rehearsed=True)
    lines = run_table([*rows, skipped]).splitlines()
    assert next(line.split() for line in lines if line.startswith("liger ")) == ["liger", "none", "skipped"]
    assert lines[-1] == "liger at 131,072: skipped, SkippedError: no"
    with pytest.raises(RowError, match="has rehearsed rows and real ones"):
        run_table([*rows, row("checkpoint", 64, 1.0)])


@pytest.mark.parametrize(
    ("given", "lengths", "said"),
    [
        (["unwrapped"], "48,96,192", "--lengths has 3, and takes two"),
        (["kernels,unwrapped"], "48,96", "kernels trains nothing that could be rehearsed"),
        (["unwrapped,memo-auto@unwrapped"], "48,96", "give bytes, memo-auto@24GiB"),
        (["unwrapped", "--traces", "x"], "48,96", "leave --traces out"),
    ],
)
def test_what_does_not_go_with_a_rehearsal(arguments, capsys, given, lengths, said):
    with pytest.raises(SystemExit) as ended:
        main(arguments(*given, "--rehearse", lengths=lengths))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
