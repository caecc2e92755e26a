"""memo_solver on published instances that the user brings: a folder of CSV files, one row each.

    python -m benchmarks.solver.published FOLDER --set "minimalloc, challenging" --capacity 1048576 --commit HASH
    python -m benchmarks.solver.published FOLDER --set "SOMAS" --heights best.json --commit HASH

Columns are `id,lower,upper,size` or `buffer,start,end,size`, lifetimes half-open; offsets are ignored. With a capacity
the question is whether it fits; without one the peak is minimised, and compared with the best known height where
`--heights` (JSON: name of the file without .csv to bytes) has one. Instances run one after the other, each in a
process of its own. Rows hold names, counts, heights and times, never the instance.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.solver.contenders import Answer, timed
from benchmarks.solver.provenance import RESULTS, provenance
from memo_solver import Problem, Request, SolveParams, solve
from memo_solver.bounds import peak_load

ALIASES = {"buffer": "id", "start": "lower", "end": "upper"}
"""Names of columns that publishers use for ours."""
Row = dict[str, Any]


def read_published(path: Path, capacity: int | None) -> Problem:
    """The problem of a published file, without offsets and other columns."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = {ALIASES.get(name.strip(), name.strip()): name for name in reader.fieldnames or ()}
        missing = [name for name in ("id", "lower", "upper", "size") if name not in names]
        if missing:
            raise SystemExit(f"{path}: no column {', '.join(missing)} (there are: {', '.join(names)})")
        requests = tuple(
            Request(row[names["id"]], *(int(row[names[name]]) for name in ("lower", "upper", "size")))
            for row in reader
        )
    return Problem(requests=requests, capacity=capacity)


@dataclass(frozen=True)
class Memo:
    """memo_solver with so many threads, as a contender."""

    threads: int

    def __call__(self, problem: Problem, seconds: float) -> Answer:
        """Solve; the peak, and the status with the bound behind it."""
        solution = solve(problem, SolveParams(time_limit_seconds=seconds, num_threads=self.threads))
        return solution.peak, f"{solution.status.value} {solution.lower_bound}"


def measured(problem: Problem, limit: float, threads: int) -> Row:
    """One row, without names; the time is that of the whole process."""
    load_average = round(os.getloadavg()[0], 2)
    result = timed(Memo(threads), problem, limit)
    status, _, bound = str(result.pop("said")).partition(" ")
    if not bound.isdecimal():
        raise SystemExit(f"no answer: {status} {bound}")
    return {
        "num_requests": len(problem.requests), "capacity": problem.capacity, "load": peak_load(problem).bound,
        "lower_bound": int(bound), "status": status, **result, "load_average": load_average,
    }  # fmt: skip


def line(row: Row) -> str:
    """One line of the table that is printed."""
    asked = f"in {row['capacity']}" if row["capacity"] is not None else f"best known {row['best_known'] or '-'}"
    said = f"{row['status']}, peak {row['peak']}, bound {row['lower_bound']}, {row['seconds']:.2f} s"
    return f"{row['instance']} | {row['num_requests']} requests | {asked} | {said}, load {row['load_average']}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", required=True, help="what the instances are called, and who published them")
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--heights", type=Path, help="JSON file of best known heights")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--commit", help="for a checkout without git")
    parser.add_argument("--out", type=Path, default=RESULTS / "solver_published.jsonl")
    return parser.parse_args()


def main() -> None:
    """Measure every file of the folder, append the rows, print them."""
    arguments = parse()
    files = sorted(arguments.folder.glob("*.csv"))
    if not files:
        raise SystemExit(f"{arguments.folder}: there are no .csv files in it")
    known = {} if arguments.heights is None else json.loads(arguments.heights.read_text(encoding="utf-8"))
    problems = {path.stem: read_published(path, arguments.capacity) for path in files}
    head = {**provenance(arguments.commit), "threads": arguments.threads}
    names = {"set": arguments.set, "limit_seconds": arguments.limit}
    total = 0.0
    with arguments.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps({"provenance": head}) + "\n")
        for name, problem in problems.items():
            row = {"instance": name, **names, "best_known": known.get(name)}
            row |= measured(problem, arguments.limit, arguments.threads)
            out.write(json.dumps(row) + "\n")
            out.flush()
            total += row["seconds"]
            print(line(row), flush=True)
    print(f"{len(problems)} instances, {total:.1f} s in all")


if __name__ == "__main__":
    main()
