"""Late runs of blocks under all that attention is given: spans of windows and documents, masks, adapters, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import memo_runtime as memo
from memo_runtime.integrations import attention_masks
from memo_runtime.records import Executor
from tests.capture.blocks import DocumentMask
from tests.exactness import hand_written
from tests.exactness.compare import model_loss, output_loss, run_step
from tests.exactness.models import FAMILIES
from tests.exactness.test_tiled import assert_close, batch_of, stack
from tests.exactness.test_tiled_chain import assert_as_planned, planned, wrapped
from tests.execution.test_tiled_families import _MORE

KINDS = FAMILIES | _MORE


def assert_late(model: nn.Module, batch: dict[str, Any], loss_of: Any, *, every: int = 8) -> Any:
    """Two steps in late runs of ``every`` blocks are the unwrapped model's, and to the byte as planned; the report."""
    want = run_step(model, batch, loss_of)
    plan = planned(memo.profile(model, batch, tiles=True), every, late=True)
    assert all(block.late for block in plan.blocks)
    assert sum(block.from_below for block in plan.blocks) == len(plan.blocks) - -(-len(plan.blocks) // every)
    with wrapped(model, plan):
        for _ in range(2):
            assert_close(run_step(model, batch, loss_of), want)
        assert_as_planned(model)
        report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.TILED}
    return report


@pytest.mark.parametrize(
    ("name", "packed"),
    [("mistral", True), *(pytest.param(*one, marks=pytest.mark.slow) for one in
     (("mistral", False), ("llama", True), ("gemma3", True), ("qwen3", True)))],
)  # fmt: skip
def test_windows_and_documents_as_spans(name, packed, monkeypatch):
    """Three sequences of an odd length, each with documents of its own."""
    monkeypatch.setattr(attention_masks, "SMALL_MASK", 0)
    if name == "gemma3":
        norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm
        monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))
    model, batch = KINDS[name].make(num_hidden_layers=3), KINDS[name].batch(rows=3, tokens=31)
    batch["use_cache"] = False
    batch.pop("attention_mask", None)
    if packed:
        whole = torch.arange(31)
        batch["position_ids"] = torch.stack([torch.cat((whole[:7], whole[:24])), torch.cat((whole[:20], whole[:11])),
                                             torch.cat((whole[:1], whole[:30]))])  # fmt: skip
    report = assert_late(model, batch, model_loss)
    assert not packed or all("masked_attention" in one for block in report.blocks for one in block.attention)


def test_a_mask_that_is_an_argument():
    batch = batch_of(tokens=19) | {"documents": torch.tensor([[0] * 6 + [1] * 13] * 3)}
    assert_late(stack(DocumentMask, DocumentMask, DocumentMask), batch, output_loss, every=2)


@pytest.mark.slow
def test_lora():
    """The first block's input needs no gradient, so that one is no part of a run of others."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "merge"], init_lora_weights=False)
    made = stack(*[hand_written.Attention] * 3)
    model = peft.get_peft_model(made, config).double()
    batch = batch_of()
    want = run_step(model, batch, output_loss)
    plan = planned(memo.profile(model, batch, tiles=True), 4, late=True)
    assert any(block.from_below for block in plan.blocks)
    with wrapped(model, plan):
        for _ in range(2):
            assert_close(run_step(model, batch, output_loss), want)
        assert memo.report(model).totals.host_bytes_in_use == 0
