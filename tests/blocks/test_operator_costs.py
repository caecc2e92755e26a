"""FLOPs of attention: PyTorch's own formulas with heads of their own for keys, which some releases refuse otherwise."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from memo_runtime.blocks.operators import operator_flops

HEADS, QUERIES, KEYS, DEPTH, WIDTH = 8, 64, 96, 32, 16


def tensors(key_heads):
    return (
        torch.empty(2, HEADS, QUERIES, WIDTH, device="meta"),
        torch.empty(2, HEADS, QUERIES, DEPTH, device="meta"),
        torch.empty(2, key_heads, KEYS, DEPTH, device="meta"),
        torch.empty(2, key_heads, KEYS, WIDTH, device="meta"),
    )


@pytest.mark.parametrize("key_heads", [1, 2, HEADS])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_grouped_heads_cost_what_heads_of_their_own_cost(monkeypatch, kernel, key_heads):
    given, own = tensors(key_heads), tensors(HEADS)
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention_backward")
    expected = flop_registry[forward](*own[1:], out_val=own[:1]), flop_registry[backward](*own, out_val=own[1:])

    def refuse(*args, **kwargs):
        raise AssertionError("batch/heads/dimension mismatch among tensors")  # torch 2.11, where heads are grouped

    monkeypatch.setitem(flop_registry, forward, refuse)
    monkeypatch.setitem(flop_registry, backward, refuse)
    assert operator_flops(forward.default, given[1:], {}, None) == expected[0]
    assert operator_flops(backward.default, given, {}, None) == expected[1]
