"""Which steps are recorded, when a plan is there, when it is given up: on an allocator that writes down its calls."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from memo_runtime.allocator.library import Counts, Statistics
from memo_runtime.arena.model import StepMemory
from memo_runtime.arena.solving import Solved, Solving
from memo_runtime.arena.steps import _MOST_GROWN, MOST_TRIES, MOST_WEAK, SETTLING, PlannedSteps, is_planned_for_others
from memo_runtime.errors import AllocatorPlanError, AllocatorUnavailableError
from memo_runtime.placement import PlacedRequest
from memo_runtime.traces.trace import Phase, Span, Trace, TraceRequest

STEP = Trace(
    ticks=6,
    requests=(TraceRequest(0, 3, 1000, 0), TraceRequest(1, 2, 600, 0), TraceRequest(4, 5, 50, 0)),
    spans=(Span(Phase.STEP, "", 0, 6),),
)
NOTHING = dict.fromkeys((field.name for field in fields(Counts)), 0)


class Allocator:
    """Writes down what it is asked; ``served`` of 1,650 bytes are served in a step."""

    def __init__(self):
        self.calls = []
        self.served = 1650
        self.given_back = 0
        self.others = []
        self.refuses = ""
        self.arena = 0

    def arm(self, device, slots, size, bounds=None):
        if self.refuses:
            raise AllocatorPlanError(self.refuses)
        self.arena = max(self.arena, size)
        self.calls.append("arm")

    def disarm(self, device):
        self.arena = 0
        self.calls.append("disarm")
        return 0

    def begin_step(self, device):
        self.calls.append("begin")

    def end_step(self, device):
        self.calls.append("end")

    def misfits(self, device):
        return self.others

    def statistics(self, device):
        served = {"requests": 3, "served": 3, "bytes": 1650, "served_bytes": self.served, "occupied": 1}
        last = Counts(**{**NOTHING, **served})
        return Statistics(
            total=Counts(**NOTHING), last_step=last, steps=1, live=0, live_bytes=0, live_requested=0, peak_bytes=0,
            arena_bytes=self.arena, bypassed=0, given_back=self.given_back, armed=True,
        )  # fmt: skip


class Recorder:
    stream_handles = (0,)

    def __init__(self, told):
        self.told = told

    def __enter__(self):
        self.told.append("record")

    def __exit__(self, *error):
        self.told.append("recorded")

    def begin(self, phase, block=""):
        assert phase is Phase.STEP

    end = begin

    def trace(self):
        return STEP


class Solver:
    """Done when it is told so."""

    def __init__(self, trace, seconds):
        assert trace.spans == STEP.spans
        self.trace = trace
        self.done = self.closed = False

    def result(self):
        rows, room = [], max(r.size for r in self.trace.requests) // 512 * 512 + 512
        for at, r in enumerate(self.trace.requests):
            rows.append(PlacedRequest(id=str(at), lower=r.lower, upper=r.upper, size=r.size, offset=at * room))
        return Solved(
            rows=tuple(rows), placed=(0, 1, 2), peak=4 * room, lower_bound=2048, resident_bytes=0, seconds=0.1
        )

    def wait(self):
        self.done = True

    def close(self):
        self.closed = True


@pytest.fixture
def rig(monkeypatch):
    """Planned steps on device 0, with everything around them."""
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="card"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    one = SimpleNamespace(allocator=Allocator(), notes=[], solvers=[], moved=[])
    monkeypatch.setattr("memo_runtime.arena.plan.compact", lambda tensors, device: one.moved.append(list(tensors)) or 0)

    def solver(trace, seconds):
        one.solvers.append(Solver(trace, seconds))
        return one.solvers[-1]

    one.steps = PlannedSteps(
        one.allocator, 0, one.notes.append, recorder=lambda device: Recorder(one.allocator.calls), solver=solver
    )
    yield one
    one.steps.close()


def run(rig, key, count):
    rig.allocator.calls.clear()
    for _ in range(count):
        rig.steps.begin(key)
    return list(rig.allocator.calls)


def planned(rig, key):
    """Steps of ``key`` until its plan is there."""
    run(rig, key, SETTLING + 2)
    rig.solvers[-1].done = True


def test_the_third_step_is_recorded_and_later_ones_served(rig):
    assert run(rig, "a", SETTLING) == []
    assert run(rig, "a", 1) == ["record"]
    assert run(rig, "a", 1) == ["recorded"]  # training goes on while it is solved
    assert run(rig, "a", 2) == []
    rig.solvers[0].done = True
    assert run(rig, "a", 1) == ["disarm", "arm", "begin"]
    assert run(rig, "a", 2) == ["end", "begin", "end", "begin"]
    rig.steps.end()
    report = rig.steps.report()
    assert (report.state, report.plans, report.served_bytes, report.bytes) == ("planned", 1, 1650, 1650)
    assert (report.planned_peak, report.lower_bound, report.misses) == (4096, 2048, (("occupied", 1),))
    assert rig.notes == []


def test_weights_and_the_batch_are_moved_together_where_the_arena_is_made(rig):
    weight, batch = torch.ones(1), torch.ones(2)
    rig.steps._long_lived = lambda: iter([weight])
    planned(rig, "a")
    assert rig.moved == []
    for _ in range(2):
        rig.steps.begin("a", batch=[batch])
    (moved,) = rig.moved
    assert [id(tensor) for tensor in moved] == [id(weight), id(batch)]


def test_what_follows_a_step_is_none_of_it(rig):
    planned(rig, "a")
    run(rig, "a", 1)
    rig.steps.end()
    rig.steps.end()
    assert rig.allocator.calls[-1] == "end"
    assert rig.allocator.calls.count("end") == 1


def test_kinds_have_plans_of_their_own_and_share_the_arena(rig):
    planned(rig, "a")
    assert run(rig, "a", 1) == ["disarm", "arm", "begin"]
    assert run(rig, "b", SETTLING + 1) == ["end", "record"]
    run(rig, "b", 1)
    rig.solvers[-1].done = True
    assert run(rig, "b", 1) == ["arm", "begin"]
    assert run(rig, "a", 1) == ["end", "arm", "begin"]
    assert rig.steps.report().plans == 2


def test_a_plan_that_serves_too_little_is_made_again_and_then_given_up(rig):
    rig.allocator.served = 800
    for _ in range(MOST_TRIES):
        rig.steps.begin("a")
        planned(rig, "a")
        run(rig, "a", MOST_WEAK + 1)
    assert len(rig.solvers) == MOST_TRIES
    assert len(rig.notes) == 1
    assert "48 % of the bytes" in rig.notes[0]
    assert run(rig, "a", 3) == []


class LongerRecorder(Recorder):
    """Records steps that are as long as ``tokens`` says."""

    tokens = recorded = 0

    def __enter__(self):
        super().__enter__()
        self.recorded = self.tokens

    def trace(self):
        requests = tuple(replace(r, size=r.size * self.recorded) for r in STEP.requests)
        return replace(STEP, requests=requests)


@pytest.fixture
def lengths(rig):
    """``lengths(tokens, ...)``: steps of these, each solved before the next; what the allocator was asked."""
    recorder = LongerRecorder(rig.allocator.calls)
    rig.steps._make_recorder = lambda device: recorder

    def run_lengths(*all_tokens):
        rig.allocator.calls.clear()
        for recorder.tokens in all_tokens:
            rig.steps.begin("a", recorder.tokens)
            for solver in rig.solvers:
                solver.done = True
        rig.steps.end()
        for solver in rig.solvers:
            solver.done = True
        return list(rig.allocator.calls)

    return run_lengths


def test_two_recorded_lengths_plan_all_up_to_the_longest_of_a_bucket(rig, lengths):
    assert lengths(900, 900, 1000, 1200, 1300, 1200) == ["record", "recorded", "record", "recorded"]
    assert lengths(1100, 1408, 7, 1200) == ["disarm", *["arm", "begin", "end"] * 4]
    assert len(rig.solvers) == 2
    assert rig.steps.report().plans == 1
    # Longer than the bucket of 1,300: the next placement comes from the same recordings.
    assert lengths(2000) == []
    assert lengths(2000, 2048, 1000) == ["disarm", *["arm", "begin", "end"] * 3]
    assert len(rig.solvers) == 3
    assert rig.notes == []


def test_lengths_that_are_no_program_of_one_kind_are_placed_by_themselves(rig, lengths):
    # Of two lengths in a row the second is not recorded: the first is being solved.
    lengths(900, 900, 1000, 1200, 1300)
    for at in range(1, MOST_TRIES + 1):
        rig.allocator.served = 500
        assert lengths(*[1100] * MOST_WEAK).count("begin") == MOST_WEAK
        assert rig.steps.report().plans == 0
        rig.allocator.served = 1650
        assert lengths(1000 + at, 1150, 1200 + at).count("record") == 2
    # The last time, the two said nothing of other lengths any more.
    assert "begin" in lengths(1200 + MOST_TRIES)
    assert "begin" not in lengths(1150)


def test_where_memory_is_short_there_is_no_room_for_longer_steps(rig, lengths, monkeypatch):
    monkeypatch.setattr("memo_runtime.arena.steps._TIGHT", 1e-6)
    lengths(900, 900, 1000, 1200, 1300, 1200)
    assert "begin" in lengths(1300)
    assert "begin" not in lengths(1301)


def test_a_step_that_may_run_out_of_memory_waits_for_its_place(rig, lengths, monkeypatch):
    lengths(900, 900, 1000, 1200, 1300)
    monkeypatch.setattr("memo_runtime.arena.steps._ROOMY", 1e-6)
    assert lengths(2100) == ["disarm", "arm", "begin", "end"]


def test_what_an_earlier_run_placed_serves_the_first_step_even_a_longer_one(rig, lengths, monkeypatch):
    lengths(900, 900, 1000, 1200, 1300)
    rig.steps.wait()
    known = rig.steps.placements()
    assert list(known) == ["a"]
    rig.steps.close()
    told = []
    again = PlannedSteps(
        rig.allocator, 0, rig.notes.append, known=known, on_placed=lambda: told.append(again.placements()),
        recorder=lambda device: Recorder(rig.allocator.calls), solver=lambda trace, seconds: Solver(trace, seconds),
    )  # fmt: skip
    rig.allocator.calls.clear()
    again.begin("a", 1100)
    again.end()
    assert rig.allocator.calls == ["disarm", "arm", "begin", "end"]
    monkeypatch.setattr("memo_runtime.arena.steps._ROOMY", 1e-6)
    rig.allocator.calls.clear()
    again.begin("a", 2100)  # no step ran without a plan before it
    again.end()
    assert rig.allocator.calls == ["disarm", "arm", "begin", "end"]
    assert [max(one.tokens for one in found["a"]) for found in told] == [2304]
    again.close()
    assert rig.notes == []


def test_one_odd_step_changes_nothing(rig):
    planned(rig, "a")
    run(rig, "a", 2)
    for served in (0, 1650, 0, 0, 1650, 0):
        rig.allocator.served = served
        assert run(rig, "a", 1) == ["end", "begin"]
    assert len(rig.solvers) == 1


def test_a_plan_without_memory_is_left_with_the_reason(rig):
    planned(rig, "a")
    rig.allocator.refuses = "the plan needs 5 GiB too much"
    run(rig, "a", 2)
    assert rig.notes == ["memory is left to PyTorch's allocator: the plan needs 5 GiB too much"]
    assert rig.steps.report().state == "the plan needs 5 GiB too much"
    assert "begin" not in rig.allocator.calls


def test_an_arena_that_was_given_back_is_not_made_again(rig):
    planned(rig, "a")
    run(rig, "a", 2)
    rig.allocator.given_back = 1
    assert run(rig, "a", 3) == ["end", "disarm"]
    assert "memory ran out beside the arena" in rig.notes[0]


def test_an_arena_that_an_evaluation_took_is_made_again(rig):
    planned(rig, "a")
    run(rig, "a", 2)
    for given_back in (1, 2):
        rig.steps.end()  # an evaluation begins
        rig.allocator.calls.clear()
        rig.allocator.given_back, rig.allocator.arena = given_back, 0
        assert run(rig, "a", 2)[-4:] == ["arm", "begin", "end", "begin"]
    assert rig.notes == [
        "memory ran out outside of planned steps: the arena was given back, and is made again for the next one"
    ]
    rig.steps.end()
    rig.allocator.given_back, rig.allocator.arena = 3, 0
    rig.allocator.refuses = "the plan needs 5 GiB too much"
    run(rig, "a", 1)
    assert rig.steps.report().state == "the plan needs 5 GiB too much"


def test_somebody_elses_history_is_left_alone(rig, monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: True, raising=False)
    assert run(rig, "a", 6) == []
    assert "somebody else records" in rig.notes[0]


def test_closing_ends_what_is_under_way(rig):
    run(rig, "a", SETTLING + 1)
    rig.steps.close()
    assert rig.allocator.calls == ["record", "recorded", "disarm"]
    other = PlannedSteps(rig.allocator, 1, rig.notes.append, recorder=lambda device: Recorder([]), solver=Solver)
    assert is_planned_for_others(1)
    for _ in range(SETTLING + 2):
        other.begin("a")
    solving = other._solving.solving
    other.close()
    assert solving.closed
    assert not is_planned_for_others(1)


def test_a_child_process_solves():
    solving = Solving(STEP, seconds=0.5)
    found = solving.result()
    assert found.placed == (0, 1, 2)
    assert found.peak == found.lower_bound == 2048
    assert not solving._folder.exists()


def test_a_child_process_that_fails_says_how():
    solving = Solving(Trace(ticks=0, requests=()), seconds=0.5)
    with pytest.raises(AllocatorPlanError, match=r"(?s)failed \(exit code 1\).*no span of phase 'step'"):
        solving.result()
    assert not solving._folder.exists()


class Net(torch.nn.Module):
    pass


def test_what_is_being_placed_is_finished_for_the_file(tmp_path, rig, monkeypatch):
    monkeypatch.setattr("memo_runtime.arena.model.planned_allocator", lambda: rig.allocator)
    rig.steps.close()
    path, device = tmp_path / "steps.json", torch.device("cuda", 0)
    memory = StepMemory(Net(), None, rig.notes.append)
    memory.keep_in(path)
    assert str(memory) == str(path)
    memory._steps = memory._start(0)
    memory._steps._make_recorder, memory._steps._solver = lambda device: Recorder([]), Solving
    for _ in range(SETTLING + 1):
        memory.begin("a", device)
    assert not path.exists()
    memory.close()
    assert path.exists()
    rig.allocator.calls.clear()
    again = StepMemory(Net(), None, rig.notes.append)
    again.keep_in(path)
    again.begin("a", device)
    again.close()
    assert rig.allocator.calls == ["disarm", "arm", "begin", "end", "disarm"]
    path.write_text("{}")
    broken = StepMemory(Net(), None, rig.notes.append)
    broken.keep_in(path)
    with pytest.raises(AllocatorPlanError, match="holds no steps"):
        broken.begin("a", device)
    assert rig.notes == []


def test_a_model_elsewhere_is_refused():
    with pytest.raises(AllocatorUnavailableError, match="places the memory of CUDA devices, and Net is on cpu"):
        StepMemory(Net(), None, print).begin("a", torch.device("cpu"))
    assert StepMemory(Net(), None, print).report().state == "no step yet"


def test_what_steps_say_of_sizes_makes_room_instead_of_another_recording(rig, lengths):
    lengths(1024, 1024, 1024, 1024, 1536, 1536, 2048, 2048)
    assert len(rig.solvers) == 3
    rig.allocator.served = 1100
    for tokens in (1900, 1950, 2000):
        # The second request, which has 600 bytes a token else: that of the last two grows more steeply still.
        rig.allocator.others = [(1, 900 * tokens if tokens == 1900 else 2 * tokens**2)]
        assert lengths(tokens).count("begin") == 1
    # Its bytes, which were not served, count as if they had been: room is being made for them.
    rig.allocator.served, rig.allocator.others = 1650, []
    assert "record" not in lengths(1300)
    assert rig.steps.report().plans == 1
    first, last = (solver.trace.requests for solver in (rig.solvers[2], rig.solvers[-1]))
    assert len(rig.solvers) > 3
    assert last[1].size >= 900 * 2048 > first[1].size
    assert (first[0].size, first[2].size) == (last[0].size, last[2].size)
    assert rig.notes == []


def test_room_is_not_made_for_ever(rig, lengths):
    lengths(1024, 1024, 1024, 1024, 1536, 1536, 2048, 2048)
    rig.allocator.served = 1100
    for at in range(_MOST_GROWN):
        rig.allocator.others = [(1, 1000 * 2048 * 2**at)]
        assert "record" not in lengths(2047 - at)
    assert len(rig.solvers) == 3 + _MOST_GROWN
    # From now on what is served counts, and two lengths are recorded anew.
    rig.allocator.others = [(1, 10**10)]
    assert "record" not in lengths(*range(1700, 1700 + MOST_WEAK))
    assert "record" in lengths(1800)


def test_another_program_leaves_nothing_of_older_recordings(rig, lengths):
    lengths(900, 900, 1000, 1200, 1300)
    kind = next(iter(rig.steps._kinds.values()))
    kind.samples.append(replace(kind.samples[0], tokens=7))
    rig.allocator.served = 500
    lengths(*[1100] * MOST_WEAK)
    assert kind.samples == []
