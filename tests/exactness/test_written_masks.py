"""Masks of all pairs that a block makes itself and writes rows of: a rerun makes the same mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness import hand_written as blocks
from tests.exactness.compare import MEMO, RECOMPUTE, TOLERANCE, Step, Way, output_loss, run_step


class Hidden(blocks.Attention):
    """Attention written out whose first token sees nothing, not even itself: its row of the softmax is NaN."""

    def mask(self, tokens: int) -> Tensor:
        mask = torch.zeros(tokens, tokens, dtype=torch.float64)
        mask[0] = float("-inf")
        return mask

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2) + self.mask(x.shape[1])).softmax(-1).nan_to_num()
        return blocks.merge_heads(scores @ v)


class Alone(Hidden):
    """Its first token sees itself alone, by an element of the row; others do not see the last one."""

    def mask(self, tokens: int) -> Tensor:
        mask = super().mask(tokens)
        mask[0, 0] = 0.0
        mask[1:, -1] = float("-inf")
        return mask


def stack(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return blocks.Stack(kind(), kind()).double()


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 29, blocks.WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def assert_alike(got: Step, want: Step) -> None:
    """Also in where they are NaN."""
    assert got.gradients.keys() == want.gradients.keys()
    for name, one in want.gradients.items():
        largest = float(one.nan_to_num().abs().max())
        torch.testing.assert_close(got.gradients[name], one, rtol=0, atol=TOLERANCE * largest, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", [Hidden, Alone])
@pytest.mark.parametrize("way", [RECOMPUTE, MEMO])
def test_a_rerun_masks_as_the_forward_did(kind: type[nn.Module], way: Way) -> None:
    want = run_step(stack(kind), batch(), output_loss)
    model = stack(kind)
    memo.wrap(model, policy=way.policy, alpha=way.alpha, keep_last=0)
    for _ in range(2):
        assert_alike(run_step(model, batch(), output_loss), want)
    assert [block.reason for block in memo.report(model).blocks] == ["", ""]


def test_a_row_that_is_written_to_is_no_pin() -> None:
    profile = memo.profile(stack(Hidden), batch())
    assert not [pin.op for block in profile.blocks for pin in block.pins if "select" in pin.op]


def test_tiles_of_what_is_nan_are_refused_in_these_words_and_run_again_exactly() -> None:
    settings: dict[str, Any] = {"policy": "tiled", "tile": 8, "alpha": 0.0}
    want = run_step(stack(Hidden), batch(), output_loss)
    model = stack(Hidden)
    memo.wrap(model, **settings)
    assert_alike(run_step(model, batch(), output_loss), want)
    for block in memo.report(model).blocks:
        assert block.executor is not Executor.TILED
        assert "has NaN by tiles and in the block alike, so the two cannot be compared" in block.reason
