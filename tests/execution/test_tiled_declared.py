"""Modules that were declared token-wise, by tiles: run by their own code, tested before they are believed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import output_capturing

import memo_runtime as memo
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.declared import declare_token_wise
from memo_runtime.capture.experts import with_experts
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.compilers import as_module
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_profile import tiled_profile
from tests.exactness.hand_written import WIDTH, Attention
from tests.exactness.models import FAMILIES
from tests.execution.tiles import assert_exact, call_of, calls_of, run, worst


class Scaled(torch.autograd.Function):
    """A kernel with a backward of its own; ``wrong``: its backward divides by the number of tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, wrong: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wrong = wrong
        return torch.tanh(x * weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        inner = grad * (1 - torch.tanh(x * weight) ** 2)
        inner = inner / x.shape[1] if ctx.wrong else inner
        return inner * weight, (inner * x).sum((0, 1)), None


class Kernel(nn.Module):
    """A module around ``Scaled``."""

    wrong = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.weight, self.wrong)


class WrongBackward(Kernel):
    wrong = True


class Experts(nn.Module):
    """Tokens routed to two of four experts, by sizes that depend on data; yields the logits of its router too."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.drop = drop

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        flat = x.flatten(0, 1)
        logits = self.router(flat)
        weights, chosen = logits.softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            rows = functional.dropout(expert(flat[token]), self.drop, self.training)
            out = out.index_add(0, token, (rows * weights[token, place, None]).to(out.dtype))
        return out.view_as(x), logits, None


class BatchMean(nn.Module):
    """Takes a little of the mean over all tokens off."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 1e-3 * x.mean(1, keepdim=True)


class Capacity(nn.Module):
    """Drops what an expert cannot take: which tokens, depends on those before."""

    def forward(self, x: Tensor) -> Tensor:
        first = (x[..., 0] > 1.0).long()
        place = first.cumsum(1)
        return torch.where((place <= math.ceil(0.5 * x.shape[1]))[..., None], x, torch.zeros_like(x))


class KeepsLoss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.aux_loss = x.square().mean()
        return x * 2


class CountsTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[1]
        return x * 2


class CountsAnew(CountsTokens):
    def forward(self, x):
        self.seen = self.seen + x.shape[1]
        return x


class WritesArgument(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().mul_(2.0)


class Summed(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.sum()


class ByData(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x[x > 0]


class NeedsEights(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 8, WIDTH).flatten(1, 2)


class Around(Attention):
    """Attention, then ``inner``; what else it yields is yielded. ``first``: ``inner`` is before attention."""

    def __init__(self, inner: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        self.inner, self.first = inner, first

    def forward(self, x: Tensor) -> Any:
        if self.first:
            found = self.inner(self.norm(x))
            found, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
            y = super().forward(x + found)
        else:
            y = super().forward(x)
            found = self.inner(self.norm(y))
            found, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
            y = y + functional.silu(found) * 2
        return (y, *rest) if rest else y


def around(inner: nn.Module, **options: Any) -> Around:
    torch.manual_seed(0)
    block = Around(inner, **options).double().train()
    declare_token_wise(block.inner)
    return block


def hidden(tokens: int = 29, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


#: Experts behind attention are compared in evaluation mode below.
@pytest.mark.parametrize(("inner", "first"), [
    (Kernel, False), (Experts, True),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((Kernel, True), (Experts, False))),
], ids=lambda value: {False: "behind attention", True: "before attention"}.get(value))  # fmt: skip
def test_exact(inner, first):
    block = around(inner(), first=first)
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8, alpha=0.5))


def _through_aot(graph: Any) -> Any:
    """As ``torch.compile`` runs programs on a GPU, with autograd's keys left out, but without a compiler's minutes."""
    return torch.compile(as_module(graph), fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize(
    "first", [pytest.param(False, marks=pytest.mark.slow), True], ids=["behind attention", "before attention"]
)
def test_in_compiled_programs(first):
    """Autograd is off inside those, and the module needs it for its backward."""
    block = around(Experts(), first=first)
    programs = ProgramCache(_through_aot)
    assert_exact(call_of(block, hidden(30)), TiledBlock(block, tile=15, alpha=0.5, programs=programs))


def test_without_the_word_it_is_refused():
    block = Around(Kernel()).double()
    with pytest.raises(CaptureRefusedError, match=r"autograd\.Function 'Scaled'"):
        TiledBlock(block, tile=8)(hidden())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("qwen3-moe", "mlp.experts"),
        *(pytest.param(*one, marks=pytest.mark.slow)
          for one in (("mixtral", "mlp"), ("mixtral", "mlp.experts"), ("qwen3-moe", "mlp"))),
    ],
)  # fmt: skip
def test_routed_experts(name, part):
    """The whole of a sparse MLP, as above, or its experts alone: the router is captured then, its choices are kept."""
    call = calls_of(FAMILIES[name], tokens=19, output_router_logits=False)[0]
    declare_token_wise(call.block.get_submodule(part))
    assert_exact(call, TiledBlock(call.block, tile=5, alpha=0.5))


def test_experts_that_were_not_declared_are_named_and_how_to_declare_them(capfd):
    """And PyTorch's own account of what it could not trace, pages of it, is not printed."""
    family = FAMILIES["mixtral"]
    model = family.make().float()
    memo.wrap(model, policy="tiled")
    model(**family.batch(rows=1, tokens=19)).loss.backward()
    reasons = {block.reason for block in memo.report(model).blocks}
    assert [reason.endswith("If its 'mlp' treats tokens one by one, as routed experts do, declare it: memo.token_wise")
            for reason in reasons] == [True]  # fmt: skip
    assert "Traceback" not in capfd.readouterr().err


def test_what_looks_as_if_it_had_experts():
    mixtral = FAMILIES["mixtral"].make().model.layers[0]
    assert with_experts(mixtral) == "mlp"
    declare_token_wise(mixtral.mlp)
    assert with_experts(mixtral) == ""
    listed = nn.Module()
    listed.norm, listed.experts = nn.LayerNorm(4), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert with_experts(listed) == "experts"
    other = nn.Module()
    other.mixer = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
    other.mixer.heads = nn.Parameter(torch.ones(3, 4, 4))
    other.mixer.scale, other.mixer.shift = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(1, 1, 4))
    assert with_experts(other) == ""
    assert with_experts(nn.TransformerEncoderLayer(8, 2)) == ""


