"""The shell in front of torch's real caching allocator, on a CUDA runtime that is imitated in host memory.

Runs where torch is built with CUDA and there is no GPU: tests of tests/gpu that look at no contents, in a process of
their own with the imitation preloaded.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.allocator.building import HERE, compile_unit, cuda_headers
from tests.house.sources import ROOT
from tests.native.building import compiler

#: Those of tests/gpu/test_allocator.py that run no kernel whose result matters.
WITHOUT_CONTENTS = "edges or statistics or history or refused or nobody or bytes_go or bound"
if hasattr(torch.cuda.memory, "_annotate_tensor"):  # from torch 2.14 on
    WITHOUT_CONTENTS += " or annotations"


@pytest.fixture(scope="module")
def imitation(tmp_path_factory):
    """Environment of a process with two devices that are host memory."""
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs torch built with CUDA, and no GPU")
    headers = cuda_headers()
    if compiler() is None or headers is None:
        pytest.skip("needs a C++ compiler and the headers of a CUDA runtime")
    folder = tmp_path_factory.mktemp("imitation")
    runtime, driver = folder / "libfake_cudart.so", folder / "libcuda.so.1"
    made = compile_unit([HERE / "fake_cudart.cpp"], runtime, "-shared", "-fPIC", "-isystem", str(headers))
    assert made.returncode == 0, made.stderr
    made = compile_unit([HERE / "fake_driver.cpp"], driver, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    assert made.returncode == 0, made.stderr
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    imitated = {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": path, "FAKE_CUDA_BYTES": str(8 << 30)}
    return {**os.environ, **imitated, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "solver")])}


def test_the_allocator_on_an_imitated_device(imitation):
    names = ("test_allocator.py", "test_allocator_edges.py", "test_allocator_beside.py")
    files = [str(Path("tests") / "gpu" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", WITHOUT_CONTENTS, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=imitation, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_a_wrapped_model_plans_its_steps(imitation):
    command = [sys.executable, "-m", "tests.allocator.wrapped_steps"]
    environment = {**imitation, "MEMO_NATIVE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    native, planned, written, read = json.loads(done.stdout.splitlines()[-1])
    assert "state" not in native
    assert planned["state"] == "planned", planned["notes"]
    # What the model asked for is what was in use, wherever it was served.
    assert (planned["peak"], planned["allocated"]) == (native["peak"], native["allocated"])
    # The next batch is made before its step begins.
    assert planned["misses"] == [["resident", 1]]
    assert planned["served"] == planned["requests"] - 1 > 50
    assert planned["planned_peak"] == planned["bound"]
    # What a run keeps in a file serves the first steps of the next one.
    assert written["served"] == planned["served"]
    assert read["state"] == "planned", read["notes"]
    assert read["served"] >= planned["served"] - 1
    assert (written["notes"], read["notes"]) == (planned["notes"], planned["notes"])


def test_lengths_that_never_come_back_are_served_though_scratch_is_padded(imitation):
    command = [sys.executable, "-m", "tests.allocator.varied_steps"]
    environment = {**imitation, "MEMO_NATIVE": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    for run in json.loads(done.stdout.splitlines()[-1]):
        for step in run["steps"]:
            assert (step["state"], step["plans"]) == ("planned", 1), run["notes"]
            assert step["served_bytes"] >= 0.999 * step["bytes"], step


def test_the_benchmark_measures_each_length_and_lengths_that_vary(imitation):
    command = [sys.executable, "-m", "tests.allocator.benchmark_rows"]
    done = subprocess.run(command, capture_output=True, text=True, env=imitation, cwd=ROOT, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["way"], row["varied"], row["seq_len"], row["status"]) for row in rows] == [
        ("native", False, 16384, "ok"), ("native", False, 32768, "ok"),
        ("planned", False, 16384, "ok"), ("planned", False, 32768, "ok"), ("planned", True, 32768, "ok"),
    ], done.stderr[-6000:]  # fmt: skip
    assert rows[0]["peak_allocated"] < rows[1]["peak_allocated"]
    for row in rows[2:]:
        assert row["served_bytes"] > (0.97 if row["varied"] else 0.99)  # each length brings its own batch
        assert row["arena_over_bound"] <= 1.02 or row["varied"]
        assert (row["device_allocs"], row["device_frees"], row["retries"]) == (0, 0, 0)
