"""The step that profiles is the step of the unwrapped model: what its forward and its hooks do counts once.

The pass of the profile runs the model's own code up to its last block, with results that are made up. So does the pass
of the first batch with another number of sequences.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from tests.exactness.compare import MEMO, SWAP, Way, assert_gradients, take_gradients
from tests.exactness.hand_written import WIDTH, sequence

WAYS = (SWAP, MEMO, Way("tiled"))


class State:
    def __init__(self) -> None:
        self.steps = 0
        self.log: list[int] = []


STATE, COUNT, LOG, TABLE = State(), {"steps": 0}, deque[int](maxlen=5), np.zeros(3)
FELT: list[Tensor] = []
MEAN = torch.zeros(WIDTH, dtype=torch.float64)


class Mlp(nn.Module):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def scale(self) -> float:
        return 1.0 + 0.1 * (STATE.steps + COUNT["steps"] + Mlp.steps + float(TABLE.sum()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.up(x))) * self.scale()


class Model(nn.Module):
    """``does`` comes before the blocks, where the profile goes too."""

    def __init__(self, does: Callable[[Model], float] | None = None) -> None:
        super().__init__()
        self.state, self.does = STATE, does
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * (self.does(self) if self.does is not None else 1.0)
        for layer in self.layers:
            x = layer(x)
        return x


def draws(_: Model) -> float:
    """As SpecAugment by NumPy, and layer drop by Python, do."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


def counts_on_an_object(model: Model) -> float:
    """Which is an attribute of the model, and a global that blocks read."""
    model.state.steps += 1
    model.state.log.append(model.state.steps)
    return 1.0


def counts_elsewhere(_: Model) -> float:
    """Where blocks read."""
    COUNT["steps"] += 1
    Mlp.steps += 1
    TABLE[0] += 1
    return 1.0


def counts_for_itself(_: Model) -> float:
    """Where no block reads."""
    LOG.append(len(LOG))
    MEAN.add_(1.0)
    return 1.0 + len(LOG)


def from_here() -> None:
    """The same start for either model."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    STATE.steps, COUNT["steps"], Mlp.steps = 0, 0, 0
    for collected in (STATE.log, LOG, FELT):
        collected.clear()
    TABLE[:] = 0
    MEAN.zero_()


def told() -> list[Any]:
    """What the code of a model and its blocks has left."""
    numbers = random.random(), float(np.random.rand()), float(torch.rand(()))
    counts = STATE.steps, COUNT["steps"], Mlp.steps, [*STATE.log], [*LOG], TABLE.tolist(), MEAN.tolist()
    return [*numbers, *counts, len(FELT)]


def steps(model: nn.Module, felt: Callable[[], list[Any]] = list) -> list[Any]:
    """Three steps, the last of them with another number of sequences: (loss, gradients, what was left).

    ``felt``: lists of tensors that belong into the loss, cleared after each step.
    """
    found = []
    from_here()
    for rows in (2, 2, 3):
        output = model(sequence(rows=rows))
        made_now = [one for each in felt() for one in each]
        loss = sum((one.square().mean() for one in made_now), start=output.mean())
        loss.backward()
        found.append((loss.detach(), take_gradients(model), [len(made_now), *told()]))
        for each in felt():
            each.clear()
    return found


def assert_same_steps(got: list[Any], want: list[Any], way: Way) -> None:
    for (loss, gradients, left), (other, others, told_there) in zip(got, want, strict=True):
        assert torch.allclose(loss, other, rtol=1e-12, atol=0.0)
        assert_gradients(gradients, others, way)
        assert left == told_there


def made(does: Callable[[Model], float] | None = None) -> Model:
    torch.manual_seed(0)
    return Model(does).double()


@pytest.mark.parametrize("does", [draws, counts_on_an_object, counts_elsewhere, counts_for_itself])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_the_models_own_code_does(does: Callable[[Model], float], way: Way) -> None:
    model = made(does)
    want = steps(model)
    way.wrap(model)
    assert_same_steps(steps(model), want, way)


def test_a_profile_and_a_check_of_a_model_that_draws() -> None:
    model, batch = made(draws), (sequence(),)
    from_here()
    want = told()
    from_here()
    memo.profile(model, batch)
    assert told() == want
    for policy in ("swap", "recompute"):
        assert memo.check(model, batch, policy=policy).ok


# ---- hooks of modules


class Collector:
    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.calls = 0

    def see(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.calls += 1
        self.found.append(output * self.calls)

    __call__ = see


def in_a_global(model: Model) -> Callable[[], list[Any]]:
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: FELT.append(out))
    return lambda: [FELT]


def in_a_closure(model: Model) -> Callable[[], list[Any]]:
    found: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: found.append(out))
    return lambda: [found]


def in_a_long_list(model: Model) -> Callable[[], list[Any]]:
    """As one that logs in every step has."""
    found, log = list[Tensor](), [torch.zeros((), dtype=torch.float64) for _ in range(1000)]

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        log.append(output.detach().mean())
        found.append(output * len(log))

    for layer in model.layers:
        layer.register_forward_hook(see)
    return lambda: [found]


def by_name(model: Model) -> Callable[[], list[Any]]:
    found: dict[str, list[Tensor]] = {}
    for name, layer in model.layers.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: found.setdefault(name, []).append(out))
    return lambda: [*found.values()]


def by_a_default(model: Model) -> Callable[[], list[Any]]:
    found: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out, found=found: found.append(out))
    return lambda: [found]


def by_a_method(model: Model) -> Callable[[], list[Any]]:
    collector = Collector()
    for layer in model.layers:
        layer.register_forward_hook(collector.see)
    return lambda: [collector.found]


def by_an_object(model: Model) -> Callable[[], list[Any]]:
    collector = Collector()
    for layer in model.layers:
        layer.register_forward_hook(collector)
    return lambda: [collector.found]


def by_a_partial(model: Model) -> Callable[[], list[Any]]:
    found: list[Tensor] = []

    def see(kept: list[Tensor], _: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    for layer in model.layers:
        layer.register_forward_hook(partial(see, found))
    return lambda: [found]


def before(model: Model) -> Callable[[], list[Any]]:
    found: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    return lambda: [found]


def around(model: Model) -> Callable[[], list[Any]]:
    """Of a module in front of the blocks, and of one inside, whose block is run again and again."""
    found: list[Tensor] = []
    model.embed.register_forward_hook(lambda _, __, out: found.append(out))
    model.layers[1].up.register_forward_hook(lambda _, __, out: found.append(out.detach()[0, 0]))
    return lambda: [found]


def that_count(model: Model) -> Callable[[], list[Any]]:
    calls, mean = 0, torch.zeros(WIDTH, dtype=torch.float64)

    def see(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1
        mean.mul_(0.9).add_(output.detach().mean((0, 1)), alpha=0.1)

    for layer in model.layers:
        layer.register_forward_hook(see)
    return lambda: [[calls * mean.clone()]]


def that_change_results(model: Model) -> Callable[[], list[Any]]:
    """These run in the profile too."""
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
        layer.register_forward_hook(lambda _, __, out: out * 1.5)
    return list


HOOKS = (
    in_a_global, in_a_closure, in_a_long_list, by_name, by_a_default, by_a_method, by_an_object, by_a_partial, before,
    around, that_count, that_change_results,
)  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_hooks_collect_what_the_step_has_made(register: Callable[[Model], Callable[[], list[Any]]], way: Way) -> None:
    found = []
    for wrapped in (False, True):
        model = made()
        felt = register(model)
        if wrapped:
            way.wrap(model)
        found.append(steps(model, felt))
    assert_same_steps(found[1], found[0], way)


class Merges(nn.Module):
    """Equal to the others but for what it yields: every so many-th token."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.mlp, self.every = Mlp(), every

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[:, :: self.every]


