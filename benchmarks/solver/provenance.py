"""Where and with what a row about the solver was measured."""

from __future__ import annotations

import os
import platform
from typing import Any

from benchmarks.harness import provenance as harness
from memo_solver.native import native_status

RESULTS = harness.ROOT / "benchmarks" / "results"
PACKAGES = ("ortools", "pulp", "omnimalloc", "numpy")


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Commit, date, machine and versions; the load says how shared the machine was."""
    return {
        "commit": commit or harness.commit(),
        "date": harness.now(),
        "python": platform.python_version(),
        "cpu": harness.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "compiled_search": native_status().available,
        "versions": {package: harness.package_version(package) for package in PACKAGES},
    }
