"""Programs through TorchInductor: compiled once, for whoever is called with tensors laid out alike."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.config
import torch._inductor
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from memo_runtime.execution.compilers import NotCompiledError, compiled
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from tests.execution.tiles import assert_exact, call_of

WIDTH = 16


def graph():
    return make_fx(lambda x, w: (x @ w, w.sum(0)))(torch.ones(2, 3), torch.ones(3, 3)).graph


def test_what_the_compiler_says_is_handed_on(monkeypatch):
    def refuse(*_):
        raise ValueError("no such target")

    monkeypatch.setattr(torch._inductor, "compile", refuse)
    with pytest.raises(NotCompiledError, match="no such target"):
        compiled(graph())(torch.ones(2, 3), torch.ones(3, 3))


def test_memory_that_runs_out_meanwhile_is_no_failure_of_the_compiler(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch._inductor, "compile", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(graph())(torch.ones(2, 3), torch.ones(3, 3))


def test_nothing_is_compiled_where_compilation_is_switched_off(monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", None)
    with torch._dynamo.config.patch(disable=True):
        product, total = compiled(graph())(torch.ones(2, 3), torch.ones(3, 3))
    assert torch.equal(product, torch.full((2, 3), 3.0))
    assert torch.equal(total, torch.full((3,), 3.0))


class Gated(nn.Module):
    """Attention from one tensor to another, which may be the same."""

    def __init__(self):
        super().__init__()
        self.norm, self.value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, other):
        hidden = (self.norm(x) * torch.sigmoid(other))[:, None]
        mixed = scaled_dot_product_attention(hidden, hidden, self.value(other)[:, None], is_causal=True)[:, 0]
        return x + mixed * other


class Tied(nn.Module):
    """Two products, by one matrix or by two."""

    def __init__(self, *, tied):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = self.query if tied else nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        query, key = self.query(x)[:, None], self.key(x)[:, None]
        mixed = scaled_dot_product_attention(query, key, x[:, None], is_causal=True)[:, 0]
        return x + torch.tanh(mixed) * self.key(mixed)


@pytest.mark.slow
def test_one_program_serves_calls_with_one_tensor_twice_and_with_two():
    programs = ProgramCache(compiled)
    for same in (True, False, True):
        x = torch.randn(2, 21, WIDTH, dtype=torch.float64, requires_grad=True)
        other = x if same else torch.randn_like(x).requires_grad_()
        block = Gated().double()
        assert_exact(call_of(block, x, other), TiledBlock(block, tile=8, alpha=0.5, programs=programs))


@pytest.mark.slow
def test_blocks_with_tied_weights_leave_those_without_their_own():
    programs = ProgramCache(compiled)
    for tied in (True, False):
        x = torch.randn(2, 21, WIDTH, dtype=torch.float64, requires_grad=True)
        block = Tied(tied=tied).double()
        assert_exact(call_of(block, x), TiledBlock(block, tile=8, alpha=0.5, programs=programs))
