"""Figures of whole steps side by side, in README and docs, are those of committed rows."""

import json

from benchmarks.harness.forecast import off
from benchmarks.harness.names import NAMES
from tests.house.sources import ROOT
from tests.house.test_figures import GIB, rows_of, run_of

ROWS, RUN = "harness_step_h200.jsonl", "issue9-1b-d"
#: The shorter lengths of it once more, on later code.
LATER = "issue9-1b-e"
#: The same on the latest code, beside torchtitan's policy and Liger's kernels.
LATEST = "issue9-1b-f"
#: Longest lengths, rehearsed.
LONGEST = "issue9-1b-longest-d"
FITS, BEYOND = (8192, 16384, 32768), (65536, 131072)


def text_of(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def ahead(run, name, length):
    """How many times as fast memo-auto is."""
    return run[name, length]["step_seconds"] / run["memo-auto", length]["step_seconds"]


def trained(run, length):
    return [name for name, there in run if there == length and not name.startswith(("memo", "kernels", "reference"))]


def longest_forecast(run, contender="memo-auto"):
    """What `memo fit` says of the longest, beside this run."""
    listed = json.loads((ROOT / "tests" / "benchmarks" / "longest_forecasts.json").read_text(encoding="utf-8"))
    (told,) = (one["longest"] for one in listed if (one["run"], one["contender"]) == (run, contender))
    return told


def said(numbers, digits=2):
    return " and ".join(f"{number:.{digits}f}" for number in numbers)


def compiled_beside(run):
    """By how much blocks that are only compiled are faster than memo-auto where both fit, and their memory larger."""
    faster = [100 * (1 / ahead(run, "unwrapped+compile", length) - 1) for length in FITS]
    more = [100 * (run["unwrapped+compile", length]["peak_allocated"] / run["memo-auto", length]["peak_allocated"] - 1)
            for length in FITS]  # fmt: skip
    return f"{min(faster):.1f} to {max(faster):.1f} %", f"{min(more):.0f} to {max(more):.0f} %"


def shortness(run):
    """Percent by which forecasts of steps are too short, in order."""
    return {name: sorted(-100 * off(row)["step"] for (one, _), row in run.items() if one == name)
            for name in ("memo-auto", "memo-tiled", "memo-replay")}  # fmt: skip


def test_what_is_said_of_whole_steps_side_by_side_is_made_of_rows():
    docs, run = text_of("docs/benchmarks.md"), run_of(ROWS, RUN)
    assert all(set(run["memo-auto", length]["details"]["executors"]) == {"tiled"} for length in (*FITS, *BEYOND))
    core = {"selective", "checkpoint", "hf-offload", "trl-offload", "deepspeed", "megatron-full", "axolotl"}
    for length in (*FITS, *BEYOND):
        assert set(trained(run, length)) - {"selective+compile"} == core | (
            {"unwrapped", "unwrapped+compile"} if length in FITS else set()
        )
    plain = [min(ahead(run, name, length) for name in trained(run, length) if not name.endswith("+compile"))
             for length in (*FITS, *BEYOND)]  # fmt: skip
    assert f"is {min(plain):.2f} to {max(plain):.2f} times as fast as the fastest other" in docs
    assert f"`auto` is {min(plain):.2f} to {max(plain):.2f} times as fast as the fastest whose" in text_of("README.md")
    again = core - {"selective", "axolotl"}
    assert {min(again, key=lambda name: ahead(run, name, length)) for length in BEYOND} == {"megatron-full"}
    faster = said(ahead(run, "megatron-full", length) for length in BEYOND)
    assert f"and {faster} times as fast as megatron-full" in docs
    assert ("kernels", 65536) in run
    assert ("kernels", 131072) not in run


def test_what_is_said_beside_compiled_blocks_is_made_of_rows():
    docs, run = text_of("docs/benchmarks.md"), run_of(ROWS, RUN)
    faster, more = compiled_beside(run)
    assert f"only compiled are {faster} faster than it, with {more} more memory" in docs
    assert not any(("unwrapped+compile", length) in run for length in BEYOND)
    compiled = said(ahead(run, "selective+compile", length) for length in BEYOND)
    assert f"`memo-auto` is {compiled} times as fast as selective checkpointing of compiled blocks" in docs
    memory = [run["memo-auto", length]["peak_allocated"] / run["selective+compile", length]["peak_allocated"]
              for length in BEYOND]  # fmt: skip
    assert f"in {said(memory, 1)} times its memory" in docs
    plain = said(ahead(run, "selective", length) for length in BEYOND)
    assert f"{plain} times as fast as that of blocks as they are" in docs


def test_what_is_said_of_forecasts_of_whole_steps_is_made_of_rows():
    docs, readme, run = text_of("docs/benchmarks.md"), text_of("README.md"), run_of(ROWS, RUN)
    auto, tiled, replay = shortness(run).values()
    assert f"of `memo-auto` are {auto[0]:.1f} to {auto[-1]:.1f} % too short" in docs
    assert f"of `memo-replay` {replay[0]:.1f} to {replay[-1]:.1f} %," in docs
    assert f"and of `memo-tiled` up to {tiled[-1]:.1f} % (at 8,192 tokens," in docs
    later = shortness(run_of(ROWS, LATER))
    by_tiles = max(*auto, *tiled, *later["memo-auto"], *later["memo-tiled"])
    by_replay = max(*replay, *later["memo-replay"])
    assert f"are up to {by_tiles:.1f} % too short by tiles, {by_replay:.1f} % by replay" in readme
    spans = [[f"{1e3 * run[name, 8192][part]:.1f}" for part in ("p20", "p80")]
             for name in ("memo-tiled", "memo-auto")]  # fmt: skip
    assert f"take {spans[0][0]} to {spans[0][1]} ms from the 20th" in docs
    assert f"whose plan is the same, {spans[1][0]} to {spans[1][1]} ms" in docs
    memo = [row for (name, _), row in run.items() if name.startswith("memo")]
    assert f"Peaks are within {100 * max(abs(off(row)['peak']) for row in memo):.1f} % of their forecasts" in docs
    assert all(row["pinned_bytes"] - row["details"]["host_bytes"] < 16 for row in memo)


def test_what_is_said_of_earlier_runs_of_whole_steps_is_made_of_rows():
    docs, planning, tiled = (text_of(f"docs/{name}.md") for name in ("benchmarks", "planning", "tiled"))
    first, third = run_of(ROWS, "issue9-1b"), run_of(ROWS, "issue9-1b-c")
    worst = max(-100 * off(row)["step"] for (name, _), row in first.items() if name == "memo-auto")
    ms = [f"{1e3 * run['memo-auto', 8192]['step_seconds']:.1f} ms" for run in (first, third)]
    assert f"took {ms[0]} at 8,192 tokens, with forecasts up to {worst:.1f} % too short" in docs
    assert f"in issue9-1b-c (8d8f9d6) {ms[1]}" in docs
    pool = [run["hf-offload+liger", 131072]["pinned_bytes"] / GIB for run in (first, run_of(ROWS, "issue7-1b-h200c"))]
    assert f"has {pool[0]:.1f} GiB at 131,072 tokens in issue9-1b and {pool[1]:.1f} GiB where it began with" in docs
    gap = first["hf-offload+liger", 131072]["step_seconds"] / first["selective", 131072]["step_seconds"]
    assert f"of which selective is {gap:.2f} times as fast as it" in tiled
    blocks = run_of("harness_8b_h200.jsonl", "issue9-8b-short-c")
    auto = [blocks["memo-auto", length] for length in (8192, 16384)]
    times = [blocks["unwrapped", row["seq_len"]]["step_seconds"] / row["step_seconds"] for row in auto]
    assert f"took {said((1e3 * row['step_seconds'] for row in auto), 1)} ms, {said(times)} times as fast" in docs
    assert f"forecasts {said((-100 * off(row)['step'] for row in auto), 1)} % too short" in docs
    ended = [one["error"] for one in rows_of(ROWS) if (one["run"], one["status"]) == ("issue9-1b", "oom")
             and one["contender"] == "memo-replay"]  # fmt: skip
    assert ["3.87 GiB is reserved by PyTorch but unallocated" in error for error in ended] == [True]
    assert "memo-replay of run issue9-1b" in planning


def test_what_is_said_of_whole_steps_on_later_code_is_made_of_rows():
    docs, readme = text_of("docs/benchmarks.md"), text_of("README.md")
    run, before = run_of(ROWS, LATER), run_of(ROWS, RUN)
    faster, more = compiled_beside(run)
    assert f"only compiled are {faster} faster than `memo-auto`, with {more} more memory" in docs
    spans = [compiled_beside(one)[0].partition(" to ") for one in (run_of(ROWS, LATEST), before)]
    least, most = spans[0][0], spans[1][2]
    assert f"(`torch.compile`) and nothing else is {least} to {most} faster" in readme
    auto, tiled, replay = (f"{short[0]:.1f} to {short[-1]:.1f} %" for short in shortness(run).values())
    assert f"are {auto} too short, those of `memo-replay` {replay}, those of `memo-tiled` {tiled};" in docs
    compiled = [[one["unwrapped+compile", length]["step_seconds"] for length in FITS] for one in (run, before)]
    slower = [100 * (now / then - 1) for now, then in zip(*compiled, strict=True)]
    assert f"compiled blocks were {min(slower):.1f} to {max(slower):.1f} % slower than on that one" in docs
    memo = [row for (name, _), row in run.items() if name.startswith("memo")]
    assert f"peaks are within {100 * max(abs(off(row)['peak']) for row in memo):.1f} %, host bytes exact" in docs
    assert all(row["pinned_bytes"] - row["details"]["host_bytes"] < 16 for row in memo)


def test_what_is_said_of_whole_steps_on_the_latest_code_is_made_of_rows():
    docs, readme, run = text_of("docs/benchmarks.md"), text_of("README.md"), run_of(ROWS, LATEST)
    faster, more = compiled_beside(run)
    assert f"only compiled are {faster} faster than `memo-auto`, with {more} more memory" in docs
    policy = "selective-mm+compile"
    there = {length: row["peak_allocated"] for (name, length), row in run.items() if name == policy}
    assert [*there] == [*FITS, 65536]
    ratios = sorted(ahead(run, policy, length) for length in there)
    memory = sorted(run["memo-auto", length]["peak_allocated"] / peak for length, peak in there.items())
    times = f"{ratios[0]:.2f} to {ratios[-1]:.2f} times"
    assert f"it is {times} as fast, in {memory[0]:.1f} to {memory[-1]:.1f} times its memory up to 65,536 tokens" in docs
    assert f"torchtitan's policy, on later code, {times}, and that runs out of memory at 131,072" in readme
    names = ("selective+compile", "megatron-full", "hf-offload+liger-kernels")
    first, second, third = (f"{ahead(run, name, 131072):.2f}" for name in names)
    assert f"`memo-auto` {first} times as fast as `selective+compile`, {second} times as megatron-full and" in docs
    assert f"and {third} times as hf-offload+liger-kernels" in docs
    (auto,) = (short for name, short in shortness(run).items() if name == "memo-auto")
    assert f"Its step forecasts are {auto[0]:.1f} to {auto[-1]:.1f} % too short, peaks within 1.7 %" in docs
    assert max(abs(off(row)["peak"]) for (name, _), row in run.items() if name == "memo-auto") < 0.0175


def test_what_is_said_of_the_papers_model_is_made_of_its_row():
    docs, (row,) = text_of("docs/benchmarks.md"), rows_of("harness_gpt_h200.jsonl")
    apart = off(row)
    assert (row["contender"], row["geometry"], row["seq_len"], row["n"]) == ("memo-auto", "gpt-7b-tp8", 1 << 20, 1)
    short = f"{-100 * apart['step']:.1f} % too short"
    assert f"Its forecast is {short}, with seconds extrapolated from 65,536 tokens;" in docs
    assert any("extrapolated from 65,536" in note for note in row["details"]["notes"])
    assert abs(apart["peak"]) < 0.001 > abs(row["pinned_bytes"] - row["details"]["host_bytes"]) / GIB
    assert "the peak is within 0.1 % of its own, host bytes exact" in docs
    assert (row["config"]["memory"], row["host_budget"]) == (78 * GIB, 100 * GIB)


def longest_rows(run, rows=ROWS):
    """Rows of ``run``, what did not fit among them, by contender and length."""
    return {(row["contender"], row["seq_len"]): row for row in rows_of(rows) if row["run"] == run}


def ends(rows):
    """(longest that fit, shortest that did not) of each contender."""
    lengths = {}
    for (name, tokens), row in rows.items():
        lengths.setdefault(name, {"ok": [], "oom": []})[row["status"]].append(tokens)
    return {name: (max(one["ok"]), min(one["oom"])) for name, one in lengths.items()}


def peaks_line(run, name, limit):
    """Where the line through the last two peaks of ``name`` meets ``limit``, in tokens."""
    (low, less), (high, more) = sorted(
        (tokens, row["peak_allocated"]) for (one, tokens), row in run.items() if one == name and row["status"] == "ok"
    )[-2:]
    return high + (limit - more) * (high - low) / (more - less)


def test_what_is_said_of_longest_steps_is_made_of_rows():
    docs, rows = text_of("docs/benchmarks.md"), longest_rows(LONGEST)
    reached, (longest, beyond) = ends(rows), ends(rows)["memo-auto"]
    told = longest_forecast(LONGEST)
    assert longest < told < beyond
    assert f"says {told:,} for `memo-auto`: {100 * (told / longest - 1):.1f} % more than what was seen to fit," in docs
    assert "needs 100.71 GiB of host memory" in rows["memo-auto", beyond]["error"]
    assert f"at {beyond:,} tokens the plan needs 100.7 GiB" in docs
    best = max(set(reached) - {"memo-auto"}, key=lambda name: reached[name])
    short = reached[best][1]
    assert f"rehearsed is {longest / short:.2f} times the {short:,} tokens that did not fit {best}." in docs
    assert longest / short > 1.4
    assert f"`memo fit` says {told:,} for `memo-auto`." in text_of("README.md")
    assert len(reached) == 12
    minutes = rows["memo-auto", longest]["details"]["forecast"]["step_seconds"] / 60
    assert f"that of `memo-auto` is forecast to take {minutes:.0f} minutes" in docs
    before = ends(longest_rows("issue9-1b-longest-c"))
    assert {name: reached[name] for name in before} == before
    assert len(before) == 8


def test_real_steps_confirm_what_was_rehearsed():
    """One of each at its longest, but for the two that docs name; the peak of the rehearsal to 2,048 bytes."""
    rehearsed, real = longest_rows(LONGEST), run_of(ROWS, f"{LONGEST}-confirm")
    reached = ends(rehearsed)
    missing = {"memo-auto", "megatron-full"}
    assert {(name, longest) for name, (longest, _) in reached.items() if name not in missing} == set(real)
    assert len(real) == 10
    for which, row in real.items():
        apart = [abs(row[name] - rehearsed[which][name]) for name in ("peak_allocated", "pinned_bytes")]
        assert max(apart) <= 2048
        assert row["step_seconds"] < 480
    assert "all ten are those of the rehearsals within 2,048 bytes" in text_of("docs/benchmarks.md")


def test_what_is_said_of_longest_steps_on_later_code_is_made_of_rows():
    docs, readme = text_of("docs/benchmarks.md"), text_of("README.md")
    rehearsed, (real,) = longest_rows("issue9-1b-longest-e"), run_of(ROWS, "issue9-1b-longest-e-confirm").values()
    reached = ends(longest_rows(LONGEST))
    assert (real["contender"], real["seq_len"]) == ("megatron-full", reached["megatron-full"][0])
    assert tuple(tokens for name, tokens in rehearsed if name == "megatron-full") == reached["megatron-full"]
    assert real["peak_allocated"] == rehearsed["megatron-full", real["seq_len"]]["peak_allocated"]
    assert f"{real['step_seconds']:.1f} s, {100 * real['mfu']:.1f} % MFU, with the rehearsals' peak to the byte" in docs
    assert rehearsed["selective-mm+compile", 184320]["status"] == "oom"
    ((fits, beyond),) = ends(longest_rows("issue9-1b-longest-f")).values()
    ratio = reached["memo-auto"][0] / beyond
    assert f"is {ratio:.2f} times the {beyond:,} tokens that did not fit; the two were not in one run" in docs
    assert f"that stack rehearses {fits:,} tokens and not {beyond:,}" in readme


def test_the_line_of_peaks_says_what_did_not_fit():
    reached, steps = ends(longest_rows(LONGEST)), run_of(ROWS, RUN)
    found = {name: abs(peaks_line(steps, name, 78 * GIB) / reached[name][1] - 1)
             for name in set(reached) & {name for name, _ in steps} - {"memo-auto"}}  # fmt: skip
    assert len(found) == 10
    whole = {"unwrapped", "unwrapped+compile"}
    most = [max(far for name, far in found.items() if (name in whole) == asked) for asked in (False, True)]
    assert [f"{100 * far:.1f} %" for far in most] == ["0.3 %", "1.0 %"]
    assert "meets 78 GiB within 0.3 % of the shortest length that did not fit, and within 1.0 % for" in text_of(
        "docs/benchmarks.md"
    )


def test_what_is_said_of_blocks_at_262144_is_made_of_its_rows():
    docs, run = text_of("docs/benchmarks.md"), run_of("harness_8b_h200.jsonl", "issue9-8b-256k")
    row = run["memo-auto", 262144]
    apart = off(row)
    assert f"`memo-auto`'s forecast is {-100 * apart['step']:.1f} % too short" in docs
    assert max(abs(apart["peak"]), abs(apart["host"])) < 0.001
    assert all(one["n"] == 1 for one in run.values())


def test_what_compiled_checkpoints_would_take_is_made_of_rows():
    """As long as nobody has measured it; and that nobody has."""
    docs, run = text_of("docs/benchmarks.md"), run_of(ROWS, RUN)
    seconds = {which: row["step_seconds"] for which, row in run.items()}
    found = [
        (seconds["selective+compile", n] + seconds["checkpoint", n] - seconds["selective", n]) / seconds["memo-auto", n]
        for n in (*FITS, *BEYOND)
    ]
    *first, last = [f"{one:.2f}" for one in found]
    assert f"`memo-auto` would be {', '.join(first)} and {last} times as fast: an estimate" in docs
    assert all(row["contender"] != "checkpoint+compile" for row in rows_of(ROWS))
    ((fits, beyond),) = ends(longest_rows("issue9-1b-longest-f")).values()
    assert f"at a bracket of {100 * (beyond / fits - 1):.1f} %" in docs


def test_contenders_without_rows_are_named():
    files = [path.name for path in (ROOT / "benchmarks" / "results").glob("harness_*.jsonl")]
    measured = {row["contender"].partition("@")[0] for name in files for row in rows_of(name)}
    missing = [f"`{name}`" for name in NAMES if name not in measured and not name.startswith("memo-")]
    *others, last = missing
    assert f"No rows are committed of {', '.join(others)} and {last}:" in text_of("docs/benchmarks.md")


def test_what_is_said_of_longest_blocks_is_made_of_rows():
    docs, real = text_of("docs/benchmarks.md"), run_of("harness_8b_h200.jsonl", "issue9-8b-longest-real")
    rows = longest_rows("issue9-8b-longest", "harness_8b_h200.jsonl")
    reached = ends(rows)
    assert {(name, longest) for name, (longest, _) in reached.items()} == set(real)
    assert len(real) == 12
    apart = max(abs(row["peak_allocated"] - rows[which]["peak_allocated"]) for which, row in real.items())
    assert apart <= 0.04 * (1 << 20)
    assert "the peaks of all twelve are those of the rehearsals within 0.04 MiB" in docs
    auto, replay = (("memo-auto", reached["memo-auto"][0]), ("memo-replay", reached["memo-replay"][0]))
    longer = [f"{-100 * off(real[which])['step']:.1f} % longer" for which in (auto, replay)]
    assert f"`memo-auto`'s step took {longer[0]} than its forecast, `memo-replay`'s {longer[1]}" in docs
    assert real[replay]["pinned_bytes"] < rows[replay]["pinned_bytes"]
    told = {which[0]: longest_forecast("issue9-8b-longest", which[0]) for which in (auto, replay)}
    more = [f"{100 * (told[name] / fits - 1):.1f}" for name, fits in (auto, replay)]
    assert f"says {told['memo-auto']:,} for `memo-auto` and {told['memo-replay']:,} for `memo-replay`" in docs
    assert f"{more[0]} and {more[1]} % more than what was seen to fit" in docs
    assert [told[name] > reached[name][1] for name in told] == [False, True]
    assert real["unwrapped+compile", reached["unwrapped+compile"][0]]["pinned_bytes"] >> 20 == 4 << 10
    fits = reached.pop("memo-auto")[0]
    name, (_, beyond) = max(reached.items(), key=lambda one: one[1][0])
    assert f"is {fits / beyond:.2f} times the {beyond:,} tokens that did not fit {name}" in docs
    ran, readme = real[auto], text_of("README.md")
    assert f"reach {fits:,} tokens (a real step: {ran['step_seconds']:.1f} s, {100 * ran['mfu']:.1f} % MFU)" in readme
    assert f"{fits / beyond:.2f} times what did not fit the next that was tried" in readme
