"""What tiles run again, what they never hold whole, and how much is alive."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from memo_runtime.execution import compilers
from memo_runtime.execution.compilers import compiled
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from tests.exactness import hand_written
from tests.exactness.hand_written import WIDTH
from tests.execution.tiles import assert_exact, call_of

TOKENS = 64


class Operators(TorchDispatchMode):
    """Counts operators and remembers the largest result."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.largest = 0
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.counts[func._overloadpacket.__name__] += 1
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.shapes[func._overloadpacket.__name__, one.shape] += 1
                self.largest = max(self.largest, one.numel())
        return out


def prepared(alpha=0.0):
    """A block that was captured and checked, so that a step holds nothing but the step."""
    torch.manual_seed(0)
    block = hand_written.Attention().double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    tiled = TiledBlock(block, tile=8, alpha=alpha)
    tiled(x).sum().backward()
    return block, tiled, x


def test_attention_runs_once_and_no_tensor_of_the_mlp_is_whole():
    _, tiled, x = prepared()
    with Operators() as seen:
        tiled(x).sum().backward()
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert seen.counts["_scaled_dot_product_flash_attention_for_cpu_backward"] == 1
    assert seen.largest < TOKENS * 2 * WIDTH  # the MLP is twice as wide as the block


def _addmm(total, left, right, *, out_shape=None, **kwargs):
    return 2 * left[0] * left[1] * right[1]


def flops(forward, x):
    # Weight gradients are added to their sums by the product itself, which PyTorch's counter does not know in place.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        forward(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("alpha", "again"), [(0.0, 3 + 1 + 2), (0.5, 3 + (1 + 2) / 2), (1.0, 3)])
def test_what_is_run_again(alpha, again):
    """In products of all tokens with a square matrix: queries, keys and values for attention are three; of the last
    segment the output projection (one) and the first half of the MLP (two), the last product never."""
    block, tiled, x = prepared(alpha)
    extra = (flops(tiled, x) - flops(block, x)) / (2 * TOKENS * WIDTH * WIDTH)
    assert extra == again


def test_autocast_casts_weights_once_per_segment():
    block = hand_written.Attention()
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    tiled = TiledBlock(block, tile=8)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tiled(x).float().sum().backward()

    step()
    with Operators() as seen:
        step()
    # Eight tiles, forward and backward.
    assert seen.shapes["_to_copy", block.up.weight.shape] == 2


@pytest.mark.slow
def test_compiled_programs_are_exact_and_compiled_once(monkeypatch):
    programs = ProgramCache(compiled)
    made, seen = [], []
    compile_one = compilers.through_inductor
    monkeypatch.setattr(compilers, "through_inductor", lambda *given: made.append(1) or compile_one(*given))
    for _ in range(2):
        block = hand_written.Attention().double()
        x = torch.randn(2, 29, WIDTH, dtype=torch.float64, requires_grad=True)
        assert_exact(call_of(block, x), TiledBlock(block, tile=8, alpha=0.5, programs=programs))
        seen.append(len(made))
    assert seen[0] == seen[1] > 0
