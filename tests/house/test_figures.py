"""The README's figures are those of committed rows."""

from __future__ import annotations

import json
from typing import Any

from tests.house.sources import ROOT

GIB = 2**30


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
