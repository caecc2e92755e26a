"""A pass over a long batch makes what blocks hand on from a crop: none runs its forward at full length."""

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.profiling import passing
from memo_runtime.records import Role
from tests.api.towers import HIDDEN, Block, tower
from tests.seen import Seen
from tests.tiny import few_samples

__all__ = ["few_samples"]

LONG = 4096
LOG: list[int] = []


class Logs(Block):
    """Takes a note elsewhere at each call, which a model may read behind its blocks."""

    def forward(self, x):
        LOG.append(x.shape[1])
        return super().forward(x)


class Remembers(Block):
    """Leaves its result where the next block may read it."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Casts(Block):
    """Yields another dtype."""

    def forward(self, x):
        return super().forward(x.double()).float()


class Fills(Block):
    """Leaves its result in the dict that all are given, where ``fills`` says so."""

    fills = False

    def forward(self, x, found):
        y = super().forward(x)
        if self.fills:
            found["x"] = y
        return y


class Filled(nn.Module):
    """The second of four blocks fills what those behind it may not miss."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(Fills() for _ in range(4))
        self.layers[1].fills = True

    def forward(self, x):
        x, found = self.first(x), {}
        for number, layer in enumerate(self.layers):
            x = layer(x, found)
            assert number == 0 or "x" in found
        return x


def lengths_of(model, tokens=LONG):
    """Lengths at which the first block's own modules ran while the model was profiled."""
    seen = Seen()
    inner = next(iter(model.layers[0].children()))
    inner.register_forward_pre_hook(lambda _, args: seen.add(args[0].shape[1]))
    profile = memo.profile(model, (torch.randn(1, tokens, 8, dtype=torch.float64),))
    return seen.taken(), profile


def test_no_block_runs_at_full_length():
    seen, profile = lengths_of(tower(3))
    assert max(seen) < LONG // 4
    assert [block.tokens for block in profile.blocks] == [LONG] * 3


def test_a_short_one_does():
    seen, _ = lengths_of(tower(3), 300)
    assert max(seen) == 300


@pytest.mark.parametrize("kind", [Logs, Remembers, pytest.param(Casts, marks=pytest.mark.slow)])
def test_where_a_crop_does_not_tell_it_runs_as_it_is(kind):
    model = tower(2)
    model.layers = nn.ModuleList([kind() for _ in range(2)]).double()
    seen, _ = lengths_of(model)
    assert max(seen) == LONG
    assert not LOG


def test_of_equal_blocks_those_alone_that_leave_something_run_at_full_length():
    model, seen = Filled().double(), Seen()
    for number, layer in enumerate(model.layers):
        inner = next(iter(layer.children()))
        inner.register_forward_pre_hook(lambda _, args, at=number: seen.add((at, args[0].shape[1])))
    memo.profile(model, (torch.randn(1, LONG, 8, dtype=torch.float64),))
    lengths = seen.taken()
    assert {at for at, _ in lengths} == {0, 1, 2, 3}
    assert {at for at, length in lengths if length == LONG} == {1}


def test_the_profile_is_the_same(monkeypatch):
    profiles = []
    for long in (passing._LONG, 1 << 30):
        monkeypatch.setattr(passing, "_LONG", long)
        profiles.append(lengths_of(tower(3))[1])
    ours, theirs = profiles
    for one, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert (one.groups, one.saved, one.pins) == (other.groups, other.saved, other.pins)
        assert one.gradients == other.gradients
    assert (ours.entry, ours.outside_forward, ours.shared) == (theirs.entry, theirs.outside_forward, theirs.shared)


def test_a_result_has_a_gradient_where_the_input_has_none():
    model = tower(2)
    model.first.requires_grad_(requires_grad=False)
    _, profile = lengths_of(model)
    assert [block.reason for block in profile.blocks] == ['', '']
    roles = [{group.role for group in block.groups} for block in profile.blocks]
    assert roles[1] == roles[0] | {Role.INPUT}
