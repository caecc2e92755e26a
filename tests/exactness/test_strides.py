"""Tensors with gaps in memory, and expanded ones: what a block saves, and in which order, depends on their strides."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import ReplayMismatchError
from memo_runtime.execution.witness import Witness
from memo_runtime.records import Executor
from tests.exactness.compare import (
    MAIN_WAYS,
    RECOMPUTE,
    SWAP,
    Way,
    assert_exact,
    assert_gradients,
    assert_same,
    output_loss,
    run_step,
)

WIDTH = 16
WAYS = [*MAIN_WAYS, Way("replay", 0.4), Way("tiled")]


class ApartFromTheRest(nn.Module):
    """Its linear is given all tokens but the first: a slice with gaps, where there is more than one sequence."""

    packs = False

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rest = self.norm(x)[:, 1:]
        return x + torch.cat([x[:, :1] * 2, self.linear(rest.contiguous() if self.packs else rest)], 1)


class Latents(nn.Module):
    """Cross attention of latents to a sequence, and attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z = z + self.cross(self.norm(z), x, x)[0]
        return z + self.own(z, z, z, need_weights=False)[0]


class Attention(nn.Module):
    """Projects its input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tokenwise(nn.Module):
    """A linear that meets its input as it is given, which no result of attention is stashed beside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class BehindOthers(Stack):
    """Its blocks are given what is left without the first token."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, 1:]
        for block in self.blocks:
            x = block(x)
        return x


class Resampler(Stack):
    def __init__(self, count: int) -> None:
        super().__init__(Latents)
        self.latents = nn.Parameter(torch.randn(1, count, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        z = self.latents.expand(len(x), -1, -1)
        for block in self.blocks:
            z = block(z, x)
        return z


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, tokens, WIDTH, dtype=torch.float64)}


def assert_steps(model: nn.Module, way: Way, *batches: dict[str, Tensor]) -> None:
    """Steps of ``model``, wrapped, are those of a copy that is not."""
    plain = copy.deepcopy(model)
    way.wrap(model)
    for given in batches:
        assert_same(run_step(model, given, output_loss), run_step(plain, given, output_loss), way)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("rows", "tokens"), [(2, 9), (4, 5), (2, 29)])
def test_a_linear_on_a_slice_with_gaps(rows: int, tokens: int, way: Way) -> None:
    """At the first two sizes weight and input of the linear have one shape."""
    assert_steps(Stack(ApartFromTheRest).double(), way, batch(rows, tokens), batch(rows, tokens))


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("count", [8, 40, 300])
def test_latents_that_all_sequences_share(count: int, way: Way) -> None:
    assert_exact(Resampler(count).double(), batch(3, 29), way, loss_of=output_loss)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
def test_blocks_that_are_given_a_slice(way: Way) -> None:
    assert_exact(BehindOthers(Attention).double(), batch(2, 30), way, loss_of=output_loss)


def test_token_wise_blocks_that_are_given_a_slice_run_by_tiles() -> None:
    model = BehindOthers(Tokenwise).double()
    plain, way = copy.deepcopy(model), Way("tiled")
    way.wrap(model)
    for given in (batch(2, 9), batch(2, 30)):
        got, want = run_step(model, given, output_loss), run_step(plain, given, output_loss)
        assert_gradients(got.gradients, want.gradients, way)
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}


@pytest.mark.parametrize("way", [SWAP, RECOMPUTE, Way("memo", 0.3)], ids=str)
def test_one_sequence_before_several(way: Way) -> None:
    """The first batch leaves no gaps and expands nothing, the next ones do."""
    for model in (Stack(ApartFromTheRest), BehindOthers(Attention), Resampler(8)):
        assert_steps(model.double(), way, *(batch(rows, 29) for rows in (1, 3, 2)))


def test_another_way_in_the_rerun_is_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight and input change places, and both have the shape of the other one. It costs one step."""
    plain = Stack(ApartFromTheRest).double()
    model, given = RECOMPUTE.wrap(copy.deepcopy(plain)), batch(2, 9)
    output = model(**given)
    monkeypatch.setattr(ApartFromTheRest, "packs", True)
    with pytest.raises(ReplayMismatchError, match=r"'blocks\.2' was run again and saved another tensor in place 6"):
        output.sum().backward()
    assert model.blocks[2].linear.weight.grad is None
    model.zero_grad()
    assert_same(run_step(model, given, output_loss), run_step(plain, given, output_loss), RECOMPUTE)


def test_values_of_a_tensor_with_other_strides_are_compared() -> None:
    made = torch.randn(5, 7).t()
    witness = Witness("block", prefix=0, tokens=0)
    witness.see(0, made, None)
    witness.compare(0, made.contiguous())
    with pytest.raises(ReplayMismatchError, match="made something else of saved tensor 0"):
        witness.compare(0, made + 1)
