"""Which heights are asked for, in which order, when the peak is minimised."""

from __future__ import annotations

import pytest

from memo_solver import Problem, SolveParams
from memo_solver.engine import _Solve
from memo_solver.instances import loose_packing, planted_packing, random_requests
from memo_solver.outcome import Outcome
from memo_solver.sections import split


def asked(problem, lowest, monkeypatch, *, rounds):
    """Heights of each round, as shares of the target, with a search that finds all from `lowest` (share) on."""
    solver = _Solve(Problem(requests=problem.requests), SolveParams(time_limit_seconds=60), None, None, ())
    (state,) = [solver._state(section) for section in split(problem)]
    solver.states, solver.is_split = [state], True
    target = state.bound
    state.peak_units = int(1.2 * target)
    heights = []

    def ask(state, height, round_index, used):
        heights[-1].append(round(height / target, 3))
        if height < lowest * target:
            return None
        state.peak_units = height
        return Outcome.FOUND

    monkeypatch.setattr(solver, "_ask", ask)
    for round_index in rounds:
        heights.append([])
        solver._search_down(state, round_index, set())
    return heights


@pytest.fixture
def roomy():
    return random_requests(300, seed=3, max_size=100_000)


def test_the_incumbent_is_lowered_by_growing_steps_before_the_target_is_asked_for(roomy, monkeypatch):
    (heights,) = asked(roomy, 1.1, monkeypatch, rounds=[1])
    assert heights == [1.195, 1.185, 1.165, 1.125, 1.045, 1.0]


def test_the_next_round_goes_on_with_half_the_step_that_was_too_much(roomy, monkeypatch):
    first, second = asked(roomy, 1.1, monkeypatch, rounds=[1, 2])
    assert first[-2:] == [1.045, 1.0]
    assert second == [1.085, 1.0]


def test_the_first_round_asks_for_the_target_and_then_half_way_down(roomy, monkeypatch):
    (heights,) = asked(roomy, 1.07, monkeypatch, rounds=[0])
    assert heights[:3] == [1.0, 1.1, 1.05]


def test_a_tight_section_is_asked_for_its_target_first(monkeypatch):
    (heights,) = asked(loose_packing(150, seed=2, slack=0.05), 1.1, monkeypatch, rounds=[1])
    assert heights == pytest.approx([1.0, 1.195, 1.185, 1.165, 1.125, 1.045], abs=0.01)


def test_a_perfect_packing_gets_all_the_effort_at_its_target(monkeypatch):
    (heights,) = asked(planted_packing(60, seed=1), 1.1, monkeypatch, rounds=[1])
    assert heights == [1.0]


def test_a_target_that_is_reached_ends_it(roomy, monkeypatch):
    (heights,) = asked(roomy, 1.0, monkeypatch, rounds=[1])
    assert heights[-1] == 1.0
    assert len(heights) == 6
