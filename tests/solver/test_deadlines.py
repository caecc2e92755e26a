"""The time limit is looked at in four places besides the searches themselves; each is tried alone."""

from __future__ import annotations

import functools
import math
import time

import pytest

from memo_solver import Problem, Request, SolveParams, engine, heuristics
from memo_solver.engine import _Solve
from memo_solver.instances import random_requests
from memo_solver.section_state import SectionState
from memo_solver.sections import split

PARAMS = SolveParams(time_limit_seconds=60, num_threads=1)
PAST = -math.inf


def placed_state():
    state = SectionState(split(random_requests(60, seed=1))[0], use_native=False)
    heuristics._sample(state, target=0, threads=1, deadline=PAST, on_gain=lambda: None)
    assert state.offsets is not None
    return state


@pytest.fixture
def races(monkeypatch):
    """Races that the heuristics began."""
    begun = []
    monkeypatch.setattr(heuristics, "race", lambda lanes, *rest: begun.append(lanes))
    return begun


def test_no_other_order_is_sampled_after_the_limit(races):
    placed_state()
    assert races == []


@pytest.mark.parametrize("turn", [None, 0])
def test_no_order_is_repaired_after_the_limit(races, turn):
    state = placed_state()
    options = {"target": 0, "params": PARAMS, "on_gain": lambda: None}
    work = heuristics.improve if turn is None else functools.partial(heuristics.repair, turn=turn)
    work(state, deadline=PAST, **options)
    assert races == []
    work(state, deadline=time.monotonic() + 60, **options)
    assert len(races) > 0


def late_after_one(solver, called):
    """Something that notes its sections and ends the time at the first."""

    def work(state, *arguments, **options):
        called.append(state)
        solver.deadline = PAST

    return work


def two_sections():
    core = random_requests(30, seed=4).requests
    later = (Request(f"{r.id} later", r.lower + 1000, r.upper + 1000, r.size) for r in core)
    solver = _Solve(Problem(requests=(*core, *later)), PARAMS, None, None, ())
    solver.states = [solver._state(section) for section in split(solver.problem)]
    solver.is_split = True
    assert len(solver.states) == 2
    return solver


@pytest.mark.parametrize("step", ["_search_down", "_repair"])
def test_no_other_section_is_searched_or_repaired_after_the_limit(monkeypatch, step):
    monkeypatch.setattr(engine, "MIN_REPAIRED_REQUESTS", 0)
    solver, called = two_sections(), []
    for name in ("_search_down", "_repair"):
        monkeypatch.setattr(solver, name, late_after_one(solver, called) if name == step else lambda *_: None)
    solver._run_exact()
    assert len(called) == 1