@pytest.mark.parametrize("part", ["mlp", "mlp.experts"])
def test_logits_that_are_collected_from_inside_are_refused_by_name(part):
    """Transformers collects router logits by a hook, which would see tiles."""
    call = calls_of(FAMILIES["qwen3-moe"], tokens=19)[0]
    declare_token_wise(call.block.get_submodule(part))
    tiled = TiledBlock(call.block, tile=5)
    recording = output_capturing._active_collector.set({"router_logits": []})
    try:
        with pytest.raises(CaptureRefusedError, match=r"hook '.*capturing_hook' of '"):
            tiled(*call.args, **call.kwargs)
    finally:
        output_capturing._active_collector.reset(recording)
    assert_exact(call, tiled)  # hooks that stay when nothing is recorded are not in the way


def test_a_block_that_is_declared_itself():
    torch.manual_seed(0)
    block = Experts().double()
    declare_token_wise(block)
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8))


def test_frozen_parameters_and_a_switched_attribute():
    block = around(Kernel())
    tiled = TiledBlock(block, tile=8)
    assert_exact(call_of(block, hidden()), tiled)
    block.inner.weight.requires_grad_(False)
    assert_exact(call_of(block, hidden()), tiled)
    block.inner.wrong = True
    with pytest.raises(CaptureRefusedError, match="gradient of argument 0 of a part"):
        tiled(hidden())


def test_autocast():
    torch.manual_seed(0)
    block = Around(Experts())
    declare_token_wise(block.inner)
    x = hidden().detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, mine = run(call_of(block, x), block), run(call_of(block, x), TiledBlock(block, tile=8))
    assert [one.dtype for one in mine[0]] == [one.dtype for one in theirs[0]]
    assert worst(mine[0], theirs[0]) < 2e-2
    assert worst(mine[1], theirs[1]) < 4e-2


def test_evaluation_mode_captures_again():
    block = around(Experts(drop=0.5))
    block.eval()
    assert_exact(call_of(block, hidden()), TiledBlock(block, tile=8))


