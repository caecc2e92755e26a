"""Names in a profiler's trace: annotations while one records, on this thread or on all."""

import threading

import torch
from torch.profiler import profile

from memo_runtime.execution.ranges import named


def annotations(recorded):
    return {event.name for event in recorded.events() if event.is_user_annotation}


def test_a_profiler_sees_an_annotation():
    with profile() as recorded, named("memo::tiles blocks.0"):
        torch.ones(2)
    assert "memo::tiles blocks.0" in annotations(recorded)
    with named("nobody records"):
        torch.ones(2)


def test_so_it_is_while_another_thread_records():
    found = []

    def other():
        with named("memo::tiles blocks.0") as range_of:
            found.append(type(range_of))

    with profile():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    with named("memo::tiles blocks.0") as range_of:
        found.append(type(range_of))
    assert found[0] is torch.autograd.profiler.record_function
    assert found[1] is not found[0]
