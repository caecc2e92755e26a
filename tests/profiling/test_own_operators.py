"""What a profile does itself in the middle of a block's run is no work of the block: nothing counts or pins it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import memo_runtime as memo
from tests.exactness import hand_written as blocks
from tests.exactness.compare import MEMO, assert_gradients, output_loss, run_step

#: Found while a block runs, and compared with what it was before every other run.
TABLE = torch.linspace(0.5, 1.5, blocks.WIDTH, dtype=torch.float64)


class Reads(blocks.Attention):
    """Reads a tensor that is a global of its module, and copies a result whose first token it writes to."""

    def forward(self, x: Tensor) -> Tensor:
        h = (super().forward(x) * TABLE).clone()
        h[:, 0] = 0.0
        return x + torch.sin(h * x)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return blocks.Stack(Reads(), Reads()).double()


def test_values_of_globals_are_looked_at_aside() -> None:
    x = torch.randn(2, 17, blocks.WIDTH, dtype=torch.float64)
    profile = memo.profile(stack(), (x,))
    for block in profile.blocks:
        assert block.reason == ""
        copies = [pin.call for pin in block.pins if pin.op == "aten.clone.default"]
        assert copies == [0], "the copies of a profile have no numbers"


def test_a_block_that_reads_a_global_tensor_is_replayed_and_exact() -> None:
    batch = {"x": torch.randn(2, 17, blocks.WIDTH, dtype=torch.float64)}
    want = run_step(stack(), batch, output_loss)
    model = stack()
    memo.wrap(model, policy=MEMO.policy, alpha=MEMO.alpha, keep_last=0)
    got = run_step(model, batch, output_loss)
    assert torch.equal(got.loss, want.loss)
    assert_gradients(got.gradients, want.gradients, MEMO)
    assert all(block.reason == "" for block in memo.report(model).blocks)
