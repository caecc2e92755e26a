"""The norm behind the blocks: by tiles it is what it was, and takes four times its input instead of thirteen."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import memo_runtime as memo
from memo_runtime.blocks.final_norm import LONG_BYTES, final_norm
from memo_runtime.config import make_settings
from memo_runtime.execution.norm import NormForward, install_norm, remove_norm, run_as_planned
from memo_runtime.planning.planner import make_plan
from memo_runtime.profiling.outside import end_of
from memo_runtime.records import BlockProfile
from memo_runtime.sizes import NORM_TILE
from tests.execution.alive import Alive
from tests.planning.builders import llama_profile

WIDTH = 16
#: Two tiles and a rest.
TOKENS = 2 * NORM_TILE + 700


def rms_norm(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = llama.LlamaRMSNorm(WIDTH).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH))
    return norm


def gradients(norm, hidden, grad):
    hidden = hidden.clone().requires_grad_()
    result = norm(hidden)
    result.backward(grad)
    found, norm.weight.grad = norm.weight.grad, None
    return result.detach(), hidden.grad, found


@pytest.mark.parametrize("kind", [rms_norm, lambda dtype: nn.LayerNorm(WIDTH, dtype=dtype)], ids=["rms", "layer"])
def test_results_and_gradients_are_those_of_the_norm(kind):
    torch.manual_seed(0)
    norm, hidden = kind(torch.float64), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    grad = torch.randn_like(hidden)
    mine, theirs = gradients(copy.deepcopy(norm), hidden, grad), None
    forward = NormForward(norm, long_bytes=0)
    norm.forward = forward
    theirs = gradients(norm, hidden, grad)
    assert forward._tiles is not None
    assert forward._tiles._captures
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def peak_of(norm, hidden, grad):
    """Bytes beside the input, the gradient that comes and parameters, in units of the input."""
    hidden.grad = None
    with Alive(least=hidden.nbytes // 64) as alive:
        norm(hidden).backward(grad)
    return max(alive.peaks.values()) / hidden.nbytes


def test_it_takes_its_result_and_a_gradient_of_full_length():
    width, tokens = 64, 32 * NORM_TILE
    norm = rms_norm(torch.bfloat16)
    norm.weight = nn.Parameter(torch.ones(width, dtype=torch.bfloat16))
    hidden = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.ones_like(hidden)
    whole = peak_of(norm, hidden, grad)
    norm.forward = NormForward(norm, long_bytes=0)
    norm(hidden)  # captured
    by_tiles = peak_of(norm, hidden, grad)
    assert whole > 10
    # The state and the gradient that comes are planned beside it, and a tile as it runs.
    assert by_tiles <= 2 + 16 * NORM_TILE / tokens + 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Model()

    def forward(self, x):
        return self.inner(x)


def test_wrap_puts_it_in_and_takes_it_out():
    model = Outer()
    x = torch.randn(1, 64, WIDTH)
    memo.wrap(model, policy="recompute")
    assert isinstance(vars(model.inner.norm)["forward"], NormForward)
    assert "forward" not in vars(copy.deepcopy(model).inner.norm)
    model(x).sum().backward()  # short: as it is
    assert not model.inner.norm.forward._tiles._captures
    memo.unwrap(model)
    assert "forward" not in vars(model.inner.norm)


def test_a_plan_says_whether_it_goes_by_tiles_at_any_length():
    norm = install_on(nn.LayerNorm(WIDTH))
    plan = make_plan(llama_profile(2), make_settings())
    for always in (True, False, True):
        run_as_planned(norm, replace(plan, norm_by_tiles=always))
        assert norm.forward.always == always
    remove_norm(norm)
    run_as_planned(norm, plan)  # nothing to tell


def test_a_norm_that_cannot_run_by_tiles_is_not_planned_so():
    model = Outer().to(torch.bfloat16)
    blocks = [
        BlockProfile(name=name, kind="Sequential", stack=0, tokens=64, token_dim=1, input_leaf=0)
        for name in ("inner.layers.0", "inner.layers.1")
    ]

    def planned():
        return end_of(model, blocks, 1, 64 * 2 * WIDTH, tiled_loss=False)["long_end"] is not None

    assert planned()
    install_on(model.inner.norm)
    assert planned()
    remove_norm(model.inner.norm)
    model.inner.norm.forward = lambda x: x
    assert not planned()


def install_on(norm):
    assert install_norm(norm)
    return norm


def test_which_norm_is_the_last():
    names = ["inner.layers.0", "inner.layers.1"]
    model = Outer()
    assert final_norm(model, names) is model.inner.norm
    model.inner.second = nn.LayerNorm(WIDTH)
    assert final_norm(model, names) is None
    del model.inner.second, model.inner.norm
    assert final_norm(model, names) is None


def test_a_forward_of_its_own_stays():
    norm = nn.LayerNorm(WIDTH)
    norm.forward = lambda x: x
    assert not install_norm(norm)
    remove_norm(norm)
    assert "forward" in vars(norm)


def test_what_cannot_be_captured_runs_as_it_is(caplog):
    class OddNorm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x - x.mean(1, keepdim=True))

    norm = OddNorm(WIDTH)
    expected = norm(torch.ones(1, 8, WIDTH))
    install_norm(norm)
    norm.forward.always = True
    assert torch.equal(norm(torch.ones(1, 8, WIDTH, requires_grad=True)), expected)
    assert "runs as it is" in caplog.text


def test_the_plan_knows_from_which_length_on():
    model = Outer().to(torch.bfloat16)
    model.head = nn.Linear(WIDTH, 100, bias=False, dtype=torch.bfloat16)

    def bytes_of(hidden_bytes):
        tokens = hidden_bytes // (2 * WIDTH)
        blocks = [
            BlockProfile(name=name, kind="Sequential", stack=0, tokens=tokens, token_dim=1, input_leaf=0)
            for name in ("inner.layers.0", "inner.layers.1")
        ]
        profile = llama_profile(1, **end_of(model, blocks, 1, hidden_bytes, tiled_loss=True))
        constants = [profile.long_end.outside_peak.constant if tokens >= from_tokens else 0, profile.loss_peak.constant]
        return [(one - constant) / hidden_bytes for one, constant in zip(profile.end(tokens), constants, strict=True)]

    from_tokens = LONG_BYTES // (2 * WIDTH)
    assert bytes_of(LONG_BYTES - 2 * WIDTH) == pytest.approx([12, 5])
    assert bytes_of(LONG_BYTES) == pytest.approx([4, 3])
