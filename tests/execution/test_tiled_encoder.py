"""torch.nn's own Transformer layers by tiles, with dropout as they have it: each drops in four places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.execution import tiled_check
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.records import Executor
from tests.exactness.compare import assert_clean, assert_trade, output_loss, run_step

WIDTH, TOKENS = 32, 29


def layer(**changes: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dropout": 0.1, "batch_first": True, "dtype": torch.float64}
    return nn.TransformerEncoderLayer(WIDTH, 4, 48, **(settings | changes))


def inputs(kind: str, *, rows: int = 3, tokens: int = TOKENS, batch_first: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    src = torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64)
    found: dict[str, Any] = {"src": (src if batch_first else src.transpose(0, 1).contiguous()).requires_grad_()}
    if kind == "padding":
        found["src_key_padding_mask"] = torch.arange(tokens).expand(rows, -1) >= tokens - torch.arange(rows)[:, None]
    if kind == "causal":
        found["src_mask"] = nn.Transformer.generate_square_subsequent_mask(tokens, dtype=torch.float64)
        found["is_causal"] = True
    return found


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares a block with its tiles under the masks that these drew: to rounding."""
    monkeypatch.setitem(tiled_check._TOLERANCES, torch.float64, 1e-12)


@pytest.mark.usefixtures("strict")
@pytest.mark.anew
@pytest.mark.parametrize(("norm_first", "activation", "mask"), [
    (True, "gelu", "padding"), (False, "relu", "causal"),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        (True, "gelu", "none"), (True, "relu", "causal"), (False, "gelu", "padding"), (False, "relu", "none"))),
])  # fmt: skip
def test_dropout_is_that_of_given_masks(norm_first: bool, activation: str, mask: str) -> None:
    block = layer(norm_first=norm_first, activation=activation)
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(tiled(**inputs(mask)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert tiled.kernels == ["rows"]


def slope(model: nn.Module, batch: dict[str, Any], along: dict[str, Tensor], step: float = 1e-5) -> float:
    """The loss's derivative along a direction, by its differences: one seed draws one set of masks."""
    named, found = dict(model.named_parameters()), []
    for sign in (1, -1):
        with torch.no_grad():
            for name, one in named.items():
                one.add_(along[name], alpha=sign * step)
        found.append(float(run_step(model, batch, output_loss).loss))
        with torch.no_grad():
            for name, one in named.items():
                one.add_(along[name], alpha=-sign * step)
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("norm_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_model_in_training(norm_first: bool) -> None:
    """Its gradients are those of the loss that it yields, as differences of that loss say."""
    model = nn.TransformerEncoder(layer(norm_first=norm_first, activation="gelu"), 2, enable_nested_tensor=False)
    memo.wrap(model, policy="tiled", tile=8, alpha=0.5, keep_last=0, loss="native")
    batch = inputs("padding")
    first, second = (run_step(model, batch, output_loss) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(second.gradients[name], one) for name, one in first.gradients.items())
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}
    assert_trade(model)
    assert_clean(model)
    along = {name: torch.randn_like(one) for name, one in model.named_parameters()}
    want = sum(float((first.gradients[name] * one).sum()) for name, one in along.items())
    assert abs(slope(model, batch, along) - want) <= 1e-6 * abs(want)
