"""The gradient of a block's input takes the memory of that of its result, and only where nobody else sees it."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.execution import tiled_overwrite
from memo_runtime.execution.norm import NormForward
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_gradients import Gradients
from memo_runtime.execution.tiled_overwrite import overwritten, sole_holders
from memo_runtime.execution.tiled_run import Run
from tests.exactness import hand_written
from tests.exactness.compare import output_loss, run_step
from tests.exactness.test_tiled import TILED, assert_close, batch_of, stack
from tests.execution.test_tiled import double, hidden
from tests.execution.tiles import worst

Forward = Callable[[Tensor], Tensor]
kept: list[Tensor] = []


class Keeping(torch.autograd.Function):
    """Keeps the gradient that it passes on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        kept.append(grad)
        return grad


def product(block: Forward, x: Tensor) -> None:
    (block(block(x)) * 3).sum().backward()


def seen_twice(block: Forward, x: Tensor) -> None:
    y = block(x)
    (y * 3 + y.exp()).sum().backward()


def a_sum_of_two(block: Forward, x: Tensor) -> None:
    (torch.add(block(x), block(2 * x)) * 3).sum().backward()


def around_it(block: Forward, x: Tensor) -> None:
    h = x * 1
    ((block(h) + h) * 3).sum().backward()


def kept_by_a_hook(block: Forward, x: Tensor) -> None:
    y = block(x)
    y.register_hook(kept.append)
    (y * 3).sum().backward()


def kept_by_a_function(block: Forward, x: Tensor) -> None:
    (Keeping.apply(block(x)) * 3).sum().backward()


def kept_in_the_graph(block: Forward, x: Tensor) -> None:
    y = block(x)
    y.retain_grad()
    (y * 3).sum().backward()
    kept.append(y.grad)


def given(block: Forward, x: Tensor) -> None:
    kept.append(torch.full((3, 29, hand_written.WIDTH), 3.0, dtype=torch.float64))
    block(x).backward(kept[0])


def expanded(block: Forward, x: Tensor) -> None:
    block(x).sum().backward()


def behind_a_matrix(block: Forward, x: Tensor) -> None:
    """A linear layer hands down a view of a gradient that nobody else has."""
    (nn.functional.linear(block(block(x)), MATRIX) * 3).sum().backward()


def a_view_of_what_is_kept(block: Forward, x: Tensor) -> None:
    (Keeping.apply(block(x).flatten(0, 1)) * 3).sum().backward()


def parts_of_one(block: Forward, x: Tensor) -> None:
    """Of two views of one gradient the second is alone when the first is done with."""
    (torch.cat((block(x), block(2 * x))) * 3).sum().backward()


def twice(block: Forward, x: Tensor) -> None:
    loss = (block(x) * 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()


#: How a gradient reaches the block, and how often in a step it may be written over.
WAYS = {product: 2, seen_twice: 1, twice: 2, a_sum_of_two: 1, around_it: 0, kept_by_a_hook: 0, kept_by_a_function: 0,
        kept_in_the_graph: 1, given: 0, expanded: 0, behind_a_matrix: 2, a_view_of_what_is_kept: 0,
        parts_of_one: 1}  # fmt: skip
MATRIX = torch.linspace(-1, 1, hand_written.WIDTH**2, dtype=torch.float64).view(hand_written.WIDTH, -1)


def gradients(way: Callable[[Forward, Tensor], None], block: nn.Module, forward: Forward) -> tuple[list, list]:
    """(gradients, what others kept)."""
    kept.clear()
    block.zero_grad()
    x = hidden().detach().requires_grad_()
    way(forward, x)
    return [x.grad, *(one.grad.clone() for one in block.parameters())], [one.clone() for one in kept]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_others_hold_is_never_written_over(way, monkeypatch):
    assert sole_holders("cpu") is not None
    block = BLOCK
    theirs = gradients(way, block, block)
    placed = []
    original = Gradients.place
    monkeypatch.setattr(Gradients, "place", lambda self, *args: (placed.append(1), original(self, *args)))
    mine = gradients(way, block, TILES)
    assert worst(mine[0], theirs[0]) <= 1e-12
    assert all(torch.equal(one, other) for one, other in zip(mine[1], theirs[1], strict=True))
    assert len(mine[1]) == len(theirs[1])
    assert len(placed) == WAYS[way]
    gc.collect()


BLOCK = double(hand_written.Attention)
TILES = TiledBlock(BLOCK, tile=8)


def test_which_gradients_may_be_written_over():
    def pairs(kind: type[nn.Module]) -> int:
        tiles = TiledBlock(double(kind), tile=8)
        tiles(hidden())
        ((_, captured),) = tiles._captures
        return len(overwritten(captured))

    assert [pairs(kind) for kind in (hand_written.Attention, hand_written.NoMixer)] == [1, 1]


def test_the_report_says_where_more_is_taken_than_planned():
    model, batch = stack(), batch_of()
    want = run_step(model, batch, output_loss)
    memo.wrap(model, **TILED)
    model.blocks[0].register_forward_hook(lambda module, args, out: out.register_hook(kept.append) and None)
    assert_close(run_step(model, batch, output_loss), want)
    notes = [note for note in memo.report(model).notes if "held elsewhere" in note]
    assert len(notes) == 1
    assert notes[0].startswith("'blocks.0': ")


class Encoder(nn.Module):
    """Behind a transpose of what is embedded."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(hand_written.WIDTH, 4, 64, dropout=0.0, batch_first=False)
        self.embed = nn.Linear(hand_written.WIDTH, hand_written.WIDTH)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))

    def forward(self, x):
        x = self.embed(x).transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x


class TwoTowers(nn.Module):
    """Joined by a linear layer, whose gradient of its input is a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.ModuleList(hand_written.Attention() for _ in range(2)) for _ in range(2))
        self.between = nn.Linear(hand_written.WIDTH, hand_written.WIDTH)

    def forward(self, x):
        for layer in self.first:
            x = layer(x)
        x = self.between(x).tanh()
        for layer in self.second:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Encoder, TwoTowers])
