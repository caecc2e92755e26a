"""Figures of whole steps beside compiled blocks, in README and docs, are those of committed rows."""

from benchmarks.harness.forecast import off
from tests.house.sources import ROOT
from tests.house.test_figures import run_of

FITS, BEYOND = (8192, 16384, 32768), (65536, 131072)


def text_of(name):
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def test_what_is_said_beside_compiled_blocks_is_made_of_rows():
    docs, readme = text_of("docs/benchmarks.md"), text_of("README.md")
    run = run_of("harness_step_h200.jsonl", "issue9-1b-c")
    seconds = {key: row["step_seconds"] for key, row in run.items()}

    def ahead(name, length):
        return seconds[name, length] / seconds["memo-auto", length]

    faster = [100 * (1 / ahead("unwrapped+compile", length) - 1) for length in FITS]
    said = f"{min(faster):.0f} to {max(faster):.0f} % faster"
    assert f"only compiled are {said} than `memo-auto`" in docs
    assert f"(`torch.compile`) and nothing else is {said}" in readme
    assert not any(("unwrapped+compile", length) in run for length in BEYOND)
    auto = [row for (name, _), row in run.items() if name == "memo-auto"]
    again = [100 * row["recomputed_flops"] / row["model_flops"] for row in auto]
    assert f"again in backward ({min(again[:3]):.1f} to {max(again):.1f} % of the step's FLOPs;" in docs
    compiled = [f"{ahead('selective+compile', length):.2f}" for length in BEYOND]
    assert f"`memo-auto` is {compiled[0]} and {compiled[1]} times as fast as selective" in docs
    plain = [f"{ahead('selective', length):.2f}" for length in BEYOND]
    assert f"and {plain[0]} and {plain[1]} times as fast as that of blocks as they are" in docs
    memory = [run["memo-auto", length]["peak_allocated"] / run["selective+compile", length]["peak_allocated"]
              for length in BEYOND]  # fmt: skip
    assert all(1.8 < part < 2.5 for part in memory)
    before = run_of("harness_step_h200.jsonl", "issue9-1b")["memo-auto", 8192]["step_seconds"]
    here = seconds["memo-auto", 8192]
    assert f"its step takes {1e3 * here:.1f} ms here and took {1e3 * before:.1f} ms in the run above" in docs


def test_what_is_said_of_forecasts_beside_compiled_blocks_is_made_of_rows():
    docs, readme = text_of("docs/benchmarks.md"), text_of("README.md")
    run = run_of("harness_step_h200.jsonl", "issue9-1b-c")
    short = {name: sorted(-100 * off(row)["step"] for (one, _), row in run.items() if one == name)
             for name in ("memo-auto", "memo-tiled", "memo-replay")}  # fmt: skip
    auto, tiled, replay = short.values()
    assert f"of `memo-auto` are {auto[0]:.1f} to {auto[-1]:.1f} % too short" in docs
    assert f"of `memo-tiled` {tiled[0]:.1f} to {tiled[-1]:.1f} %, and of `memo-replay` up to {replay[-1]:.1f} %" in docs
    assert f"up to {auto[-1]:.1f} % too short by tiles, {replay[-1]:.1f} % by replay" in readme
    memo = [row for (name, _), row in run.items() if name.startswith("memo")]
    assert f"Peaks are within {100 * max(abs(off(row)['peak']) for row in memo):.1f} % and host bytes exact" in docs
    blocks = run_of("harness_8b_h200.jsonl", "issue9-8b-short-c")
    auto = [blocks["memo-auto", length] for length in (8192, 16384)]
    ms = [f"{1e3 * row['step_seconds']:.1f}" for row in auto]
    times = [f"{blocks['unwrapped', row['seq_len']]['step_seconds'] / row['step_seconds']:.2f}" for row in auto]
    late = [f"{-100 * off(row)['step']:.1f}" for row in auto]
    assert f"take {ms[0]} and {ms[1]} ms, {times[0]} and {times[1]} times as fast as unwrapped" in docs
    assert f"forecasts {late[0]} and {late[1]} % too short" in docs
