"""Placed steps on disk, on a GPU: a second process is served from its first step and keeps the bits of its losses."""

import json
import subprocess
import sys

import pytest

from tests.house.sources import ROOT

pytestmark = pytest.mark.gpu

RUN = """
import json, os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch
import memo_runtime as memo
from memo_runtime.lookup import find_wrapped
from tests.gpu.models import batch, llama

torch.use_deterministic_algorithms(True, warn_only=True)
torch.manual_seed(0)
layout, steps = sys.argv[1], 4
model = llama(torch.bfloat16, blocks=4, hidden=512)
memo.wrap(model, policy="recompute", layout=layout)
losses, served = [], []
for at in range(steps):
    loss = model(**batch(1, 2048, at)).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    losses.append(float(loss.detach()))
    memory = find_wrapped(model).memory
    if memory is not None:
        memory.end()
        report = memory.report()
        served.append([report.state, report.served_bytes, report.bytes])
notes = list(memo.report(model).notes)
memo.unwrap(model)
print(json.dumps({"losses": losses, "served": served, "notes": notes}))
"""


def run(layout):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(layout)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_next_process_is_served_from_its_first_step(built_allocator, tmp_path):
    path = tmp_path / "steps.json.gz"
    native, first, second = run("native"), run(path), run(path)
    print(f"\n{first}\n{second}")
    assert path.exists()
    assert native["losses"] == first["losses"] == second["losses"]
    for state, served, asked in second["served"]:
        assert state == "planned", second["notes"]
        assert served >= 0.95 * asked
