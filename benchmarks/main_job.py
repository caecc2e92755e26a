"""Runs the main job (examples/train_text.py) on a GPU and appends one row with provenance.

    python -m benchmarks.main_job --out benchmarks/results/main_job_h100.jsonl --commit HASH -- \
        --geometry llama-1b-d128 --seq-len 128K --dtype bfloat16 --budget 60GiB --host-budget 60GiB

What follows ``--`` goes to the example. A row says what was asked, what was measured (median, p20, p80 and n of the
steps after the first, which profiles and plans) and on what.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import gpu_facts, now, versions
from benchmarks.harness.timing import percentiles

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_text.py"
STATUS = {0: "ok", 3: "oom"}


def make_row(result: dict[str, Any], returned: int, commit: str, command: list[str]) -> dict[str, Any]:
    """The row of one run; field names as in the other result files."""
    return {
        "run": "main_job",
        "contender": f"memo-{result['policy']}",
        "geometry": result["geometry"],
        "seq_len": result["seq_len"],
        "status": STATUS.get(returned, "error"),
        **percentiles(result["seconds"][1:] or result["seconds"]),
        "first_step_seconds": result["seconds"][0],
        "mfu": result["mfu"],
        "tokens_per_second": result["tokens_per_second"],
        "peak_allocated": result["peak_bytes"],
        "peak_reserved": result["peak_reserved"],
        "host_rss": result["host_rss"],
        "pinned_bytes": result["host_bytes"],
        "budget": result["budget"],
        "host_budget": result["host_budget"],
        "bytes_to_host": result["bytes_to_host"],
        "recomputed_flops": result["recomputed_flops"],
        "forecast": result["forecast"],
        "losses": result["losses"],
        "max_rel_loss_diff": result["max_rel_loss_diff"],
        "config": command,
        **gpu_facts(),
        "commit": commit,
        "date": now(),
        "versions": versions(),
    }


def main() -> int:
    """Run the example and append its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file to append to")
    parser.add_argument("--commit", required=True, help="commit of the tree that runs")
    parser.add_argument("example", nargs=argparse.REMAINDER, help="-- and the example's own options")
    options = parser.parse_args()
    command = [part for part in options.example if part != "--"]
    example = [sys.executable, str(EXAMPLE), "--device", "cuda", *command]
    done = subprocess.run(example, stdout=subprocess.PIPE, text=True)
    if not done.stdout.strip():
        print(f"the example ended with code {done.returncode} and no result; no row written", file=sys.stderr)
        return done.returncode or 1
    row = make_row(json.loads(done.stdout.splitlines()[-1]), done.returncode, options.commit, command)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = ("seq_len", "status", "step_seconds", "mfu", "peak_allocated", "budget")
    print(json.dumps({key: row[key] for key in shown}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
