"""The README's figures are those of committed rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.harness.forecast import off
from benchmarks.harness.tables import refreshed
from tests.house.sources import ROOT

GIB = 2**30
#: Those with tables that are made by a command, which stands beside them.
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "<!-- end of the table -->" in path.read_text(encoding="utf-8")
]


def cells(row: dict[str, Any]) -> str:
    """The README's table row of one result row."""
    forecast = row["forecast"]
    return (
        f"| {row['seq_len']:,} | {row['budget'] / GIB:.0f} GiB, {row['host_budget'] / GIB:.0f} GiB "
        f"| {row['peak_allocated'] / GIB:.2f} GiB | {row['pinned_bytes'] / GIB:.2f} GiB "
        f"| {row['step_seconds']:.2f} s ({row['p20']:.2f} to {row['p80']:.2f}) | {row['mfu']:.1%} "
        f"| {forecast['step_seconds']:.2f} s, {forecast['peak_bytes'] / GIB:.2f} GiB |"
    ).replace("% |", " % |")


def test_the_table_of_the_readme_is_made_of_rows():
    path = ROOT / "benchmarks" / "results" / "main_job_h100.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    latest = {(row["seq_len"], row["budget"]): row for row in rows}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in latest.values():
        assert cells(row) in readme
        assert row["peak_allocated"] <= row["budget"]
        assert row["pinned_bytes"] <= row["host_budget"]
    compared = [row["max_rel_loss_diff"] for row in latest.values() if row["max_rel_loss_diff"] is not None]
    assert all(f"{difference:.1e}" in readme for difference in compared)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_their_commands_print(document):
    """Stale? `memo bench table --refresh DOCUMENT` makes them again."""
    assert document.read_text(encoding="utf-8") == refreshed(document, ROOT)


def test_budgets_of_the_comparison_are_the_peaks_of_selective_checkpointing():
    rows = {(row["seq_len"], row["contender"]): row for row in rows_of("harness_8b_budget_h100.jsonl")
            if row["run"] == "issue4-8b-all"}  # fmt: skip
    within = {length: row for (length, name), row in rows.items() if name == "memo-auto@selective"}
    assert sorted(within) == [16384, 32768, 65536, 131072]
    for length, row in within.items():
        assert row["budget"] == rows[length, "selective"]["peak_allocated"] >= row["peak_allocated"]


