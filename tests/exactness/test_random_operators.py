"""Random numbers in a block: a rerun has those of its forward, whichever operator drew them, from the first step on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Binomial, Dirichlet
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.blocks.operators import pin_kind
from memo_runtime.records import Executor, PinKind
from tests.exactness import hand_written as blocks
from tests.exactness.compare import (
    MAIN_WAYS,
    SWAP,
    Way,
    assert_clean,
    assert_gradients,
    output_loss,
    run_step,
)

DRAWS = {
    "multinomial": lambda y: y * torch.multinomial(y.detach().softmax(-1).flatten(0, 1), 1).view(*y.shape[:2], 1),
    "randperm": lambda y: y[:, torch.randperm(y.shape[1])],
    "randint": lambda y: y * torch.randint(0, 5, y.shape),
    "poisson": lambda y: y * torch.poisson(y.detach().abs()),
    "binomial": lambda y: y * Binomial(torch.tensor(5.0).double(), y.detach().sigmoid()).sample(),
    "dirichlet": lambda y: y + Dirichlet(y.abs() + 1).rsample(),
    "into a tensor": lambda y: y + torch.rand(y.shape, dtype=y.dtype, out=torch.empty_like(y)),
    "into an empty tensor": lambda y: y * torch.randn(y.shape, dtype=y.dtype, out=torch.empty(0, dtype=y.dtype)),
    "normal into a tensor": lambda y: y * torch.normal(y.detach(), y.detach().abs(), out=torch.empty_like(y)),
}


class Drawing(blocks.Attention):
    """``draw`` of what attention gives."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(x, DRAWS[self.name](self.mix(x)))


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_steps_are_those_of_the_unwrapped_model(name: str, way: Way) -> None:
    torch.manual_seed(0)
    model, batch = blocks.Stack(Drawing(name), Drawing(name)).double(), {"x": blocks.sequence()}
    want = run_step(model, batch, output_loss)
    way.wrap(model)
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, way)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.REPLAY}
    assert all((block.recomputed_flops > 0) == (way is not SWAP) for block in report.blocks)
    assert_clean(model)


@pytest.mark.parametrize("way", MAIN_WAYS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_noise_that_is_saved_before_it_is_drawn(inplace: bool, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """RReLU: a rerun would hand over memory that nothing has been written to yet, so there is none."""
    monkeypatch.setitem(DRAWS, "rrelu", lambda y: functional.rrelu(y * 1, training=True, inplace=inplace))
    torch.manual_seed(0)
    model, batch = blocks.Stack(Drawing("rrelu"), Drawing("rrelu")).double(), {"x": blocks.sequence()}
    want = run_step(model, batch, output_loss)
    way.wrap(model)
    for _ in range(2):
        assert_gradients(run_step(model, batch, output_loss).gradients, want.gradients, SWAP)
    report = memo.report(model)
    assert all(block.bytes_to_host and not block.recomputed_flops for block in report.blocks)
    assert all(("rrelu_with_noise" in block.reason) == (way is not SWAP) for block in report.blocks)


def test_what_draws_is_told_by_its_tag() -> None:
    """No list of names to keep up with PyTorch; attention stays a mixer, its backward is neither."""
    names = ["aten.rrelu_with_noise.default", "aten.uniform_.default", "aten.rand.out", "aten._standard_gamma.default"]
    assert {pin_kind(name) for name in names} == {PinKind.RANDOM}
    assert pin_kind("aten._scaled_dot_product_flash_attention.default") == PinKind.MIXER
    assert pin_kind("aten._scaled_dot_product_efficient_attention_backward.default") is None
    assert pin_kind("aten.mul.Tensor") is None
    assert pin_kind("cond") is None
