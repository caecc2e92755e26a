"""Where and with what a row was measured, and how rows are written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("ortools", "pulp", "omnimalloc", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def provenance() -> dict[str, Any]:
    """Commit, date, machine and versions; the load says how shared the machine was."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "shared_machine": True,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def append_row(name: str, row: dict[str, Any]) -> None:
    """Append one row to benchmarks/results/solver_NAME.jsonl."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"solver_{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "provenance": provenance()}) + "\n")
