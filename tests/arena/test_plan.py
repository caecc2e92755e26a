"""Plans that cannot be enabled here are refused by name, before anything is touched."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memo_runtime.allocator.library import NATIVE
from memo_runtime.arena.plan import ArenaPlan, check_arena_plan, check_memory, enable, plan_arena
from memo_runtime.errors import AllocatorPlanError
from memo_runtime.placement import PlacedRequest
from memo_runtime.traces.trace import Phase, Span, Trace, TraceRequest

GiB = 1 << 30


@pytest.fixture(autouse=True)
def a_device(monkeypatch):
    """A device of 80 GiB, of which 70 are free, 4 of this process reserved."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="card"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GiB, 80 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * GiB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def requests():
    """Three requests on two streams within a step, one that outlives it."""
    values = ((0, 3, 1000, 0), (1, 5, 600, 1), (2, 9, 50, 0), (4, 6, 1000, 0))
    return tuple(TraceRequest(*value) for value in values)


@pytest.fixture
def plan():
    ends = (TraceRequest(7, 8, 1, 0),)
    trace = Trace(ticks=9, requests=(*requests(), *ends), spans=(Span(Phase.STEP, "", 0, 9),))
    return plan_arena(trace, (0, 0x1230), 0, seconds=0.5, threads=1)


def test_a_step_becomes_a_plan(plan):
    check_arena_plan(plan)
    assert [row.size for row in plan.rows] == [1000, 600, 1000, 1]
    assert plan.streams == (0, 0x1230, 0, 0)
    assert plan.planned_bytes == 2601
    assert plan.step_bytes == 2651
    assert plan.size == plan.lower_bound == 1024 + 1024
    assert plan.resident_bytes == 512
    assert plan.residents == ((2, 50, 0),)
    assert plan.slots()[2] == (2, 3, 50, NATIVE, 0)
    assert plan.slots()[1] == (1, 5, 600, plan.rows[1].offset, 0x1230)


def test_small_requests_keep_apart_from_large_ones():
    values = ((0, 3, 4 << 20, 0), (1, 2, 1 << 20, 0), (4, 5, 6 << 20, 0), (6, 7, 600, 0))
    requests = tuple(TraceRequest(*value) for value in values)
    trace = Trace(ticks=8, requests=requests, spans=(Span(Phase.STEP, "", 0, 8),))
    plan = plan_arena(trace, (7,), 0, seconds=0.5, threads=1)
    check_arena_plan(plan)
    assert plan.streams == (7, 7, 7, 7)
    small = [row for row in plan.rows if row.size <= 1 << 20]
    large = [row for row in plan.rows if row.size > 1 << 20]
    borders = [(min(r.offset for r in part), max(r.offset + r.size for r in part)) for part in (small, large)]
    assert borders[0][1] <= borders[1][0] or borders[1][1] <= borders[0][0]
    assert plan.size == plan.lower_bound == 7 << 20


def moved(plan, index, **changes):
    rows = list(plan.rows)
    rows[index] = replace(rows[index], **changes)
    return {"rows": tuple(rows)}


REFUSED = {
    "another process": (lambda plan: {"process": 1}, "made in another process"),
    "another torch": (lambda plan: {"torch": "2.0.1"}, r"made with torch 2\.0\.1"),
    "no such device": (lambda plan: {"device": 3}, "for device 3; there are 1"),
    "another device": (lambda plan: {"device_name": "other"}, "made on 'other', and device 0 is 'card'"),
    "a stream is missing": (lambda plan: {"streams": plan.streams[:-1]}, "4 requests and the streams of 3"),
    "a stream that is none": (lambda plan: {"streams": (-1, *plan.streams[1:])}, "is no number of 64 bits"),
    "a resident that is none": (lambda plan: {"residents": ((2, 2**64, 0),)}, "no number of 64 bits"),
    "nothing in it": (lambda plan: {"rows": (), "streams": ()}, "2601 planned bytes of 2651, and its 0 requests"),
    "another sum": (lambda plan: {"planned_bytes": 2600}, "2600 planned bytes of 2651"),
    "less than nothing": (lambda plan: {"step_bytes": 0}, "2601 planned bytes of 0"),
    "two at one place": (lambda plan: moved(plan, 1, offset=plan.rows[0].offset), "share no address"),
    "outside": (lambda plan: moved(plan, 1, offset=plan.size), "above the capacity"),
    "below": (lambda plan: moved(plan, 1, offset=-512), "no offset is below zero"),
    "askew": (lambda plan: moved(plan, 1, offset=plan.rows[1].offset + 8), "multiple of the request's alignment"),
    "backwards": (lambda plan: moved(plan, 1, upper=0), "upper 0 is below lower 1"),
    "twice": (lambda plan: moved(plan, 1, id=plan.rows[0].id), "used by more than one request"),
    "no number": (lambda plan: moved(plan, 1, size=600.0), "must be an integer"),
    "fewer places": (lambda plan: {"places": plan.rows[1:]}, "and places for"),
    "out of its place": (
        lambda plan: {"places": plan.rows, "bounds": tuple((1, row.size + (row is plan.rows[1])) for row in plan.rows)},
        "leaves its place",
    ),
    "another place": (lambda plan: {"places": (plan.rows[1], *plan.rows[1:])}, "leaves its place"),
    "places that overlap": (
        lambda plan: moved(plan, 1, offset=plan.rows[0].offset)
        | {"places": moved(plan, 1, offset=plan.rows[0].offset)["rows"]},
        "share no address",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(plan, case):
    change, says = REFUSED[case]

    class Nothing:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    with pytest.raises(AllocatorPlanError, match=says):
        enable(Nothing(), replace(plan, **change(plan)))


def test_memory_that_is_not_there_is_said(plan, monkeypatch):
    large = replace(plan, size=75 * GiB)
    with pytest.raises(AllocatorPlanError, match=r"arena of 75\.\d+ GiB and the device has 70\.\d+ GiB left.* 5\.\d+"):
        check_memory(large, 0)
    check_memory(large, 76 * GiB)  # the arena is there already
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    with pytest.raises(AllocatorPlanError, match=r"has 36\.\d+ GiB left"):
        check_memory(large, 0)


def test_a_step_that_frees_nothing_has_no_plan():
    trace = Trace(ticks=1, requests=(TraceRequest(0, 1, 8, 0),), spans=(Span(Phase.STEP, "", 0, 1),))
    with pytest.raises(AllocatorPlanError, match="nothing to place"):
        plan_arena(trace, (0,), 0, seconds=0.5, threads=1)


def test_rows_are_what_the_value_says():
    assert ArenaPlan.__dataclass_params__.frozen
    assert PlacedRequest.__dataclass_params__.frozen
