"""A batch without sequences, or sequences without tokens, between ordinary ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memo_runtime as memo


@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 16)])
@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch_passes(shape, first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().train()
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    memo.wrap(model, policy="memo", alpha=0.5, keep_last=0)
    if not first:
        model(x).sum().backward()
    model(torch.randn(*shape, dtype=torch.float64)).sum().backward()
    assert {block.reason for block in memo.report(model).blocks} == {"its input is empty"}
    model(x).sum().backward()
    assert memo.report(model).totals.bytes_to_host > 0
