"""What is timed runs behind the same work, and beside what it runs with in a step."""

from __future__ import annotations

import pytest
import torch

from memo_runtime.blocks import stopwatch
from memo_runtime.blocks.stopwatch import Beside, typical

GPU = torch.device("cuda")


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rounds of two runs each call had; the first round of all takes 60 s: it compiles."""
    found: list[int] = []

    def laps(runs, device):
        assert device == GPU
        seconds = [run() for run in runs]
        if not found:
            seconds[0] += 60.0
        found.append(len(runs) // 2)
        return seconds

    monkeypatch.setattr(stopwatch, "laps", laps)
    return found


def test_what_is_compiled_first_is_timed_as_often_as_all_else(rounds: list[int]) -> None:
    """A load of half a second and three samples, by the time of the second round."""
    assert typical([lambda: 0.03, lambda: 0.02], GPU, (1,)) == [0.02]
    assert rounds == [1, 1, 10 + 3]
    assert typical([lambda: 0.03, lambda: 0.02], GPU, (-2, -1)) == [0.03, 0.02]


def test_a_long_round_is_its_own_load(rounds: list[int]) -> None:
    assert typical([lambda: 1.0, lambda: 2.0], GPU, (0, 1)) == [1.0, 2.0]
    assert rounds == [1, 1]


def test_ranks_make_as_many_rounds_whatever_their_times(rounds: list[int]) -> None:
    assert typical([lambda: 1.0, lambda: 2.0], GPU, (0, 1), together=True) == [1.0, 2.0]
    assert rounds == [4]


def test_on_a_cpu_there_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(stopwatch, "laps", lambda runs, _: [(found.append(len(runs)), 0.1)[1] for _ in runs])
    typical([lambda: None], torch.device("cpu"))
    assert found == [1, 1, 3, 3, 3]


def test_work_beside_is_of_about_as_many_tokens() -> None:
    beside = Beside(100, lambda: None)
    assert [len(beside.runs(tokens)) for tokens in (10, 149, 151, 1000)] == [1, 1, 2, 10]
