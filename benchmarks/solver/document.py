"""The figures of docs/solver.md from rows: `python -m benchmarks.solver.document` after the table.

What stands between the two marks of the document is this text and nothing else; a test compares them.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import ROOT
from benchmarks.solver.provenance import RESULTS
from benchmarks.solver.sections import SECTIONS
from benchmarks.solver.table import key_of, read_rows

Row = dict[str, Any]
BEGIN, END = "<!-- made by benchmarks.solver.document -->\n", "<!-- end -->\n"
DOCUMENT = ROOT / "docs" / "solver.md"
ROWS = RESULTS / "solver_table.jsonl"
PUBLISHED = RESULTS / "solver_published.jsonl"


def text(rows: Iterable[Row], published: Iterable[Row] = ()) -> str:
    """The section, one part for each kind of row that there is; of rows for one job the last counts."""
    latest = {key_of(row): row for row in rows if "error" not in row}
    by_section: dict[str, list[Row]] = defaultdict(list)
    for row in latest.values():
        by_section[row["section"]].append(row)
    tight = [row for name in SECTIONS for row in by_section[name] if "solved" in row]
    parts = [_machine(list(latest.values())), *_solved(tight), *_traces(by_section["traces"])]
    parts += [*_steps(by_section["layered"]), *_blocks(by_section["layered"])]
    parts += [*_refused(by_section["refused"]), *_fuzz(by_section["fuzz"]), *_published(published)]
    return "\n".join(parts)


def _machine(rows: list[Row]) -> str:
    known = [row["provenance"] for row in rows]
    versions = known[0]["versions"]
    cores = " or ".join(sorted({str(p.get("threads", "?")) for p in known}))
    workers = max(p.get("workers", 1) for p in known)
    loads = [p["load_average"] for p in known]
    commits = ", ".join(sorted({_short(p["commit"]) for p in known}))
    said = (
        f"{known[0]['cpu']}, {cores} cores for each run, runs side by side: {workers}, load at the start {min(loads)} "
        f"to {max(loads)}; Python {known[0]['python']}, OR-Tools {versions['ortools']}, omnimalloc "
        f"{versions['omnimalloc']}, PuLP {versions['pulp']}; commit {commits}. Rows: "
        f"`benchmarks/results/{ROWS.name}`. All instances of this part are synthetic, by seed."
    )
    return textwrap.fill(said, 118) + "\n"


def _short(commit: str) -> str:
    return commit[:9] + ("-changed" if commit.endswith("-changed") else "")


def _solved(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    counted: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        counted[row["group"], row["contender"], row["limit_seconds"]].append(row)
    lines = [
        "Tight instances: planted perfect packings (capacity = load at every moment, so the optimum is known) and",
        "programs like a compiler's (full at a few moments). Bare CP-SAT runs with 8 workers and is told the height.\n",
        "| instances | limit | contender | solved | median | slowest |",
        "|---|---|---|---|---|---|",
    ]
    # Runs side by side end in any order: groups in the order in which they began, each in one place.
    first = {group: place for place, group in reversed(list(enumerate(group for group, *_ in counted)))}
    for (group, contender, limit), runs in sorted(counted.items(), key=lambda one: first[one[0][0]]):
        times = sorted(row["seconds"] for row in runs if row["solved"])
        speed = f"{times[len(times) // 2]:.2f} s | {times[-1]:.2f} s" if times else "- | -"
        lines.append(f"| {group} | {limit:.0f} s | {contender} | {len(times)} of {len(runs)} | {speed} |")
    return [*lines, ""]


def _traces(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["instance"]][row["contender"]] = row
    lines = [
        "Training traces, waste over the load (which may be out of reach):\n",
        "| trace | requests | memo_solver | time | memory | omnimalloc `omni` | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for instance, runs in found.items():
        ours, theirs = runs.get("memo_solver"), runs.get("omnimalloc omni")
        number = next(iter(runs.values()))["num_requests"]
        mine = "- | - | -" if ours is None else f"{_waste(ours)} | {ours['seconds']:.1f} s | {_memory(ours)}"
        other = "- | -" if theirs is None else f"{_waste(theirs)} | {theirs['seconds']:.1f} s"
        lines.append(f"| {instance} | {number:,} | {mine} | {other} |")
    return [*lines, ""]


def _waste(row: Row) -> str:
    return "none" if row["waste"] is None else f"{row['waste']:.3%}".replace("%", " %")


def _memory(row: Row) -> str:
    return "-" if row["peak_rss_mib"] is None else f"{row['peak_rss_mib']} MiB"


def _steps(rows: list[Row]) -> list[str]:
    steps = [row for row in rows if row["group"] == "step"]
    if not steps:
        return []
    lines = [
        f"A step of 80 layers, {steps[0]['num_requests']:,} requests, bi-level with a limit of "
        f"{steps[0]['limit_seconds']:g} s, peak over lower bound:\n",
        "| step | bi-level | time | flat heuristic | rectangles (MEMO) |",
        "|---|---|---|---|---|",
    ]
    for row in steps:
        flat, rectangles = row["flat_heuristic_ratio"], row["rectangle_ratio"]
        lines.append(
            f"| {row['instance']} | {row['ratio']:.4f} | {row['seconds']:.1f} s | {flat:.4f} | {rectangles:.4f} |"
        )
    return [*lines, ""]


def _blocks(rows: list[Row]) -> list[str]:
    blocks = [row for row in rows if row["group"] == "block"]
    if not blocks:
        return []
    lines = [
        f"Level-1 blocks of such steps, this solver beside MEMO's program (CBC, {blocks[0]['limit_seconds']:.0f} s):\n",
        "| block | requests | memo_solver peak / bound | time | MIP peak / bound | time |",
        "|---|---|---|---|---|---|",
    ]
    for row in blocks:
        ours = f"{row['memo_solver_peak'] / row['lower_bound']:.3f} ({row['memo_solver_status']})"
        peak = "-" if row["mip_peak"] is None else f"{row['mip_peak'] / row['lower_bound']:.3f}"
        lines.append(
            f"| {row['instance']} | {row['num_requests']} | {ours} | {row['memo_solver_seconds']:.3f} s "
            f"| {peak} ({row['mip_status']}) | {row['mip_seconds']:.1f} s |"
        )
    return [*lines, ""]


def _refused(rows: list[Row]) -> list[str]:
    return [
        f"One unit below the peak load: {row['num_refused_with_proof']} of {row['num_instances']} instances (to 60,000 "
        f"requests) refused with the\nrequests that prove it, the slowest in {row['seconds_max']:.3f} s.\n"
        for row in rows[-1:]
    ]


def _fuzz(rows: list[Row]) -> list[str]:
    return [
        f"Readers: {row['num_read'] + row['num_refused']:,} mutated files, {row['num_refused']:,} refused and "
        f"{row['num_read']:,} read, {row['num_crashed'] or 'none'} crashed.\n"
        for row in rows[-1:]
    ]


def _published(rows: Iterable[Row]) -> list[str]:
    latest = {(row["set"], row["instance"]): row for row in rows}
    parts = []
    for name in dict.fromkeys(group for group, _ in latest):
        runs = [row for (group, _), row in latest.items() if group == name]
        known = runs[0]["provenance"]
        loads = [row["load_average"] for row in runs]
        said = (
            f"Published instances that are not in this repository: {name}. At most {runs[0]['limit_seconds']:g} s "
            f"each, {sum(row['seconds'] for row in runs):.1f} s in all; {known['threads']} threads, one after the "
            f"other on a machine of {known['cores']} cores with a load of {min(loads)} to {max(loads)}; commit "
            f"{_short(known['commit'])}. Rows: `benchmarks/results/{PUBLISHED.name}`."
        )
        lines = [
            textwrap.fill(said, 118) + "\n",
            "| instance | requests | asked | load | best known | peak | bound | answer | time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in runs:
            asked = "lowest" if row["capacity"] is None else f"{row['capacity']:,}"
            best = "-" if row["best_known"] is None else f"{row['best_known']:,}"
            peak = "-" if row["peak"] is None else f"{row['peak']:,}"
            lines.append(
                f"| {row['instance']} | {row['num_requests']:,} | {asked} | {row['load']:,} | {best} | {peak} "
                f"| {row['lower_bound']:,} | {row['status']} | {row['seconds']:.2f} s |"
            )
        parts += [*lines, ""]
    return parts


def replaced(document: str, made: str) -> str:
    """The document with `made` between its marks."""
    head, rest = document.split(BEGIN)
    return head + BEGIN + made + END + rest.split(END)[1]


def main() -> None:
    """Rewrite the section of docs/solver.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS)
    rows = read_rows(parser.parse_args().rows)
    if not rows:
        raise SystemExit("there are no rows: run python -m benchmarks.solver.table first")
    made = text(rows, read_rows(PUBLISHED))
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
