"""Arguments of blocks that have as many rows as the first batch has tokens, by chance or not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from tests.exactness.compare import relative_error, take_gradients
from tests.tiny import few_samples, one_thread

__all__ = ["few_samples", "one_thread"]

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh((x + torch.tanh(self.linear(x))) @ weight)


class Last(Block):
    """With a product behind all that it saves."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x + torch.tanh(self.linear(x))) @ weight


class ByPosition(Block):
    """With a row for every token."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x + weight).square())


class Conditioned(Block):
    """Scaled by what it is given for each sequence."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) * weight[:, None])


class Tower(nn.Module):
    def __init__(self, weight: str, make: type[nn.Module] = Block) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(make() for _ in range(2)), weight
        made = torch.randn(WIDTH, WIDTH)
        if weight == "buffer":
            self.register_buffer("weight", made)
        else:
            self.weight = nn.Parameter(made)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 0.5 if self.kind == "made from a parameter" else self.weight
        if self.kind == "for each sequence":
            weight = torch.tanh(weight[: len(x)])
        for layer in self.layers:
            x = layer(x, weight)
        return x.square().sum()


def _assert_exact(plain: nn.Module, lengths: tuple[int, ...]) -> nn.Module:
    model = memo.wrap(copy.deepcopy(plain), policy="replay", alpha=0.3, keep_last=0, strict=True)
    for tokens in lengths:
        x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
        found = []
        for each in (plain, model):
            each(x).backward()
            found.append(take_gradients(each))
        assert relative_error(*found) <= 1e-12
    return model


@pytest.mark.parametrize("make", [Block, Last])
@pytest.mark.parametrize("weight", ["parameter", "buffer", "made from a parameter"])
def test_an_argument_of_as_many_rows_as_the_first_batch_has_tokens_costs_no_step(weight, make):
    torch.manual_seed(0)
    model = _assert_exact(Tower(weight, make).double(), (WIDTH, 40, WIDTH, 9))
    if make is Last:
        return
    # What is no parameter cannot be told from tokens: another length saves something else, and it is swapped.
    assert all(block.recomputed_flops > 0 for block in memo.report(model).blocks) == (weight == "parameter")


def test_a_parameter_with_a_row_for_every_token_is_cut():
    torch.manual_seed(0)
    model = _assert_exact(Tower("parameter", ByPosition).double(), (WIDTH, WIDTH))
    assert all(block.recomputed_flops > 0 and not block.reason for block in memo.report(model).blocks)


def test_what_a_block_is_conditioned_on_has_no_tokens_where_there_are_as_many_as_features():
    torch.manual_seed(0)
    model = _assert_exact(Tower("for each sequence", Conditioned).double(), (WIDTH, WIDTH))
    assert all(block.recomputed_flops > 0 and not block.reason for block in memo.report(model).blocks)
