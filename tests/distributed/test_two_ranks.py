"""DDP and ``fully_shard`` over two gloo processes: the gradients of the unwrapped model on both batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.api.towers import BOUND
from tests.distributed.two_ranks import GROUPS, RANKS, Case

ROOT = Path(__file__).parents[2]


def run(folder: Path, *groups: str) -> list[dict[str, Any]]:
    """By rank: what came of every case of ``groups``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'solver'}"}
    command = [sys.executable, "-m", "tests.distributed.two_ranks", str(folder)]
    output = [(folder / f"{rank}.txt").open("w") for rank in range(RANKS)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *groups], cwd=ROOT, env=environment, stdout=output[rank], stderr=subprocess.STDOUT
        )
        for rank in range(RANKS)
    ]
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process, file in zip(processes, output, strict=True):
            process.kill()
            process.wait()
            file.close()
    assert codes == [0] * RANKS, [(folder / f"{rank}.txt").read_text()[-2000:] for rank in range(RANKS)]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def wrong(case: Case, outcome: dict[str, Any]) -> str:
    """What is wrong with one rank's outcome of ``case``; nothing if all is well."""
    if "failed" in outcome:
        return str(outcome["failed"])
    if outcome["error"] > BOUND:
        return f"gradients are off by {outcome['error']}"
    if case.parallel == "parts":
        return "" if "sharded one by one" in outcome["native"][0] else f"it is managed: {outcome}"
    if not outcome["acted"] or (outcome["rebuilt"] > 0) != (case.policy != "swap"):
        return "bytes or FLOPs are not the plan's"
    if outcome["profiled"] != 1:
        return f"it was profiled {outcome['profiled']} times"
    return f"{outcome['held']} bytes are still held" if outcome["held"] else ""


def all_wrong(folder: Path, *groups: str) -> dict[str, str]:
    by_rank = run(folder, *groups)
    found = {
        f"{case.name}, rank {rank}": wrong(case, outcomes[case.name])
        for group in groups
        for case in GROUPS[group]
        for rank, outcomes in enumerate(by_rank)
    }
    return {name: what for name, what in found.items() if what}


def test_gradients_are_those_of_the_unwrapped_model(tmp_path: Path) -> None:
    """One pair of processes for all cases: starting them costs more than many cases do.

    Where shapes are new to one rank alone, no rank waits for a collective of the other: a known profile is scaled, and
    nothing is profiled twice.
    """
    assert all_wrong(tmp_path, "first", "apart") == {}


@pytest.mark.slow
def test_with_every_policy_in_every_order(tmp_path: Path) -> None:
    assert all_wrong(tmp_path, "every", "uneven") == {}


@pytest.mark.slow
def test_blocks_by_tiles(tmp_path: Path) -> None:
    """Captured in the first forward, under the hooks that gather and send around."""
    assert all_wrong(tmp_path, "tiled") == {}
