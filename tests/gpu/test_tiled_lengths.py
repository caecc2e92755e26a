"""Tiles of a new length at every step, on CUDA: later sizes share programs that were compiled for any number."""

from __future__ import annotations

import pytest
import torch

import memo_runtime as memo
from memo_runtime.execution import any_length, compilers, sized_program
from memo_runtime.execution.compilers import compiled
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from tests.exactness.hand_written import WIDTH, Attention
from tests.execution.tiles import call_of, run, worst
from tests.gpu.models import batch, error, llama, step

pytestmark = pytest.mark.gpu

#: The last tile has another size each time.
LENGTHS = (700, 811, 923, 1000, 1201, 1303, 777, 1408, 1509, 640)


@pytest.fixture
def made(monkeypatch):
    """What was compiled: "one" for one size, "many" for any."""
    found = []

    def note(module, kind):
        compile_one = module.through_inductor
        monkeypatch.setattr(module, "through_inductor", lambda *given: found.append(kind) or compile_one(*given))

    note(compilers, "one")
    note(sized_program, "many")
    return found


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_block_at_many_lengths(made, sequences):
    torch.manual_seed(0)
    block = Attention().cuda().bfloat16()
    reference = Attention().cuda().double()
    reference.load_state_dict(block.state_dict())
    programs, counts = ProgramCache(compiled), []
    for tokens in LENGTHS:
        x = torch.randn(sequences, tokens, WIDTH, device="cuda").bfloat16().requires_grad_()
        exact = run(call_of(reference, x.detach().double().requires_grad_()), reference)
        theirs = run(call_of(block, x), block)
        mine = run(call_of(block, x), TiledBlock(block, tile=256, alpha=0.5, programs=programs))
        for ours, plain, true in zip(mine, theirs, exact, strict=True):
            assert worst(ours, true) <= 1.5 * worst(plain, true)
        counts.append(len(made))
    assert made.count("many") > 0
    assert made.count("one") <= 2 * 4 * any_length._ALONE
    assert counts[-1] - counts[-3] <= 2  # another range of numbers at most


def test_a_model_trains_at_many_lengths(made):
    plain, mine = (llama(torch.bfloat16) for _ in range(2))
    wide = llama(torch.float32, grouped=True)
    for model in (mine, wide):
        model.load_state_dict(plain.state_dict())
    memo.wrap(mine, policy="tiled", tile=1024)
    for tokens in (1500, 2001, 2307, 1802, 2909, 1203, 2706):
        given = batch(1, tokens)
        exact = step(wide, given)[1]
        assert error(step(mine, given)[1], exact) <= 1.1 * error(step(plain, given)[1], exact)
    assert set(made) == {"one", "many"}
