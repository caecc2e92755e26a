"""What embeddings, the final norm, the head and the loss take is timed, and leaves nothing behind."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from memo_runtime.profiling import outside_time
from memo_runtime.profiling.outside_time import outside_seconds
from memo_runtime.records import BlockProfile, Growth

TOKENS, WIDTH, ROWS = 64, 16, 2


class Inner(nn.Module):
    def __init__(self, norm: nn.Module | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH, max_norm=0.1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.final_norm = norm


class Model(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Inner(norm)
        self.head = nn.Linear(WIDTH, 100)


class CountingNorm(nn.Module):
    """One whose forward is the user's own business."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            self.weight.mul_(2.0)
        raise ZeroDivisionError


def profiles() -> list[BlockProfile]:
    return [
        BlockProfile(
            name=f"model.layers.{number}", kind="Linear", stack=0, tokens=TOKENS, token_dim=1, input_leaf=0,
            timed_tokens=TOKENS, forward_seconds=Growth(linear=1.0), forward_flops=Growth(linear=1.0),
        )
        for number in range(2)
    ]  # fmt: skip


@pytest.fixture
def timed(monkeypatch):
    """(tokens of a run, number of runs) of each time that something was timed; every run takes a second a token."""
    seen: list[int] = []
    at: list[int] = []

    def typical(runs, device, timed):
        for run in runs:
            run()
        seen.append(len(runs))
        return [float(at[-1]) for _ in timed]

    def classes(tokens, count, like, made=outside_time._classes):
        at.append(tokens)
        return made(tokens, count, like)

    monkeypatch.setattr(outside_time, "_EMBEDDINGS_ON", ("cuda", "cpu"))
    monkeypatch.setattr(outside_time, "typical", typical)
    monkeypatch.setattr(outside_time, "_classes", classes)
    return seen


def seconds(model: nn.Module, *, tiled_loss: bool = True) -> float:
    hidden = torch.randn(ROWS, TOKENS, WIDTH)
    return outside_seconds(model, profiles(), ROWS, hidden, tiled_loss=tiled_loss).exact(TOKENS)


def test_embeddings_norm_head_and_loss_are_timed_one_behind_the_other(timed) -> None:
    assert seconds(Model(nn.LayerNorm(WIDTH))) == 3 * ROWS * TOKENS
    assert timed == [3, 3]


def test_without_tiles_the_head_runs_at_the_rate_of_the_blocks(timed) -> None:
    head = 6 * ROWS * TOKENS * WIDTH * 100
    assert seconds(Model(nn.LayerNorm(WIDTH)), tiled_loss=False) == 2 * ROWS * TOKENS + head
    assert timed == [2, 2]


def test_no_forward_of_the_model_runs(timed) -> None:
    norm = CountingNorm()
    assert seconds(Model(norm)) == 3 * ROWS * TOKENS
    assert norm.calls == 0
    assert torch.equal(norm.weight, torch.ones(WIDTH))


def test_weights_that_cannot_be_multiplied_are_left_out(timed) -> None:
    guessed = 6 * ROWS * TOKENS * WIDTH * 100
    odd = Model(nn.LayerNorm(WIDTH))
    odd.head = nn.utils.parametrizations.spectral_norm(odd.head)
    before = {name: value.clone() for name, value in odd.state_dict().items()}
    assert seconds(odd) == 2 * ROWS * TOKENS + guessed
    assert all(torch.equal(value, before[name]) for name, value in odd.state_dict().items()), "it would go on"
    small = Model(nn.LayerNorm(WIDTH))
    small.model.embed.weight = nn.Parameter(torch.empty(50, WIDTH, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert seconds(small) == 2 * ROWS * TOKENS
    short = Model(nn.LayerNorm(WIDTH))
    short.model.embed.weight = nn.Parameter(short.model.embed.weight[:3].detach())
    assert seconds(short) == 3 * ROWS * TOKENS, "its rows are counted, not what it says"
    del short.model.embed.weight
    assert seconds(short) == 2 * ROWS * TOKENS


def test_hooks_of_weights_see_nothing(timed) -> None:
    model, seen = Model(nn.LayerNorm(WIDTH)), []
    for parameter in model.parameters():
        parameter.register_hook(seen.append)
    assert seconds(model) == 3 * ROWS * TOKENS
    assert not seen


def test_what_has_no_room_is_left_out_and_said(timed, monkeypatch, caplog) -> None:
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(outside_time, "linear_cross_entropy", no_room)
    with caplog.at_level(logging.INFO, logger="memo_runtime"):
        assert seconds(Model(nn.LayerNorm(WIDTH))) == 2 * ROWS * TOKENS + 6 * ROWS * TOKENS * WIDTH * 100
    assert "a part of what is around the blocks is not timed: no room" in caplog.text


def test_on_a_processor_no_embedding_is_timed(timed, monkeypatch) -> None:
    monkeypatch.setattr(outside_time, "_EMBEDDINGS_ON", ("cuda",))
    assert seconds(Model(nn.LayerNorm(WIDTH))) == 2 * ROWS * TOKENS


def test_nothing_is_left_behind(monkeypatch) -> None:
    monkeypatch.setattr(outside_time, "_EMBEDDINGS_ON", ("cuda", "cpu"))
    model = Model(nn.LayerNorm(WIDTH))
    calls = []
    for module in (model.model.embed, model.model.final_norm, model.head):
        module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert seconds(model) > 0
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_generator_of_the_user_moves(monkeypatch) -> None:
    monkeypatch.setattr(outside_time, "_EMBEDDINGS_ON", ("cuda", "cpu"))
    model, hidden = Model(nn.LayerNorm(WIDTH)), torch.randn(ROWS, TOKENS, WIDTH)
    state = torch.get_rng_state()
    outside_seconds(model, profiles(), ROWS, hidden, tiled_loss=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_parts_go_forward_alone(timed) -> None:
    model = Model(nn.LayerNorm(WIDTH)).requires_grad_(False)
    assert seconds(model) == 3 * ROWS * TOKENS


def test_without_a_hidden_state_nothing_is_timed(timed) -> None:
    found = outside_seconds(Model(), profiles(), ROWS, None, tiled_loss=True)
    assert found == Growth(linear=6 * ROWS * WIDTH * 100)
    assert not timed
