"""The native core under NVIDIA's memory checker: no access outside of what was allocated, no error of the driver."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memo_runtime.native.library import native_status

CHECKER = shutil.which("compute-sanitizer")
ROOT = Path(__file__).parents[2]
#: Under the checker seconds mean nothing.
UNTIMED = "not links and not pinning_is_fast and not host_time"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CHECKER is None, reason="compute-sanitizer, which is part of the CUDA toolkit, is not in PATH"),
    pytest.mark.skipif(not native_status().available, reason=f"the native core is {native_status().reason}"),
]


def test_the_core_is_clean_under_memcheck():
    command = [str(CHECKER), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "tests/gpu/test_native.py", "-k", UNTIMED]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
