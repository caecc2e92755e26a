"""What every GPU test starts from: cuBLAS that repeats its bits, and a device without another test's tensors."""

import gc
import os

import pytest
import torch

# Set before CUDA starts: cuBLAS repeats its bits only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def a_device_without_garbage():
    """Models of tests before this one sit in reference cycles, and a plan counts what is allocated.

    What the allocator keeps of them goes back too: tests of other processes share the device.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture(scope="session")
def built_allocator():
    """The planned allocator, built where it is not there yet."""
    from memo_runtime.allocator.building import build
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.allocator.versions import library_path, running
    from memo_runtime.errors import AllocatorUnavailableError

    try:
        if not library_path(running()).exists():
            build()
    except AllocatorUnavailableError as error:
        pytest.skip(f"the planned allocator cannot be built here: {error}")
    return planned_allocator()


@pytest.fixture
def allocator(built_allocator):
    """The planned allocator in front of PyTorch's own; nothing lives in it before or after."""
    built_allocator.install()
    yield built_allocator
    gc.collect()
    assert built_allocator.disarm(0) == 0, "planned tensors are alive"


@pytest.fixture
def quiet_machine():
    """Skips where other tests run beside this one: seconds would be theirs too."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("measures seconds and rates: needs the machine to itself, run it without -n")
