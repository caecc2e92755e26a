"""A thread that does not start is a shortage of memory where that is what its stack lacks, and nothing else."""

import resource
import threading

import pytest

from memo_runtime.rehearsal.failure import ran_out
from memo_runtime.rehearsal.threads import is_of_a_thread
from tests.short_memory import little_memory


def test_no_memory_for_a_stack_is_no_memory():
    with little_memory(4 << 20):
        before = threading.stack_size(256 << 20)
        try:
            with pytest.raises(RuntimeError) as caught:
                threading.Thread(target=print).start()
            assert is_of_a_thread(caught.value)
            assert ran_out(caught.value)
        finally:
            threading.stack_size(before)


def test_where_memory_is_not_limited_it_is_something_else():
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
    assert not ran_out(RuntimeError("can't start new thread"))
    assert not ran_out(RuntimeError("Resource temporarily unavailable"))
    assert not is_of_a_thread(ValueError("can't start new thread"))
