"""What attention takes is that of a group of heads at its length, where that is more than its share of a short run."""

import pytest
import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.execution import tiled_trial
from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_profile import tiled_profile
from memo_runtime.records import Stretch
from tests.execution.test_tiled_peak import HEADS, WIDTH, Layer

TOKENS = 128
#: Bytes by token that the pretended kernel takes: of all heads, and of one group of them over more than 64 tokens.
SHARE, ALONE = 40, 100


class Meter:
    """Device memory as a kernel would take it that works in another way for few heads over many tokens."""

    room = True

    def __init__(self, device):
        pass

    @staticmethod
    def counts(device):
        return True

    def beyond(self, results):
        output = results[0]
        tokens, heads = output.shape[2], output.shape[1]
        if tokens == TOKENS and not self.room:
            raise torch.OutOfMemoryError("no room")
        return tokens * (SHARE if heads == HEADS else ALONE)


@pytest.fixture
def taken(monkeypatch):
    """Bytes by token at the moment of attention's backward, with all heads at once and by groups."""
    monkeypatch.setattr(tiled_trial, "Meter", Meter)

    def of():
        x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        call = BlockCall.of((x,), {})
        captured = TiledBlock(Layer().double(), tile=1, programs=ProgramCache(run_eagerly)).captured(call)
        takes = tiled_profile(captured, call)
        whole = max(one.full.linear for one in takes.backward if one.stretch is Stretch.MIDDLE)
        group = max(one.part.linear for one in takes.backward_by_groups)
        return whole, group

    monkeypatch.setattr(Meter, "counts", staticmethod(lambda device: False))
    before = of()
    monkeypatch.setattr(Meter, "counts", staticmethod(lambda device: True))
    return lambda: [now - then for now, then in zip(of(), before, strict=True)]


def test_a_group_that_takes_more_than_its_share_is_counted_as_it_is(taken):
    assert taken() == [0, HEADS * ALONE - SHARE]


def test_a_group_is_not_run_at_any_length(taken, monkeypatch):
    monkeypatch.setattr(tiled_trial, "LONGEST_ATTENTION", 64)
    monkeypatch.setattr(Meter, "room", False)
    assert taken() == [0, HEADS * ALONE - SHARE]


def test_where_there_is_no_room_for_it_its_share_is_counted(taken, monkeypatch):
    monkeypatch.setattr(Meter, "room", False)
    assert taken() == [0, 0]