@pytest.mark.parametrize(
    "first", [pytest.param(False, marks=pytest.mark.slow), True], ids=["behind attention", "before attention"]
)
def test_what_it_drops_is_the_same_in_backward(first):
    """The check of the capture gives the block the seeds that tiles drew: it passes, or raises."""
    block, x = around(Experts(drop=0.5), first=first), hidden()
    tiled = TiledBlock(block, tile=8, alpha=0.5)
    before = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        before.append(tiled(x)[0])
    assert torch.equal(before[0], before[1])
    assert not torch.equal(before[0], before[2])
    gradients = [torch.autograd.grad(one.sum(), [x, *block.inner.parameters()]) for one in before[:2]]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_gradient_of_dropped_elements_is_that_of_its_forward():
    """By differences: the same seed in forward, one number of the input moved."""
    block, x = around(Experts(drop=0.5)), hidden()
    tiled = TiledBlock(block, tile=8)
    weights = torch.randn(3, 29, WIDTH, dtype=torch.float64)

    def loss(value: Tensor) -> Tensor:
        torch.manual_seed(3)
        return (tiled(value)[0] * weights).sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    step = torch.zeros_like(x)
    step[1, 17, 5] = 1e-6
    with torch.no_grad():
        moved = (x + step).requires_grad_(), (x - step).requires_grad_()
    slope = (loss(moved[0]) - loss(moved[1])).item() / 2e-6
    assert abs(slope - grad[1, 17, 5].item()) <= 1e-6 * max(1.0, abs(slope))


@pytest.mark.parametrize(
    "first", [pytest.param(False, marks=pytest.mark.slow), True], ids=["behind attention", "before attention"]
)
def test_its_choices_are_kept_and_not_made_again(monkeypatch, first):
    """A rerun whose router would choose otherwise: gradients are those of what the forward chose."""
    block, x = around(Experts(), first=first), hidden()
    wanted = [x, *block.inner.parameters()]
    expected = torch.autograd.grad(block(x)[0].sum(), wanted)
    result = TiledBlock(block, tile=8)(x)[0]
    choose = Tensor.topk

    def otherwise(self, *args, **kwargs):
        _, indices = choose(self + torch.rand_like(self), *args, **kwargs)
        return self.gather(-1, indices), indices

    monkeypatch.setattr(Tensor, "topk", otherwise)
    assert worst(torch.autograd.grad(result.sum(), wanted), expected) <= 1e-12


REFUSED = {
    BatchMean: r"mixes tokens: .* differs by",
    Capacity: r"mixes tokens: result 0 of a part of the tokens differs by",
    WrongBackward: r"mixes tokens: gradient of argument 0 of a part of the tokens differs by",
    KeepsLoss: r"attribute 'aux_loss' changes when it runs",
    CountsTokens: r"it writes to 'seen'",
    CountsAnew: r"buffer 'seen' changes when it runs",
    WritesArgument: r"it writes to its argument",
    Summed: r"result 1 has no token dimensions",
    ByData: r"result 1 has a size of \d+ for 37 tokens",
    NeedsEights: r"it does not run on 37 or 26 tokens alone: RuntimeError",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_refused_by_name(kind):
    with pytest.raises(CaptureRefusedError, match=REFUSED[kind]) as caught:
        TiledBlock(around(kind()), tile=8)(hidden())
    assert caught.value.operator == "memo.token_wise module 'inner'"


def test_a_test_leaves_the_module_and_random_state_alone():
    block, x = around(Experts(drop=0.5)), hidden()
    before = {name: (id(one), one._version, one.grad) for name, one in block.named_parameters()}
    attributes, state = dict(block.inner.__dict__), torch.get_rng_state()
    TiledBlock(block, tile=8).captured(BlockCall.of((x,), {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (id(one), one._version, one.grad) for name, one in block.named_parameters()} == before
    assert block.inner.__dict__ == attributes


def test_what_is_run_again_is_counted():
    """Behind attention its forward is run again once, in its backward; choices are the bytes that every tile keeps."""
    block, x = around(Experts()), hidden(30)
    tiled = TiledBlock(block, tile=8)
    call = BlockCall.of((x,), {})
    captured = tiled.captured(call)
    profile = tiled_profile(captured, call)
    seen = []
    way = tiled.way()
    result = tiled.run(captured, call, type(way)(tile=8, ended=lambda run: seen.append(run.again_flops)))
    result[0].sum().backward()
    assert seen == [round(profile.again_flops.at(30))]
    assert profile.resident.linear == 3 * 2 * 8
    assert tiled.bytes_kept == 0
