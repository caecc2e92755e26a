"""Every claim about the solver in one command, on as many workers as there are cores for.

    python -m benchmarks.solver.table --workers 7 --threads 2 --minutes 9 --rival-seeds 15     on 16 cores
    python -m benchmarks.solver.table --workers 1 --threads 2 --minutes 15 --rival-seeds 5 --without compiler
    python -m benchmarks.solver.table --section traces --workers 1 --out rows.jsonl
    python -m benchmarks.solver.document                                        the rows into docs/solver.md

Each worker is bound to `threads` cores of its own, and so is whatever it runs. Rows are appended one by one;
what a file holds already (same commit and number of threads) is not run again, so a run that ended at its
--minutes goes on where it stopped. The table that is printed last comes from the rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import queue
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import ROOT
from benchmarks.solver.provenance import RESULTS, provenance
from benchmarks.solver.sections import SECTIONS, Job, jobs_of

Row = dict[str, Any]


def build_native() -> None:
    """Build the compiled search in place where it is missing or old, as setup.py does but without setuptools."""
    library = ROOT / "solver" / "memo_solver" / "_search.so"
    sources = sorted(ROOT.glob("csrc/solver/*"))
    if library.exists() and all(library.stat().st_mtime >= path.stat().st_mtime for path in sources):
        return
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise SystemExit("the table needs a C++ compiler (c++, g++ or clang++) for csrc/solver, and there is none")
    flags = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-I", "csrc/solver")
    units = [str(path) for path in sources if path.suffix == ".cpp"]
    subprocess.run([compiler, *flags, *units, "-o", str(library)], cwd=ROOT, check=True)


def read_rows(path: Path) -> list[Row]:
    """Rows of a file, each with the provenance that stands before it; a line cut short at the end is left out."""
    rows: list[Row] = []
    known: Row = {}
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "provenance" in row:
            known = row["provenance"]
        else:
            rows.append({**row, "provenance": known})
    return rows


def work(jobs: list[Job], numbers: Queue[int], answers: Queue[Any], cores: set[int], end: float) -> None:
    """One worker: takes job numbers until there are none, or none that can end in time."""
    os.sched_setaffinity(0, cores)
    while True:
        try:
            number = numbers.get_nowait()
        except queue.Empty:
            break
        job = jobs[number]
        if time.monotonic() + 1.1 * job.limit_seconds + 3 > end:
            continue
        try:
            row = job.run()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        answers.put((number, row))
    answers.put(None)


def run(jobs: list[Job], arguments: argparse.Namespace, cores: list[int]) -> None:
    """Run the jobs on the workers and append their rows as they come."""
    context = multiprocessing.get_context("fork")
    numbers, answers = context.Queue(), context.Queue()
    for number in range(len(jobs)):
        numbers.put(number)
    time.sleep(0.2)  # the queue's feeder has to have put something before workers may find it empty
    end = time.monotonic() + 60 * arguments.minutes
    groups = [set(cores[k * arguments.threads : (k + 1) * arguments.threads]) for k in range(arguments.workers)]
    workers = [context.Process(target=work, args=(jobs, numbers, answers, group, end)) for group in groups]
    for worker in workers:
        worker.start()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    head = {**provenance(arguments.commit), "workers": arguments.workers, "threads": arguments.threads}
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write("\n" if _ends_inside_a_line(arguments.out) else "")
        file.write(json.dumps({"provenance": head}) + "\n")
        running, done = len(workers), 0
        while running:
            try:
                answer = answers.get(timeout=5)
            except queue.Empty:
                if not any(worker.is_alive() for worker in workers):
                    break  # killed: what they did not send is run again next time
                continue
            if answer is None:
                running -= 1
                continue
            number, row = answer
            job, done = jobs[number], done + 1
            names = {"section": job.section, "group": job.group, "instance": job.instance}
            names |= {"contender": job.contender, "limit_seconds": job.limit_seconds}
            file.write(json.dumps({**names, **row}) + "\n")
            file.flush()
            print(f"{done}/{len(jobs)} {job.section} {job.instance} {job.contender}", file=sys.stderr, flush=True)
    numbers.cancel_join_thread()
    for worker in workers:
        worker.join()


def _ends_inside_a_line(path: Path) -> bool:
    content = path.read_bytes() if path.exists() else b""
    return bool(content) and not content.endswith(b"\n")


def key_of(row: Row) -> tuple[str, str, str, str, float]:
    """The job that a row answers."""
    return row["section"], row["group"], row["instance"], row["contender"], row["limit_seconds"]


def table(rows: list[Row]) -> list[str]:
    """Lines of the table: counts where there are many seeds, one line each otherwise."""
    lines = []
    counted: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "solved" in row:
            counted[row["group"], row["contender"]].append(row)
        elif row["section"] == "traces" and "waste" in row:
            waste = "none" if row["waste"] is None else f"{row['waste']:.3%}"
            said = f"waste {waste}, {row['seconds']} s, {row['peak_rss_mib']} MiB"
            lines.append(f"{row['instance']} | {row['contender']} | {said}")
        else:
            names = ("section", "group", "instance", "contender", "limit_seconds", "provenance", "stages")
            shown = ", ".join(f"{name} {value}" for name, value in row.items() if name not in names)
            lines.append(f"{row['instance']} | {row['contender']} | {shown}")
    for (group, contender), runs in counted.items():
        times = sorted(row["seconds"] for row in runs if row["solved"])
        total = sum(min(row["seconds"], row["limit_seconds"]) for row in runs)
        speed = f"median {times[len(times) // 2]} s, slowest {times[-1]} s" if times else "none in time"
        lines.append(f"{group} | {contender} | {len(times)} of {len(runs)} | {speed} | all runs {total:.0f} s")
    return lines


NEEDED = {
    "cp-sat": "ortools",
    "omnimalloc supermalloc": "omnimalloc",
    "omnimalloc omni": "omnimalloc",
    "memo_solver and MIP": "pulp",
    "memo_solver": "ortools",
}
"""Package of each contender; a missing one must not look like a lost race."""


def check_packages(jobs: list[Job]) -> None:
    """End here where a contender's package is not installed."""
    packages = {NEEDED[job.contender] for job in jobs if job.contender in NEEDED}
    missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)} (pip install them, or leave contenders out)")