def test_nothing_is_said_of_gradients_that_nobody_else_holds(kind):
    torch.manual_seed(0)
    model = kind().double()
    plain, x = copy.deepcopy(model), hidden().detach()
    memo.wrap(model, policy="tiled", tile=8)
    for one in (model, plain):
        one(x).square().mean().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {"tiled"}
    assert not any("gradient of its result" in note for note in report.notes)


def test_nothing_is_written_over_while_a_debugger_may_hold_what_frames_hold(monkeypatch):
    def reading(frame, event, argument):
        frame.f_locals  # noqa: B018  what a debugger does, which holds them
        return reading

    monkeypatch.setattr(tiled_overwrite, "_SOLE", {})
    before = sys.gettrace()
    sys.settrace(reading)
    try:
        watched = sole_holders("cpu")
    finally:
        sys.settrace(before)
    assert watched is None
    if before is None:
        assert sole_holders("cpu") is not None
    kept.clear()
    block = TiledBlock(double(hand_written.Attention), tile=8)
    kept_by_a_hook(block, hidden().detach().requires_grad_())
    assert torch.equal(kept[0], torch.full_like(kept[0], 3.0))


class Mirrored(hand_written.Attention):
    """A matrix made of a parameter, which stands behind the input: a factor of its gradient is that of the result."""

    def finish(self, x, mixed):
        x = x + self.merge(mixed)
        return x + nn.functional.linear(nn.functional.silu(self.up(x)), self.up.weight.t())


class Adds(hand_written.Attention):
    """The gradient of the input is that of the result, and attention's part of it."""

    def finish(self, x, mixed):
        return x + self.merge(mixed)


@pytest.mark.parametrize(("kind", "size"), [
    (Mirrored, (1, 11)), (Mirrored, (3, 5)), (Adds, (1, 11)),
    *(pytest.param(*one, marks=pytest.mark.slow)
      for one in ((Adds, (3, 5)), *((kind, size) for kind in (Mirrored, Adds) for size in ((1, 5), (3, 11))))),
])  # fmt: skip
def test_views_of_the_gradient_are_read_before_it_is_written_over(kind, size):
    """Where a tile is a view of the whole: one sequence, or one tile."""
    rows, tokens = size
    model, batch = stack(kind, kind), batch_of(tokens, rows)
    want = run_step(model, batch, output_loss)
    memo.wrap(model, **TILED)
    for _ in range(2):
        assert_close(run_step(model, batch, output_loss), want)


class TwoResults(hand_written.Part):
    """The gradient of the second input is that of the first result."""

    def forward(self, x, y):
        mixed = self.down(self.up(x))
        return x * 2 + y, mixed * 3


@pytest.mark.parametrize("rows", [1, 3])
def test_two_inputs_and_two_results(rows):
    def gradients(call):
        pair = [hidden(rows=rows).detach().requires_grad_(), hidden(rows=rows).detach().requires_grad_()]
        first, second = call(*(one * 1 for one in pair))
        ((first * 3).sin().sum() + (second * 5).cos().sum()).backward()
        return [one.grad for one in pair]

    block = double(TwoResults)
    want = gradients(block)
    for one, other in zip(gradients(TiledBlock(block, tile=8)), want, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "long"), [
    ("Llama", True),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (("Llama", False), ("GPTNeoX", True), ("GPTNeoX", False))),
], ids=lambda value: value if isinstance(value, str) else "by tiles" if value else "as it is")  # fmt: skip
def test_a_norm_behind_the_blocks_holds_no_gradient(family, long, monkeypatch):
    """Forecasts count on it: ``Profile.norm_behind``."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(NormForward.__init__, "__defaults__", (1 if long else 2**30,))
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    tokens = torch.randint(0, 64, (1, 48))
    memo.wrap(model, policy="tiled", tile=16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    runs: list[Run] = []
    backward = Run.backward

    def noted(run: Run, *args, **kwargs):
        runs.append(run)
        return backward(run, *args, **kwargs)

    monkeypatch.setattr(Run, "backward", noted)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert len(runs) == 2 + long
    assert not any(run.held_elsewhere for run in runs[long:])
    assert memo.profile(memo.unwrap(model), {"input_ids": tokens, "labels": tokens}).norm_behind
