"""The search near a forecast: how close it comes, and in how many rehearsals."""

import pytest
import torch

from memo_runtime.errors import RehearsalError
from memo_runtime.rehearsal.materialise import lengthened, materialised
from memo_runtime.rehearsal.nearby import OutOfTimeError, longest_near
from memo_runtime.rehearsal.record import Rehearsal
from tests.api.towers import Tower


def outcome(fits):
    return Rehearsal(
        fits=fits, seconds=1.0, peak_bytes=0, reserved_bytes=0, host_bytes=0, bytes_to_host=0, bytes_to_device=0,
        replaced=(), forecast=None,
    )  # fmt: skip


def search(forecast, limit, **settings):
    tried = []

    def rehearse(tokens):
        tried.append(tokens)
        return outcome(tokens <= limit)

    found = longest_near(forecast, 128, rehearse, **settings)
    assert len(tried) == len(set(tried)) == found.rehearsed
    assert all(tokens % 128 == 0 for tokens in tried)
    return found


@pytest.mark.parametrize("share", [0.6, 0.93, 0.985, 1.0, 1.015, 1.04, 1.5])
def test_it_comes_within_a_hundredth_in_a_few_rehearsals(share):
    limit = int(share * 1_835_008)
    found = search(1_835_008, limit)
    assert 0 <= limit - found.tokens <= 0.01 * 1_835_008
    assert found.tokens <= limit < found.short_at
    assert found.longest.fits
    assert not found.short.fits
    assert found.rehearsed <= (7 if 0.95 < share < 1.05 else 13)


def test_nothing_fits_and_everything_fits():
    nothing = search(4096, 100)
    assert (nothing.tokens, nothing.longest) == (0, None)
    assert nothing.short_at == 128
    everything = search(4096, 1 << 40, most=5000)
    assert (everything.tokens, everything.short_at) == (4992, 0)


@pytest.mark.parametrize("share", [0.6, 0.93, 1.0, 1.04, 1.5])
def test_with_plans_one_rehearsal_is_enough(share):
    limit, tried = int(share * 1_835_008), []

    def rehearse(tokens):
        tried.append(tokens)
        return outcome(True)

    def plan(tokens):
        return None if tokens <= limit else outcome(False)

    found = longest_near(1_835_008, 128, rehearse, plan=plan)
    assert tried == [found.tokens] == [found.planned_at]
    assert 0 <= limit - found.tokens <= 0.01 * 1_835_008
    assert found.tokens <= limit < found.short_at
    assert (found.short.fits, found.rehearsed, found.cut) == (False, 1, False)


def test_what_has_a_plan_and_does_not_fit_is_searched_below():
    limit = int(0.95 * 1_835_008)
    found = longest_near(
        1_835_008, 128, lambda tokens: outcome(tokens <= limit),
        plan=lambda tokens: None if tokens <= 1_900_000 else outcome(False),
    )  # fmt: skip
    assert 0 <= limit - found.tokens <= 0.01 * 1_835_008
    assert found.tokens < found.short_at <= 1_900_000 - 128
    assert found.planned_at > found.tokens


@pytest.mark.parametrize(("steps", "tokens"), [(0, 0), (1, 4096), (2, 4224)])
def test_what_is_known_when_time_is_over_is_said(steps, tokens):
    left = [steps]

    def rehearse(tokens):
        left[0] -= 1
        if left[0] < 0:
            raise OutOfTimeError
        return outcome(True)

    found = longest_near(4096, 128, rehearse)
    assert (found.tokens, found.rehearsed, found.cut) == (tokens, steps, True)
    planned = longest_near(4096, 128, rehearse, plan=lambda tokens: None if tokens <= 4096 else outcome(False))
    assert (planned.tokens, planned.longest, planned.planned_at, planned.cut) == (0, None, 4096, True)


def test_a_model_on_meta_becomes_one_that_can_be_rehearsed():
    with torch.device("meta"):
        model = Tower(2)
    model.last.weight = model.first.weight = torch.nn.Parameter(torch.empty(32, 8, device="meta"))
    made = materialised(model, torch.device("cpu"))
    assert made.last.weight is made.first.weight
    assert all(torch.isfinite(one).all() for one in made.parameters())
    ids = torch.zeros(1, 64, dtype=torch.long, device="meta")
    longer = lengthened(((), {"ids": ids, "use_cache": False}), 300, torch.device("cpu"))
    assert (longer[1]["ids"].shape, longer[1]["use_cache"]) == ((1, 300), False)
    with pytest.raises(RehearsalError, match=r"a tensor of shape \[1, 64, 3\]"):
        lengthened(((torch.zeros(1, 64, 3),), {}), 300, torch.device("cpu"))
