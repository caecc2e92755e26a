"""Arguments of all pairs of tokens are said, once, with their bytes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.blocks import squares
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.squares import about_squares

TOKENS, WIDTH = 48, 8
HIDDEN = torch.randn(2, TOKENS, WIDTH)


@pytest.fixture(autouse=True)
def worth_saying(monkeypatch):
    monkeypatch.setattr(squares, "_WORTH_SAYING", 4 * TOKENS**2)


def said(**kwargs):
    return about_squares(BlockCall.of((HIDDEN,), kwargs))


def test_a_bias_is_said_with_its_name_and_bytes():
    text = said(bias=torch.zeros(1, 1, TOKENS, TOKENS))
    assert text is not None
    assert "('bias', float32, 1 x 1 x 48 x 48) takes 9.00 KiB at 48 tokens" in text


@pytest.mark.parametrize(
    "other",
    [torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool), torch.zeros(1, 1, 1, TOKENS).expand(1, 1, TOKENS, TOKENS),
     torch.zeros(99, TOKENS, WIDTH), None],
    ids=["small", "no memory", "one token dimension", "no tensor"],
)  # fmt: skip
def test_what_is_small_or_has_one_token_dimension_is_not(other):
    assert said(other=other) is None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, bias):
        return x + torch.softmax(x @ x.transpose(1, 2) + bias, -1) @ self.mix(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x):
        bias = torch.zeros(x.shape[1], x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x


def test_a_wrapped_model_says_it_once_in_the_log_and_in_the_report(caplog):
    model = memo.wrap(Model(), policy="swap")
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        for _ in range(2):
            model(HIDDEN).sum().backward()
    texts = [record.message for record in caplog.records if "all pairs of tokens" in record.message]
    assert len(texts) == 1
    assert texts[0] in memo.report(model).notes
