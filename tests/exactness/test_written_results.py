"""Blocks that write to what a token mixer gave, or to what they add it to: a rerun goes on from what the mixer gave."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.blocks.pins import CaptureMode, ReplayMode
from memo_runtime.records import Executor, PinKind
from tests.exactness.compare import Step, Way, assert_same, output_loss, plan_of, run_step

WIDTH = 16
EAGER, CUMSUM = "attention written out", "cumsum"
WAYS = (Way("recompute"), Way("memo", 0.0), Way("memo", 0.5), Way("memo", 1.0), Way("replay", 0.0), Way("tiled", 0.0))

#: What a block does with (result of the mixer, its input, a projection).
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def residual(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    y += x
    return y


def gate(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return y.mul_(torch.sigmoid(q.detach()))


def into_clone(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    z = x.clone()
    z += y
    return z


def into_product(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return (x * 1.0).add_(y)


def into_some_features(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    z = x.clone()
    z[..., :8] += y[..., :8]
    return z


def through_a_view(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    y.view(*y.shape[:2], 4, 4).add_(1.5)
    return y


def under_no_grad(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    with torch.no_grad():
        torch.add(y, 1.0, out=y.detach())
    return y * 1.0


def noise(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return y.add_(torch.rand_like(y))


def first_token(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y


def first_token_more(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    y[:, :1] += 1.0
    return y


def dropped(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return functional.dropout(y, 0.3, training=True, inplace=True)


def running(y: Tensor, x: Tensor, q: Tensor) -> Tensor:
    return y.cumsum_(1) + x


#: Those that take a slice, and those that are run again as a whole.
SLICED = (
    residual, gate, into_clone, into_product, into_some_features, through_a_view, under_no_grad, noise, first_token,
    first_token_more, dropped,
)  # fmt: skip
WHOLE = (running,)


class Block(nn.Module):
    def __init__(self, mixer: str, write: Write) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mixer, self.write = mixer, write

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q = self.q(h)
        y = (q @ h.mT).softmax(-1) @ h if self.mixer == EAGER else q.cumsum(1)
        z = self.write(y, x, q)
        return z + torch.tanh(self.last(self.norms[1](z)))


class Model(nn.Module):
    def __init__(self, mixer: str, write: Write) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(mixer, write) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def make(mixer: str, write: Write) -> nn.Module:
    torch.manual_seed(0)
    return Model(mixer, write).double()


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def wrapped(way: Way, mixer: str, write: Write) -> nn.Module:
    """Its step is compared, twice."""
    want = run_step(make(mixer, write), batch(), output_loss)
    model = make(mixer, write)
    more = {} if way.policy == "tiled" else {"keep_last": 0}
    memo.wrap(model, policy=way.policy, alpha=way.alpha, **more)
    for _ in range(2):
        got: Step = run_step(model, batch(), output_loss)
        # Tiles may sum in another order in the forward too.
        assert_same(got if way.policy != "tiled" else Step(want.loss, got.gradients), want, way)
    return model


@pytest.mark.parametrize("write", SLICED)
@pytest.mark.parametrize("mixer", [EAGER, CUMSUM])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_rerun_goes_on_from_what_the_mixer_gave(way: Way, mixer: str, write: Write) -> None:
    if way.policy == "tiled" and write is dropped:
        return  # tiles draw masks of their own
    model = wrapped(way, mixer, write)
    for block in memo.report(model).blocks:
        if way.policy != "tiled":
            assert block.reason == ""
            assert block.executor is Executor.REPLAY


@pytest.mark.parametrize("write", WHOLE)
@pytest.mark.parametrize("mixer", [EAGER, CUMSUM])
@pytest.mark.parametrize("way", WAYS[:-1], ids=str)
def test_what_takes_no_slice_is_run_again_as_a_whole(way: Way, mixer: str, write: Write) -> None:
    model = wrapped(way, mixer, write)
    assert all(block.reason for block in plan_of(model).profile.blocks)


def test_what_a_mixer_is_added_to_is_no_mixer() -> None:
    for write in (into_clone, into_product):
        profile = memo.profile(make(EAGER, write), batch())
        for block in profile.blocks:
            mixers = {pin.op for pin in block.pins if pin.kind == PinKind.MIXER}
            assert mixers == {"aten.bmm.default"}


def test_a_result_that_is_written_to_is_no_saved_tensor() -> None:
    profile = memo.profile(make(EAGER, residual), batch())
    last = [max(block.pins, key=lambda pin: pin.call) for block in profile.blocks]
    assert [pin.saved for pin in last] == [None, None]
    # Where nothing is written to it, it is.
    profile = memo.profile(make(EAGER, lambda y, x, q: y), batch())
    last = [max(block.pins, key=lambda pin: pin.call) for block in profile.blocks]
    assert None not in [pin.saved for pin in last]


def test_what_was_captured_is_copied_before_it_is_written_to() -> None:
    x = torch.randn(3, 5)
    key = ("aten.cumsum.default", 0)
    with CaptureMode(lambda found: (0,) if found == key else ()) as capture:
        y = x.cumsum(0)
        torch._foreach_add_([y.view(5, 3)], 1.0)
    assert torch.equal(capture.captured[key][0], x.cumsum(0))
    assert capture.written == {key}
    with ReplayMode(capture.captured, written=capture.written):
        again = x.cumsum(0)
        again += 1.0
    assert torch.equal(again, y)
    assert torch.equal(capture.captured[key][0], x.cumsum(0))


def test_a_rerun_does_not_write_to_what_backward_needs() -> None:
    value = torch.randn(3, 5)
    before = value.clone()
    with (
        pytest.raises(RuntimeError, match=r"aten\.add_\.Tensor writes to what aten\.cumsum\.default gave"),
        ReplayMode({("aten.cumsum.default", 0): {0: value}}, written=()),
    ):
        torch.zeros(3, 5).cumsum(0).view(15).add_(1.0)
    assert torch.equal(value, before)


class Routed(Block):
    """Experts by data, so that no slice is tried, behind a mixer with a name that is written to."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        y = self.q(h).cumsum(1)
        y += x
        chosen = (h.sum(-1) > 0).nonzero(as_tuple=True)
        y = y.index_put(chosen, torch.tanh(self.last(self.norms[1](y[chosen]))), accumulate=True)
        return y + x


@pytest.mark.parametrize("way", WAYS[:-1], ids=str)
def test_blocks_whose_saves_depend_on_data(way: Way) -> None:
    def routed() -> nn.Module:
        model = make(CUMSUM, residual)
        torch.manual_seed(0)
        model.layers = nn.ModuleList(Routed(CUMSUM, residual) for _ in range(2)).double()
        return model

    want = run_step(routed(), batch(), output_loss)
    model = routed()
    memo.wrap(model, policy=way.policy, alpha=way.alpha, keep_last=0)
    for _ in range(2):
        assert_same(run_step(model, batch(), output_loss), want, way)
    assert all(block.dynamic for block in plan_of(model).profile.blocks)
