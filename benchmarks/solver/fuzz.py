"""Mutated input files through the readers: an error that names the file, or an answer.

    python -m benchmarks.solver.fuzz --files 100000
"""

from __future__ import annotations

import argparse
import time

from benchmarks.solver.provenance import append_row
from tests.solver.test_fuzz import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    arguments = parser.parse_args()
    start = time.monotonic()
    num_read, num_refused = run(0, arguments.files)
    row = {
        "contender": "memo_solver readers",
        "instances": "mutated CSV and JSON files",
        "num_files": arguments.files,
        "num_read": num_read,
        "num_refused": num_refused,
        "num_crashed": 0,  # a crash ends this script without a row
        "seconds": round(time.monotonic() - start, 1),
    }
    append_row("fuzz", row)
    print(row)


if __name__ == "__main__":
    main()