def rows_of(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_sentences_below_the_comparison_are_made_of_rows():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = rows_of("harness_8b_budget_h100.jsonl")
    latest = {(row["seq_len"], row["contender"]): row for row in rows if row["run"] == rows[-1]["run"]}
    within = [row for (_, name), row in latest.items() if name == "memo-auto@selective"]
    assert all(set(row["details"]["executors"]) == {"tiled"} for row in within)
    above = [row["details"]["forecast"]["peak_bytes"] / row["peak_allocated"] - 1 for row in within]
    assert f"its forecast of the peak is {100 * min(above):.0f} to {100 * max(above):.0f} % above" in readme
    fits = [(length, row) for (length, name), row in latest.items() if name == "unwrapped" and row["status"] == "ok"]
    slower = max(latest[length, "memo-auto"]["step_seconds"] / row["step_seconds"] - 1 for length, row in fits)
    assert f"Without a budget memo is within {100 * slower:.1f} % of the unwrapped blocks" in readme
    step = {row["contender"]: row for row in rows_of("harness_step_h100.jsonl") if row["status"] == "ok"}
    memo, checkpoint = (f"{row['step_seconds']:.2f} s and {row['peak_allocated'] / GIB:.1f} GiB"
                        for row in (step["memo-auto"], step["checkpoint"]))  # fmt: skip
    assert f"takes {memo} within {step['memo-auto']['budget'] / GIB:.0f} GiB" in readme
    assert f"{checkpoint} under `torch.utils.checkpoint`" in readme


def test_what_is_said_of_forecasts_by_tiles_is_made_of_rows():
    rows = [row for row in rows_of("harness_tiled_h200.jsonl") if row["contender"].startswith("memo-tiled")]
    worst = max(abs(off(row)["step"]) for row in rows)
    assert f"too short; {len(rows)}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("README.md", "docs/tiled.md"):
        assert f"within {100 * worst:.1f} %" in (ROOT / name).read_text(encoding="utf-8")
    by_name = {(r["contender"], r["seq_len"]): r for r in rows_of("harness_tiled_h200.jsonl")
               if r["run"] == "issue6-8b-h200e" and r["status"] == "ok"}  # fmt: skip
    tiles = [row for (name, _), row in by_name.items() if name.startswith("memo-tiled")]
    peak = max(abs(off(row)["peak"]) for row in tiles)
    seconds = {key: row["step_seconds"] for key, row in by_name.items()}
    tiled = " ".join((ROOT / "docs/tiled.md").read_text(encoding="utf-8").split())
    assert f"peaks within {100 * peak:.1f} %" in tiled
    selective, checkpoint = (seconds[name, 131072] / seconds["memo-tiled@24GiB", 131072]
                             for name in ("selective", "checkpoint"))  # fmt: skip
    assert f"it is {selective:.3f} times as fast as selective and {checkpoint:.3f} times as fast as checkpoint" in tiled
    exposed = [by_name["memo-tiled@24GiB", length]["details"]["trace"]["exposed_share"] for length in (131072, 262144)]
    assert f"where {100 * exposed[0]:.1f} % of the time of its copies is not hidden ({100 * exposed[1]:.1f} %" in tiled
    share = [seconds["kernels", length] / seconds["memo-tiled0", length] for length in (65536, 131072)]
    assert f"memo-tiled0 has {share[0]:.3f} of the speed of kernels alone at 65,536 tokens, and {share[1]:.3f}" in tiled
    replay = [f"{row['step_seconds']:.2f}" for (name, _), row in by_name.items() if name == "memo-replay"]
    assert f"memo-replay beside them: {', '.join(replay[:-1])} and {replay[-1]} s" in tiled


def test_what_is_said_of_programs_that_write_to_rows_is_made_of_rows():
    by_name = {(r["contender"], r["seq_len"]): r for r in rows_of("harness_tiled_h200.jsonl")
               if r["run"] == "issue6-8b-h200f"}  # fmt: skip
    seconds = {key: row["step_seconds"] for key, row in by_name.items()}
    memo = [row for (name, _), row in by_name.items() if name.startswith("memo")]
    tiled = " ".join((ROOT / "docs/tiled.md").read_text(encoding="utf-8").split())
    share = [seconds["kernels", length] / seconds["memo-tiled0", length] for length in (65536, 131072)]
    assert f"has {share[0]:.3f} of the speed of kernels alone at 65,536 tokens now, and {share[1]:.3f}" in tiled
    selective, checkpoint = (seconds[name, 131072] / seconds["memo-tiled@24GiB", 131072]
                             for name in ("selective", "checkpoint"))  # fmt: skip
    assert f"memo is {selective:.3f} times as fast as selective and {checkpoint:.3f} times as fast" in tiled
    exposed = by_name["memo-tiled@24GiB", 131072]["details"]["trace"]["exposed_share"]
    assert f"with {100 * exposed:.1f} % of its copies' time not hidden" in tiled
    step, peak = (max(abs(off(row)[what]) for row in memo) for what in ("step", "peak"))
    assert f"within {100 * step:.1f} % of their forecasts, peaks within {100 * peak:.1f} %" in tiled
    left = max(by_name["memo-tiled0", length]["pinned_bytes"] for length in (65536, 131072))
    assert f"left {left >> 20} MiB of pinned memory behind" in tiled


def test_what_is_said_of_a_million_tokens_is_made_of_rows():
    (row,) = (row for row in rows_of("harness_step_h200.jsonl") if row["seq_len"] == 2**20)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"1,048,576 tokens took {row['step_seconds']:.1f} s" in readme
    assert f"{100 * row['mfu']:.1f} % causal MFU" in readme
    device, host = (f"{row[name] / GIB:.1f} GiB" for name in ("peak_allocated", "pinned_bytes"))
    most, forecast = row["config"]["memory"], row["details"]["forecast"]
    assert f"{device} of an H200 of which it might take {most / GIB:.0f} GiB and {host} of host memory" in readme
    assert f"{100 * (row['step_seconds'] / forecast['step_seconds'] - 1):.1f} % more time" in readme
    assert f"{100 * (1 - row['peak_allocated'] / forecast['peak_bytes']):.1f} % less memory than forecast" in readme


def test_the_sentence_on_24_gib_is_made_of_rows():
    """1.10 times selective checkpointing, 0.92 of kernels alone, and at most 5 % of copies not hidden."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = {(row["contender"], row["seq_len"]): row for row in rows_of("harness_tiled_h100.jsonl")}
    memo, selective, kernels = (rows[name, 131072] for name in ("memo-auto@24GiB", "selective", "kernels"))
    faster = selective["step_seconds"] / memo["step_seconds"]
    share, exposed = kernels["step_seconds"] / memo["step_seconds"], memo["details"]["trace"]["exposed_share"]
    assert f"takes {memo['step_seconds']:.2f} s: {faster:.2f} times as fast as selective" in readme
    assert f"with {selective['peak_allocated'] / GIB:.1f} GiB, {100 * share:.0f} % of the speed" in readme
    assert f"{100 * exposed:.1f} % of the time of its copies" in readme
    assert f"in {memo['pinned_bytes'] / GIB:.1f} GiB of host memory" in readme
    assert memo["peak_allocated"] <= memo["budget"] == 24 * GIB
    assert (faster >= 1.10, share >= 0.92, exposed <= 0.05) == (True, True, True)


def head_loss_cells(rows: list[dict[str, Any]]) -> str:
    """The line of docs/losses.md for one contender: milliseconds and GiB by length."""
    return " | ".join(
        f"{row['step_seconds'] * 1e3:.1f} ms, {row['peak_extra'] / GIB:.2f} GiB"
        if row["status"] == "ok"
        else "out of memory"
        for row in rows
    )


def test_the_table_of_the_losses_is_made_of_rows():
    path = ROOT / "benchmarks" / "results" / "head_loss_h100.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    docs = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    contenders = dict.fromkeys(row["contender"] for row in rows)
    for contender in contenders:
        mine = sorted((row for row in rows if row["contender"] == contender), key=lambda row: row["seq_len"])
        assert f"{head_loss_cells(mine)} | {mine[0]['grad_error']:.2e} |" in docs