def parse() -> argparse.Namespace:
    """The command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=list(SECTIONS), help="again for more; default: all")
    parser.add_argument("--contender", action="append", help="only these; default: all")
    parser.add_argument("--workers", type=int, default=max(1, cores // 2))
    parser.add_argument("--threads", type=int, default=2, help="cores of each worker")
    parser.add_argument("--minutes", type=float, default=600.0, help="no job is begun that could end after this")
    parser.add_argument("--without", action="append", choices=list(SECTIONS), default=[], help="leave out; or more")
    parser.add_argument("--rival-seeds", type=int, help="other planners on the first instances of each group only")
    parser.add_argument("--seeds", type=int, help="at most this many of each group")
    parser.add_argument("--commit", help="for a checkout without git")
    parser.add_argument("--out", type=Path, default=RESULTS / "solver_table.jsonl")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.threads < 1 or arguments.workers * arguments.threads > cores:
        parser.error(f"{arguments.workers} workers of {arguments.threads} threads do not fit on {cores} cores")
    return arguments


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    build_native()
    sections = [name for name in arguments.section or SECTIONS if name not in arguments.without]
    wanted = [job for name in sections for job in jobs_of(name, arguments.seeds)]
    if arguments.rival_seeds is not None:
        wanted = [job for job in wanted if not job.is_rival or job.number < arguments.rival_seeds]
    wanted = [job for job in wanted if not arguments.contender or job.contender in arguments.contender]
    commit = provenance(arguments.commit)["commit"]
    present = [
        row
        for row in read_rows(arguments.out)
        if row["provenance"].get("commit") == commit
        and row["provenance"].get("threads") == arguments.threads
        and "error" not in row
    ]
    done = {key_of(row) for row in present}
    missing = [job for job in wanted if job.key not in done]
    if missing:
        check_packages(missing)
        run(missing, arguments, sorted(os.sched_getaffinity(0)))
    keys = {job.key for job in wanted}
    rows = {key_of(row): row for row in read_rows(arguments.out) if key_of(row) in keys}
    print("\n".join(table(list(rows.values()))))
    print(f"{len(rows)} of {len(wanted)} jobs have a row in {arguments.out}")


if __name__ == "__main__":
    main()
