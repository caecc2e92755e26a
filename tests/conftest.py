"""What every test shares: one thread per worker, less for the garbage collector to look at, skips of GPU tests."""

import gc
import importlib.util
import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # Workers of pytest-xdist share the machine's cores: more threads than one each only fight.
    if "PYTEST_XDIST_WORKER" in os.environ and importlib.util.find_spec("torch"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        import torch

        torch.set_num_threads(1)


def _freeze():
    """What is there now lives to the end: modules, test items, what is cached.

    Many tests collect garbage at every step, and looking through all that PyTorch and transformers define takes 0.4 s
    each time.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    result = yield
    # Tests import more as they go, compilers above all.
    if nextitem is None or nextitem.path != item.path:
        _freeze()
    return result


def pytest_collection_modifyitems(config, items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in marked:
        item.add_marker(skip)
