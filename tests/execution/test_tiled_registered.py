"""Operators named with ``memo.register_mixer``, by tiles: at full length, backward by their own formula."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.blocks import operators
from memo_runtime.blocks.call import BlockCall
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.mixers.by_graph import run_with_graph
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_profile import tiled_profile
from tests.exactness.hand_written import WIDTH, Part, merge_heads
from tests.execution.tiles import assert_exact, call_of, worst

LIBRARY = torch.library.Library("memo_tests_mixers", "DEF")
LIBRARY.define("scan(Tensor x, Tensor decay) -> (Tensor, Tensor)")
LIBRARY.define("noisy(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
CALLS = {"scan": 0}


def _scan(x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """y[t] = decay * y[t - 1] + x[t], and the state that each step started from."""
    CALLS["scan"] += 1
    state, states, results = torch.zeros_like(x[:, 0]), [], []
    for token in range(x.shape[1]):
        states.append(state)
        state = decay * state + x[:, token]
        results.append(state)
    return torch.stack(results, 1), torch.stack(states, 1)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1], output[1])


def _scan_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    decay, states = ctx.saved_tensors
    carried, grads, total = torch.zeros_like(grad[:, 0]), [], torch.zeros_like(decay)
    for token in range(grad.shape[1] - 1, -1, -1):
        carried = carried + grad[:, token]
        grads.append(carried)
        total = total + (carried * states[:, token]).sum(0)
        carried = carried * decay
    return torch.stack(grads[::-1], 1), total


LIBRARY.impl("scan", _scan, "CompositeExplicitAutograd")
LIBRARY.impl("noisy", lambda x: x + torch.rand_like(x), "CompositeExplicitAutograd")
torch.library.register_fake(
    "memo_tests_mixers::scan", lambda x, decay: (torch.empty_like(x), torch.empty_like(x)), lib=LIBRARY
)
torch.library.register_fake("memo_tests_mixers::noisy", torch.empty_like, lib=LIBRARY)
torch.library.register_autograd("memo_tests_mixers::scan", _scan_backward, setup_context=_keep, lib=LIBRARY)
OPS = torch.ops.memo_tests_mixers


@torch.library.custom_op("memo_tests_mixers::blend", mutates_args=())
def blend(x: Tensor) -> Tensor:
    """Mixes tokens, and has no formula for backward."""
    return x + x.mean(1, keepdim=True)


blend.register_fake(torch.empty_like)


class Scan(Part):
    """A scan over time with a decay of its own; ``both``: attention behind it."""

    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(WIDTH))
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        y, _ = OPS.scan(self.norm(x), self.decay.sigmoid())
        if self.both:
            q, k, v = self.heads(x + y)
            y = y + merge_heads(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.finish(x, y)


class Convolution(Part):
    """A causal convolution over tokens, an operator of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 1, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.norm(x).transpose(1, 2)
        mixed = torch.ops.aten.conv1d.default(moved, self.weight, None, [1], [3], [1], WIDTH)
        return self.finish(x, x + torch.ops.aten.slice.Tensor(mixed, 2, 0, -3).transpose(1, 2))


class Running(Part):
    """A running sum of tokens, whose backward saves nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, torch.cumsum(self.norm(x), 1) / 8)


class WithoutFormula(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, OPS.blend(self.norm(x)))


class Noisy(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, OPS.noisy(self.norm(x)))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """What this test names is forgotten behind it."""
    monkeypatch.setattr(operators, "_registered_mixers", set(operators._registered_mixers))


def double(kind: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options).double().train()


def hidden(tokens: int = 29) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "both", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "before attention"]
)
def test_a_scan(both):
    memo.register_mixer("memo_tests_mixers::scan")
    block = double(Scan, both=both)
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    assert_exact(call_of(block, hidden()), tiled)
    assert tiled.kernels == ["memo_tests_mixers::scan", *(["cpu"] if both else [])]


def test_operators_of_pytorch():
    memo.register_mixer("aten::cumsum")
    block = double(Running)
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8))


def test_without_its_name_it_is_refused():
    block = double(Scan)
    tiled = TiledBlock(block, tile=8)
    with pytest.raises(CaptureRefusedError, match=r"memo_tests_mixers\.scan: it is not known"):
        tiled(hidden())
    memo.register_mixer("memo_tests_mixers::scan")
    assert_exact(call_of(block, hidden()), tiled)


def test_its_forward_runs_once_and_what_it_saves_is_stashed():
    memo.register_mixer("memo_tests_mixers::scan")
    block, x = double(Scan), hidden()
    tiled = TiledBlock(block, tile=8)
    captured = tiled.captured(BlockCall.of((x,), {}))
    CALLS["scan"] = 0
    tiled(x).sum().backward()
    assert CALLS["scan"] == 1
    profile = tiled_profile(captured, BlockCall.of((x,), {}))
    assert [growth.linear for growth in profile.stash] == [3 * WIDTH * 8] * 3  # x, the scan's result, its states
    assert profile.attention == ("memo_tests_mixers::scan",)


def test_a_second_backward_where_the_graph_is_kept():
    memo.register_mixer("memo_tests_mixers::scan")
    block, x = double(Scan), hidden()
    loss = TiledBlock(block, tile=8)(x).square().sum()
    wanted = [x, *block.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert worst(second, first) == 0.0


@pytest.mark.slow
def test_bfloat16_under_autocast():
    memo.register_mixer("memo_tests_mixers::scan")
    torch.manual_seed(0)
    block = Scan()
    x = hidden().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = block(x), TiledBlock(block, tile=8)(x)
    assert mine.dtype == theirs.dtype
    wanted = [x, *(one for name, one in block.named_parameters())]
    theirs, mine = (torch.autograd.grad(one.sum(), wanted, allow_unused=True) for one in (theirs, mine))
    assert worst(mine, theirs) < 4e-2


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (WithoutFormula, "blend", "no autograd formula was registered"),
        (Noisy, "noisy", "draws random numbers"),
        (Convolution, "conv1d", "size|tokens"),
    ],
)
def test_refused_by_name(kind, name, reason):
    memo.register_mixer(f"{'aten' if name == 'conv1d' else 'memo_tests_mixers'}::{name}")
    with pytest.raises(CaptureRefusedError, match=reason) as caught:
        TiledBlock(double(kind), tile=8)(hidden())
    assert caught.value.operator


def test_a_graph_holds_no_tensor():
    """Between forward and backward: neither arguments nor results nor what is stashed."""
    arguments = [torch.randn(2, 4, 16, 8, dtype=torch.float64) for _ in range(3)]
    results, stash, graph = run_with_graph(
        lambda tensors: functional.scaled_dot_product_attention(*tensors, is_causal=True), arguments, [True] * 3, [0]
    )
    storages = [weakref.ref(one) for one in (*arguments, *results, *stash)]
    copies = [[one.clone() for one in group] for group in (arguments, results, stash)]
    leaves = [one.clone().requires_grad_() for one in arguments]
    del arguments, results, stash
    gc.collect()
    assert [one() for one in storages] == [None] * 5
    grad = torch.randn_like(copies[1][0])
    mine = graph.backward([grad], *copies, retain=False)
    output = functional.scaled_dot_product_attention(*leaves, is_causal=True)
    assert worst(mine, torch.autograd.grad(output, leaves, grad)) == 0.0


def test_results_that_nobody_uses_are_stashed_where_backward_wants_them():
    x, decay = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    _, stash, _ = run_with_graph(lambda tensors: OPS.scan(*tensors), [x, decay], [True, True], [0])
    assert [one.shape for one in stash] == [x.shape]