class Scales(nn.Module):
    """A block of images, whose width and size may change."""

    def __init__(self, before: int, behind: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, behind, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x))


class Reads(nn.Module):
    """Adds what fits the results of its blocks only."""

    def __init__(self, blocks: list[nn.Module], like: tuple[int, ...]) -> None:
        super().__init__()
        self.layers, self.at = nn.ModuleList(blocks), nn.Parameter(torch.randn(like))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return (x + self.at).square().mean()


@pytest.mark.parametrize("way", [SWAP, MEMO], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_a_block_that_yields_less_than_those_like_it_is_run(images: bool, frozen: bool, way: Way) -> None:
    torch.manual_seed(0)
    if images:
        made = [Scales(8, 8, 1), Scales(8, 8, 1), Scales(8, 16, 2), Scales(16, 16, 1)]
        model, x = Reads(made, (16, 8, 8)).double(), torch.randn(2, 8, 16, 16, dtype=torch.float64)
    else:
        made = [Merges(1), Merges(1), Merges(2), Merges(1)]
        model, x = Reads(made, (20, WIDTH)).double(), torch.randn(2, 40, WIDTH, dtype=torch.float64)
    model.layers.requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    way.wrap(model)
    for one in (model, plain):
        one(x).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, theirs.grad, rtol=1e-12, atol=0)
    report = memo.report(model)
    assert not any("could not be profiled" in note or "was given" in note for note in report.notes)
    assert len(report.blocks) == 4


class Counts(Mlp):
    """Raises behind its own count, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.register_buffer("count", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.fails:
            raise ValueError("by the user's own code")
        return super().forward(x) * (1 + 0.1 * self.count)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_first_step_that_raises_leaves_nothing(way):
    model = Model()
    model.layers = nn.ModuleList(Counts() for _ in range(3))
    model = model.double()
    plain = copy.deepcopy(model)
    way.wrap(model)
    model.layers[1].fails = True
    with pytest.raises(ValueError, match="by the user's own code"):
        model(sequence())
    assert all(layer.count.sum() == 0 for layer in model.layers)
    model.layers[1].fails = False
    model(sequence()).square().mean().backward()
    plain(sequence()).square().mean().backward()
    assert_gradients(take_gradients(model), take_gradients(plain), Way("recompute"))
    assert all(layer.count[0] == 1 for layer in model.layers)
