"""Keys and values that some blocks leave for those behind them, in an object or a dict that all are given.

Which blocks do is said by their own attributes: to the rest they are equal (Gemma 3n and 4 with shared keys).
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.records import Executor
from tests.exactness.compare import (
    MEMO,
    RECOMPUTE,
    SWAP,
    TOLERANCE,
    Step,
    Way,
    assert_gradients,
    assert_same,
    output_loss,
    relative_error,
    run_step,
)
from tests.exactness.hand_written import WIDTH, sequence
from tests.exactness.models import Family, text

_GEMMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
}


def gemma3n(layers: int, shared: int, *kinds: str) -> Family:
    settings = _GEMMA | {
        "intermediate_size": [48] * layers,
        "num_hidden_layers": layers,
        "layer_types": list(kinds) or ["sliding_attention", "full_attention"] * (layers // 2),
        "num_kv_shared_layers": shared,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * layers,
    }
    return Family(transformers.Gemma3nForCausalLM, transformers.Gemma3nTextConfig, settings)


def gemma4(layers: int, shared: int) -> Family:
    settings = _GEMMA | {
        "global_head_dim": 8,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "num_kv_shared_layers": shared,
    }
    return Family(transformers.Gemma4ForCausalLM, transformers.Gemma4TextConfig, settings)


FAMILIES = {"gemma3n": gemma3n(6, 2), "gemma4": gemma4(6, 2)}


@pytest.mark.parametrize("way", [SWAP, RECOMPUTE, MEMO, Way("auto")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_store_are_equal_to_those_that_do_not(family: str, way: Way) -> None:
    """Under ``strict``: every block is sliced, those that read what others have stored too."""
    model = FAMILIES[family].make()
    batches = [text(rows=2, tokens=23), text(rows=1, tokens=31)]
    wants = [run_step(model, batch) for batch in batches]
    way.wrap(model, strict=True)
    for want, batch in zip(wants, batches, strict=True):
        for _ in range(2):
            assert_same(run_step(model, batch), want, way)
    report = memo.report(model)
    assert [block.reason for block in report.blocks] == [""] * 6
    if way.policy != "auto":
        assert all(block.bytes_to_host > 0 for block in report.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_by_tiles_those_that_store_are_refused_by_name(family: str) -> None:
    model, batch = FAMILIES[family].make(), text(rows=2, tokens=23)
    want = run_step(model, batch)
    memo.wrap(model, policy="tiled", tile=8, keep_last=0, loss="native")
    for _ in range(2):
        # Norms compute in float32 where the model does.
        assert_close(run_step(model, batch), want, tolerance=1e-6)
    blocks = memo.report(model).blocks
    stores = [block for block in blocks if "writes to" in block.reason]
    assert [block.name[-1] for block in stores] == ["2", "3"]
    # Each of Gemma 3n has a number of its own that is no part of the block.
    by_tiles = [0, 1, 4, 5] if family == "gemma4" else []
    assert [at for at, block in enumerate(blocks) if block.executor is Executor.TILED] == by_tiles
    assert all(block.bytes_to_host > 0 for block in blocks)


def assert_close(got: Step, want: Step, tolerance: float = TOLERANCE) -> None:
    assert abs(float(got.loss - want.loss)) <= tolerance * abs(float(want.loss))
    assert relative_error(got.gradients, want.gradients) <= tolerance


def test_no_step_is_lost() -> None:
    """Those keys were found on a slice as results of ``detach``, whose calls the step numbers otherwise."""
    model, batch = gemma3n(2, 1, "full_attention", "full_attention").make(), text(rows=2, tokens=23)
    want = run_step(model, batch)
    MEMO.wrap(model)
    assert_gradients(run_step(model, batch).gradients, want.gradients, MEMO)
    assert all(block.bytes_to_host > 0 for block in memo.report(model).blocks)


class Box:
    """An object of nobody's library."""


class Holder(dict[str, Any]):
    """A dict of its own class, which PyTorch does not open."""


class Sharing(nn.Module):
    """One that attends to its own keys, leaves them in ``store``, or takes them from there, as its ``does`` says."""

    def __init__(self, does: str) -> None:
        super().__init__()
        self.does = does
        self.project, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, store: Any = None) -> Tensor:
        store = self.store if store is None else store
        q, k, v = (part.unsqueeze(1) for part in self.project(x).chunk(3, -1))
        if self.does == "reads":
            k, v = store["kv"] if isinstance(store, (dict, UserDict)) else store.kv
        elif self.does == "stores" and isinstance(store, (dict, UserDict)):
            store["kv"] = k, v
        elif self.does == "stores":
            store.kv = k, v
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.merge(functional.silu(mixed.squeeze(1)))


class Stack(nn.Module):
    """Gives all blocks one new ``kind``; or lets them have it as an attribute."""

    def __init__(self, kind: Any, *, given: bool) -> None:
        super().__init__()
        self.kind, self.given = kind, given
        self.layers = nn.ModuleList(Sharing(does) for does in ("", "", "stores", "", "reads", "", "reads"))

    def forward(self, x: Tensor) -> Tensor:
        store = self.kind()
        for layer in self.layers:
            if not self.given:
                layer.store = store
        for layer in self.layers:
            x = layer(x, store) if self.given else layer(x)
        return x


KINDS = {"dict": dict, "UserDict": UserDict, "object": Box, "of a class": Holder}


@pytest.mark.parametrize("given", [True, False], ids=["given", "held"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [SWAP, RECOMPUTE, MEMO, Way("tiled")], ids=str)
def test_wherever_they_leave_it(way: Way, kind: str, given: bool) -> None:
    torch.manual_seed(0)
    model = Stack(KINDS[kind], given=given).double()
    for tokens in (23, 31):
        batch = {"x": sequence(tokens=tokens)}
        want = run_step(model, batch, output_loss)
        way.wrap(model)
        for _ in range(2):
            assert_close(run_step(model, batch, output_loss), want)
        assert sum(block.executor is Executor.NATIVE for block in memo.report(model).blocks) <= 1
        memo.unwrap(model)
