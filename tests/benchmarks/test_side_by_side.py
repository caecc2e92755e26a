"""Tables of runs: what is compared, what is bold, and what is never put together."""

import json

import pytest

from benchmarks.harness.names import NAMES
from benchmarks.harness.rows import RowError
from benchmarks.harness.side_by_side import ATTENTION_AGAIN, FLOOR
from benchmarks.harness.tables import find_comparisons, main, refreshed, tables
from memo_runtime.errors import OutputError
from tests.benchmarks.test_table import row

GIB = 2**30


def write(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def timed(contender, tokens, seconds, **more):
    given = {"mfu": 0.5, "pinned_bytes": GIB, "commit": "0123456789", **more}
    return row(contender, tokens, seconds, 10 * GIB, **given)


def lines_of(text):
    """First cell -> the others."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


@pytest.fixture
def rows(tmp_path):
    """One run: kernels, three others and memo at two lengths."""
    return write(
        tmp_path / "rows.jsonl",
        *(timed("kernels", tokens, 0.5) for tokens in (16384, 131072)),
        timed("unwrapped", 16384, 1.0),
        row("unwrapped", 131072, status="oom", error="OutOfMemoryError: no", commit="0123456789"),
        *(timed("selective", tokens, seconds) for tokens, seconds in ((16384, 1.2), (131072, 2.2))),
        *(timed("checkpoint", tokens, seconds) for tokens, seconds in ((16384, 1.4), (131072, 3.0))),
        *(timed("memo-auto", tokens, seconds) for tokens, seconds in ((16384, 1.1), (131072, 2.0))),
    )


def test_memo_is_set_against_the_fastest_other_and_the_fastest_that_computes_attention_again(rows):
    found = lines_of(tables([str(rows)]))
    assert found["contender"] == ["16,384", "131,072"]
    assert found["kernels (no training)"][0] == "0.50 s, 50.0 %, 10.0 + 1.0"
    assert found["unwrapped"] == ["**1.00 s, 50.0 %, 10.0 + 1.0**", "out of memory"]
    assert found["memo-auto"] == ["1.10 s, 50.0 %, 10.0 + 1.0", "**2.00 s, 50.0 %, 10.0 + 1.0**"]
    assert found["memo: times as fast as the fastest other"] == ["0.91 x unwrapped", "1.10 x selective"]
    assert found["memo: ... that computes attention again"] == ["1.27 x checkpoint", "1.50 x checkpoint"]


def test_what_is_shown_changes_no_comparison(rows):
    found = lines_of(tables([str(rows), "--contenders", "checkpoint,memo-auto", "--lengths", "128K"]))
    assert "unwrapped" not in found
    assert found["checkpoint"] == ["3.00 s, 50.0 %, 10.0 + 1.0"]
    assert found["memo: times as fast as the fastest other"] == ["1.10 x selective"]


def test_the_table_names_machine_commit_and_run(rows):
    heading = " ".join(tables([str(rows)]).split("|")[0].split())
    for part in ("NVIDIA H100 80GB HBM3", "torch 2.11.0", "commit 0123456;", "run r]", "`llama-8b`, 4 blocks, forward"):
        assert part in heading


def test_where_auto_did_not_run_through_another_policy_stands_for_memo_and_is_named(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", timed("checkpoint", 64, 3.0), timed("memo-auto@checkpoint", 64, 2.0),
        row("memo-auto", 64, status="oom", error="x", commit="0123456789"), timed("memo-swap", 64, 4.0),
    )  # fmt: skip
    found = lines_of(tables([str(path)]))
    assert found["memo: times as fast as the fastest other"] == ["memo-auto@checkpoint: 1.50 x checkpoint"]


def test_what_was_skipped_or_failed_is_below_the_table_with_the_reason(tmp_path):
    skipped = "trl-offload needs trl, not installed here: pip install trl==1.16.0"
    path = write(
        tmp_path / "rows.jsonl",
        timed("memo-auto", 64, 2.0),
        row("trl-offload", 64, status="skipped", error=f"SkippedError: {skipped}", commit="0123456789"),
        row("checkpoint", 64, status="error", error="RuntimeError: no\nmore", commit="0123456789"),
        row("unwrapped", 64, status="oom", error="OutOfMemoryError: x", commit="0123456789"),
    )
    text = tables([str(path)])
    assert text.endswith(f"|\n\n- trl-offload: skipped, {skipped}\n- checkpoint at 64: failed, RuntimeError: no\n")
    assert lines_of(text)["trl-offload"] == ["skipped"]
    assert tables([str(path), "--contenders", "memo-auto,unwrapped"]).endswith("|\n")


def test_what_was_skipped_or_failed_was_not_too_long(tmp_path):
    told = {"rehearsed": True, "status": "ok", "commit": "0123456789"}
    path = write(
        tmp_path / "rows.jsonl",
        row("memo-auto", 1 << 20, peak=75 * GIB, **told),
        row("trl-offload", 1 << 17, **{**told, "status": "skipped", "error": "SkippedError: no"}),
        row("checkpoint", 1 << 17, peak=75 * GIB, **told),
        row("checkpoint", 1 << 18, **{**told, "status": "error", "error": "RuntimeError: no"}),
    )
    text = tables([str(path)])
    found = lines_of(text)
    assert found["trl-offload"] == ["none", "skipped", ""]
    assert found["checkpoint"] == ["131,072", "failed", "75.0 + 0.0"]
    assert text.endswith("- trl-offload: skipped, no\n- checkpoint at 262,144: failed, RuntimeError: no\n")


def test_every_contender_says_whether_it_computes_attention_again():
    assert {name for name in NAMES if not name.startswith("memo-")} - {FLOOR} == set(ATTENTION_AGAIN)


def test_longest_lengths_have_their_own_table(tmp_path):
    told = {"rehearsed": True, "status": "ok", "commit": "0123456789"}
    path = write(
        tmp_path / "rows.jsonl",
        row("checkpoint", 1 << 19, peak=70 * GIB, **told),
        row("checkpoint", 1 << 20, **{**told, "status": "oom", "error": "no"}),
        row("memo-auto", 1 << 20, peak=75 * GIB, **told, pinned_bytes=100 * GIB),
    )
    found = lines_of(tables([str(path)]))
    assert found["checkpoint"] == ["524,288", "1,048,576", "70.0 + 0.0"]
    assert found["memo-auto"] == ["1,048,576", "", "75.0 + 100.0"]
    assert [name for name in found if name in ("memo-auto", "checkpoint")] == ["memo-auto", "checkpoint"]
    assert found["memo-auto against the longest other"][0] == "2.00 x checkpoint"


def rehearsed_and_real(tmp_path, **real):
    told = {"status": "ok", "commit": "0123456789"}
    rehearsed = {"device": "cuda", "attention": "cudnn", "dtype": "bfloat16", "steps": None, "rehearse": True}
    made = {**rehearsed, "steps": 1, "rehearse": False}
    return write(
        tmp_path / "rows.jsonl",
        row("checkpoint", 1 << 19, peak=70 * GIB, **told, rehearsed=True, config=rehearsed),
        row("memo-auto", 1 << 20, peak=75 * GIB, **told, rehearsed=True, config=rehearsed),
        timed("checkpoint", 1 << 19, 7.0, **{"run": "real", "config": made, **real}),
    )


def test_real_steps_stand_beside_the_lengths_that_they_confirm(tmp_path):
    path = rehearsed_and_real(tmp_path)
    text = tables([str(path), "--run", "r", "--confirmed", "real"])
    assert "one real step of that length (run real)" in " ".join(text.split())
    found = lines_of(text)
    assert found["contender"][-1] == "one real step"
    assert found["checkpoint"] == ["524,288", "", "70.0 + 0.0", "7.00 s, 50.0 %, 10.0 + 1.0"]
    assert found["memo-auto"][-1] == ""
    assert {len(cells) for cells in found.values()} == {4}


@pytest.mark.parametrize(
    ("real", "asked", "said"),
    [
        ({}, ["--run", "r", "--confirmed", "none"], "no rows of run 'none'; there are: r, real"),
        ({}, ["--run", "real", "--confirmed", "real"], "real steps beside rehearsals; 'real' is the other kind"),
        ({}, ["--run", "r", "--confirmed", "r"], "real steps beside rehearsals; 'r' is the other kind"),
        ({"commit": "9876543210"}, ["--run", "r", "--confirmed", "real"], "commit is '9876543210' there and"),
        (
            {"config": {"device": "cuda", "attention": "flash", "dtype": "bfloat16"}},
            ["--run", "r", "--confirmed", "real"],
            "attention is 'flash' there and 'cudnn' in 'r'",
        ),
        ({}, ["--run", "r", "--confirmed", "real", "--full"], "--full has no place for --confirmed"),
    ],
)
def test_only_real_steps_of_the_same_settings_confirm(tmp_path, capsys, real, asked, said):
    assert main([str(rehearsed_and_real(tmp_path, **real)), *asked]) == 2
    assert said in capsys.readouterr().err


def test_runs_and_machines_are_never_in_one_table(tmp_path):
    one, other = write(tmp_path / "a", timed("unwrapped", 64, 1.0)), write(
        tmp_path / "b", timed("memo-auto", 64, 0.5, gpu="NVIDIA H200")
    )
    text = tables([str(one), str(other)])
    assert text.count("| contender |") == 2
    assert lines_of(text)["memo: times as fast as the fastest other"] == ["-"]
    assert "H100" not in tables([str(one), str(other), "--gpu", "NVIDIA H200"])
    mixed = write(tmp_path / "c", timed("unwrapped", 64, 1.0), timed("memo-auto", 64, 0.5, gpu="NVIDIA H200"))
    with pytest.raises(RowError, match="rows with gpu = 'NVIDIA H100 80GB HBM3' and 'NVIDIA H200', which"):
        find_comparisons([mixed])
    with pytest.raises(RowError, match="two rows of unwrapped at 64"):
        find_comparisons([write(tmp_path / "d", timed("unwrapped", 64, 1.0), timed("unwrapped", 64, 1.0))])
    rehearsed = timed("memo-auto", 64, None, status="ok", rehearsed=True)
    both = write(tmp_path / "e", timed("unwrapped", 64, 1.0), rehearsed)
    with pytest.raises(RowError, match="which are not comparable"):
        find_comparisons([both])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--run", "s"], "no rows of run 's'; there are: r"),
        (["--gpu", "h200"], "no rows of GPU 'h200'; there are: NVIDIA H100 80GB HBM3"),
        (["--lengths", "16K,3K"], "no rows of length 3072; there are: 16384, 131072"),
        (["--lengths", "many"], "'many' is not a token count"),
        (["--contenders", "trl"], "no rows of contender 'trl'; there are: checkpoint, kernels,"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(rows, capsys, more, said):
    assert main([str(rows), *more]) == 2
    assert said in capsys.readouterr().err


def test_bad_files_are_refused(tmp_path, capsys):
    other = write(tmp_path / "rows.jsonl", timed("unwrapped", 64, 1.0), timed("unwrapped", 128, 1.0) | {"schema": 9})
    for path, said in (
        (tmp_path / "none.jsonl", "there is no such file of rows"),
        (other, "rows.jsonl:2 has schema 9, this harness reads and writes 1: they are not mixed"),
        (write(tmp_path / "empty.jsonl"), "no rows in"),
    ):
        assert main([str(path)]) == 2
        assert said in capsys.readouterr().err
    for given in ([], [str(other), "--refresh", "README.md"]):
        with pytest.raises(SystemExit):
            main(given)
        assert "give FILEs of rows, or --refresh DOCUMENT" in capsys.readouterr().err


def test_documents_are_made_again_from_the_commands_in_them(tmp_path, capsys):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    rows = write(tmp_path / "benchmarks" / "results" / "rows.jsonl", timed("memo-auto", 64, 2.0))
    document = tmp_path / "docs" / "page.md"
    command = "<!-- memo bench table benchmarks/results/rows.jsonl --run r -->"
    document.write_text(f"before\n{command}\nstale\n<!-- end of the table -->\nafter\n")
    assert main(["--refresh", str(document)]) == 0
    made = document.read_text()
    assert "2.00 s" in made
    assert "stale" not in made
    assert "(../benchmarks/results/rows.jsonl)" in made
    assert made.startswith("before\n")
    assert made.endswith("<!-- end of the table -->\nafter\n")
    assert refreshed(document, tmp_path) == made
    assert main(["--refresh", str(document)]) == 0
    assert "as it was" in capsys.readouterr().err
    write(rows, timed("memo-auto", 64, 3.0))
    assert refreshed(document, tmp_path) != made
    document.write_text("no table")
    assert main(["--refresh", str(document)]) == 2
    assert main(["--refresh", str(tmp_path / "none.md")]) == 2
    assert main([str(rows), "--full"]) == 0
    assert "p80" in capsys.readouterr().out


def test_a_last_row_that_was_cut_off_is_said(tmp_path, capsys):
    path = write(tmp_path / "rows", timed("unwrapped", 64, 1.0), timed("checkpoint", 64, 1.0))
    assert main([str(path)]) == 0
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-40])
    assert main([str(path)]) == 0
    shown = capsys.readouterr()
    assert "checkpoint" not in shown.out
    assert "its last row was cut off while it was written, and is left out" in shown.err


@pytest.fixture
def page(tmp_path):
    """A document of a checkout with one file of rows, with what a test puts into it."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows = tmp_path / "benchmarks" / "results" / "rows.jsonl"
    write(rows, timed("checkpoint", 64, 3.0), timed("memo-auto", 64, 2.0))

    def make(*lines, end="\n"):
        document = tmp_path / "page.md"
        document.write_bytes("".join(line + end for line in lines).encode())
        return document

    return make


START, STOP = "<!-- memo bench table benchmarks/results/rows.jsonl -->", "<!-- end of the table -->"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("a", START, "prose", START, "stale", STOP), "page.md:2: no line below this table is"),
        (("a", START, "stale", STOP, START, "prose"), "page.md:5: no line below this table is"),
        (("a", "<!-- memo bench table 'rows -->", STOP), "page.md:2: No closing quotation"),
        (("a", "<!-- memo bench table none.jsonl -->", STOP), "none.jsonl: there is no such file of rows"),
        (("a", START.replace(" -->", " --nope -->"), STOP), "page.md:2: unrecognized arguments: --nope"),
        (("a", START.replace(" -->", " --run s -->"), STOP), "page.md:2: there are no rows of run 's'"),
        (("a", "<!-- memo bench table --run r -->", STOP), "page.md:2: a table is made of FILEs of rows"),
        (("a", START.removesuffix("-->"), STOP), "page.md:2: a command is one line of its own"),
        (("a", START + " more", STOP), "page.md:2: a command is one line of its own"),
        (("a", STOP), "page.md: no table of it has its command beside it"),
    ],
)
def test_a_document_that_cannot_be_made_again_stays_and_says_where(page, capsys, lines, said):
    document = page(*lines)
    before = document.read_bytes()
    assert main(["--refresh", str(document)]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert document.read_bytes() == before


def test_a_document_that_is_no_text_stays(page, capsys):
    document = page(START, STOP)
    document.write_bytes(b"\xff\xfe" + document.read_bytes())
    assert main(["--refresh", str(document)]) == 2
    assert "page.md is not UTF-8" in capsys.readouterr().err


def test_a_document_that_cannot_be_written_is_one_message(page, capsys, monkeypatch):
    def refuse(path, content):
        raise OutputError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr("benchmarks.harness.tables.write_output", refuse)
    assert main(["--refresh", str(page(START, STOP))]) == 2
    assert "page.md: Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_document_end_as_they_did(page, end):
    document = page("before", START, "stale", STOP, "after", end=end)
    assert main(["--refresh", str(document)]) == 0
    made = document.read_bytes().decode()
    assert "2.00 s" in made
    assert "stale" not in made
    assert made.startswith(f"before{end}{START}{end}")
    assert made.endswith(f"{STOP}{end}after{end}")
    assert made.count("\n") == made.count(end)
    assert main(["--refresh", str(document)]) == 0
    assert document.read_bytes().decode() == made


def test_options_beside_refresh_are_refused(page, capsys):
    for option in (["--run", "r"], ["--contenders", "checkpoint"], ["--lengths", "64"], ["--gpu", "x"], ["--full"]):
        with pytest.raises(SystemExit) as ended:
            main(["--refresh", str(page(START, STOP)), *option])
        assert ended.value.code == 2
        assert f"so {option[0]} goes into those" in capsys.readouterr().err


def test_what_a_full_table_shows_changes_no_comparison(rows, capsys):
    assert main([str(rows), "--full", "--contenders", "memo-auto", "--lengths", "128K"]) == 0
    shown = capsys.readouterr().out
    assert "16,384 tokens" not in shown
    (memo,) = [line.split() for line in shown.splitlines() if line.startswith("memo-auto ")]
    assert memo[:2] == ["memo-auto", "2"]
    assert "1.50" in memo  # times as fast as checkpoint, which is not shown
    assert "checkpoint " not in shown
    assert "; GiB;" in shown
    assert main([str(rows), "--contenders", "memo-auto,"]) == 0
    assert main([str(rows), "--contenders", " ,"]) == 2
    assert "--contenders ' ,' names nothing" in capsys.readouterr().err


def test_a_table_of_longest_lengths_has_no_choice_of_lengths(tmp_path, capsys):
    told = {"rehearsed": True, "status": "ok", "commit": "0123456789"}
    path = write(tmp_path / "rows.jsonl", row("checkpoint", 1 << 19, peak=70 * GIB, **told))
    for more in ([], ["--full"]):
        assert main([str(path), "--lengths", "512K", *more]) == 2
        assert "--lengths: run 'r' is of rehearsals" in capsys.readouterr().err


def test_the_reference_of_gradients_is_of_the_same_run_and_machine(tmp_path, capsys):
    reference = row("reference", 64, status="ok", commit="0123456789", gpu="NVIDIA H200", rehearsed=False)
    path = write(tmp_path / "rows.jsonl", reference, timed("unwrapped", 64, 1.0))
    assert main([str(path)]) == 2
    assert "rows with gpu = 'NVIDIA H200' and 'NVIDIA H100 80GB HBM3', which are not" in capsys.readouterr().err
    other = {"config": {"dtype": "bfloat16", "attention": "flash"}}
    path = write(tmp_path / "rows.jsonl", timed("unwrapped", 64, 1.0), timed("checkpoint", 64, 1.0, **other))
    assert main([str(path)]) == 2
    assert "config = {'attention': 'cudnn'} and {'attention': 'flash'}, which" in capsys.readouterr().err
    assert main([str(write(path, reference))]) == 2
    assert "no rows in" in capsys.readouterr().err


def test_a_gpu_that_no_row_has_is_said_of_rows_of_a_cpu(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", timed("unwrapped", 64, 1.0, gpu=None))
    assert main([str(path), "--gpu", "nah"]) == 2
    assert "no rows of GPU 'nah'; there are: none, on a CPU" in capsys.readouterr().err
