import logging
import time

import pytest

from memo_solver import SolveParams, cpsat, lanes, native
from memo_solver.errors import MissingSolverError
from memo_solver.instances import planted_packing, random_requests
from memo_solver.outcome import Outcome, SearchResult, StopFlag
from memo_solver.params import Switch
from memo_solver.race import Task, race
from memo_solver.sections import split


def deaf(seconds):
    """A search that does not look at its flag, as an import does not."""

    def run(stop):
        time.sleep(seconds)
        return SearchResult(outcome=Outcome.LIMIT)

    return Task(name="deaf", run=run)


def quick(outcome):
    return Task(name="quick", run=lambda stop: SearchResult(outcome=outcome))


def timed(*arguments):
    start = time.monotonic()
    verdict = race(*arguments)
    return verdict, time.monotonic() - start


def test_nobody_waits_for_a_lane_that_has_lost():
    verdict, seconds = timed([[quick(Outcome.FOUND)], [deaf(3.0)]])
    assert verdict is not None
    assert verdict.name == "quick"
    assert seconds < 1.0


def test_the_deadline_holds_against_a_lane_that_does_not_stop():
    verdict, seconds = timed([[deaf(3.0)], [deaf(3.0)]], time.monotonic() + 0.2)
    assert verdict is None
    assert seconds < 1.0


def test_a_lane_of_lower_rank_is_waited_for_because_it_may_win():
    verdict, seconds = timed([[deaf(0.3), quick(Outcome.INFEASIBLE)], [quick(Outcome.FOUND)]])
    assert verdict is not None
    assert verdict.result.outcome is Outcome.INFEASIBLE
    assert seconds >= 0.3


@pytest.fixture
def told():
    """What the package logs, from a state in which it has said nothing yet."""
    lanes._warn_once.cache_clear()
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("memo_solver").addHandler(handler)
    yield messages
    logging.getLogger("memo_solver").removeHandler(handler)
    lanes._warn_once.cache_clear()


def test_missing_ortools_is_said_once(monkeypatch, told):
    monkeypatch.setattr(cpsat, "available", lambda: False)
    for _ in range(2):
        assert lanes._cpsat_lanes(question(), SolveParams(num_threads=2), seconds=1.0) == []
    assert told == ["searching without CP-SAT: OR-Tools cannot be imported: it is not installed: pip install ortools"]


def broken():
    raise MissingSolverError("OR-Tools is missing") from ImportError("libstdc++ is too old")


def test_ortools_that_cannot_be_imported_is_said_once_and_done_without(monkeypatch, told):
    monkeypatch.setattr(cpsat, "_import", broken)
    (lane,) = lanes._cpsat_lanes(question(), SolveParams(num_threads=2), seconds=1.0)
    results = [task.run(StopFlag()) for task in lane]
    assert {result.outcome for result in results} == {Outcome.LIMIT}
    assert told == ["searching without CP-SAT: OR-Tools cannot be imported: libstdc++ is too old"]
    (lane,) = lanes._cpsat_lanes(question(), SolveParams(num_threads=2, cpsat=Switch.ON), seconds=1.0)
    with pytest.raises(MissingSolverError):
        lane[0].run(StopFlag())


def question(seconds=60.0):
    section = split(random_requests(30, seed=1))[0]
    return lanes.Question(section=section, capacity=10**6, round_index=1, deadline=time.monotonic() + seconds)


def test_short_limits_do_not_import_ortools(monkeypatch):
    monkeypatch.setattr(cpsat, "imported", lambda: False)
    assert lanes._cpsat_lanes(question(1.0), SolveParams(num_threads=2), seconds=1.0) == []
    assert lanes._cpsat_lanes(question(1.0), SolveParams(num_threads=2, cpsat=Switch.ON), seconds=1.0) != []
    monkeypatch.setattr(cpsat, "imported", lambda: True)
    assert lanes._cpsat_lanes(question(1.0), SolveParams(num_threads=2), seconds=1.0) != []


@pytest.mark.skipif(not native.native_status().available, reason="the compiled search is not built")
def test_from_round_two_tight_sections_get_a_second_valley_search_with_another_seed():
    section = split(planted_packing(60, seed=1))[0]
    compiled = native.NativeSection(section)

    def valleys(round_index, capacity):
        asked = lanes.Question(
            section=section, capacity=capacity, round_index=round_index, deadline=time.monotonic() + 60
        )
        built = lanes.build_lanes(asked, SolveParams(num_threads=2, seed=3), compiled)
        return [task.run.seed for lane in built for task in lane[:1] if task.name == "valley search"]

    full = max(section.loads())
    tight = full + full // 20
    assert len(valleys(1, tight)) == 1
    assert (len(valleys(2, 2 * full)), len(valleys(2, full))) == (1, 2)
    seeds = [*valleys(1, tight), *valleys(2, tight), *valleys(3, tight)]
    assert len(seeds) == 5
    assert len(set(seeds)) == 5


@pytest.mark.skipif(not native.native_status().available, reason="the compiled search is not built")
def test_the_shortest_canonical_search_comes_to_the_last_request():
    section = split(random_requests(600, seed=1))[0]
    asked = lanes.Question(section=section, capacity=10**6, round_index=0, deadline=time.monotonic() + 60)
    (lane,) = lanes.build_lanes(asked, SolveParams(num_threads=1), native.NativeSection(section))
    found = [task.run(StopFlag()) for task in lane if task.name.startswith("canonical")]
    assert {result.outcome for result in found} == {Outcome.FOUND}
    assert all(result.effort >= section.num_requests for result in found)
