"""Tiled blocks under DDP and ``fully_shard`` over two gloo processes: the gradients of the plain model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.tiled_ranks import CASES, RANKS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_gradients_are_those_of_the_plain_model(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'solver'}"}
    command = [sys.executable, "-m", "tests.distributed.tiled_ranks", str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        texts = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, [text[-2000:] for text in texts]
    for rank in range(RANKS):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(errors) == len(CASES)
        assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}
