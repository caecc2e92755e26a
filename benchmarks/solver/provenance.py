"""Where and with what a row was measured, and how rows are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from typing import Any

from benchmarks.harness.provenance import ROOT, cpu_name, now, package_version

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ortools", "pulp", "omnimalloc", "numpy")


def provenance() -> dict[str, Any]:
    """Commit, date, machine and versions; the load says how shared the machine was."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "date": now(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "shared_machine": True,
        "versions": {package: package_version(package) for package in PACKAGES},
    }


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append one row to benchmarks/results/solver_NAME.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"solver_{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "provenance": provenance()}) + "\n")
