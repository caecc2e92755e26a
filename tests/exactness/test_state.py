"""Python state of every kind: what a block writes, and what others change between its forward and its backward."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import ReplayMismatchError, StateChangedError
from tests.exactness.compare import Way, assert_gradients, take_gradients

WIDTH = 16
#: A swap of everything runs nothing again, so that little of the state matters.
WAYS = [pytest.param("swap", None, marks=pytest.mark.slow), ("recompute", None), ("memo", 0.37)]
RERUNS = WAYS[1:]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.dropout, self.scale = nn.Dropout(0.2), 1.0
        self.options: dict[str, Any] = {"shift": 0.25, "layers": [1.0, 2.0]}

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x) * self.scale + self.options["shift"]) * self.options["layers"][1]
        return x + self.down(self.dropout(hidden))


class Tower(nn.Module):
    def __init__(self, kind: type[nn.Module], blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(blocks))

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, *given)
        return x.square().mean()


def tower(kind: type[nn.Module] = Mlp) -> Tower:
    torch.manual_seed(0)
    return Tower(kind).double()


def sequence(tokens: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(kind: type[nn.Module], policy: str, alpha: float | None) -> tuple[Tower, Tower]:
    plain = tower(kind)
    return plain, memo.wrap(copy.deepcopy(plain), policy=policy, alpha=alpha, keep_last=0)


def seeded() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert_gradients(got, want, Way("recompute"))


def rebuilt(model: nn.Module) -> bool:
    """Every block was run again."""
    return all(block.recomputed_flops > 0 for block in memo.report(model).blocks)


def draws() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what a block writes itself


class Notes:
    """What a caller carries along."""

    def __init__(self) -> None:
        self.h: Tensor | None = None
        self.seen: list[Tensor] = []
        self.count = 0


class OnObject(nn.Module):
    """Writes on the object that it is given, and reads what the block before it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, notes: Notes) -> Tensor:
        if notes.h is not None:
            x = x + 0.5 * notes.h
        y = x + functional.gelu(self.linear(x) * (1 + 0.1 * notes.count))
        notes.h = y
        notes.count += 1
        notes.seen.append(y.mean())
        return y


class Slotted:
    __slots__ = ("last",)


class OnItself(nn.Module):
    """Counts its calls and keeps what it made, in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls, self.history, self.recent = 0, [], deque(maxlen=2)
        self.names: set[int] = set()
        self.table: dict[str, Any] = {"inner": {"count": 0}}
        self.counts, self.box = np.zeros(3), Slotted()
        self.memory = torch.zeros(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0.1 * (self.calls + len(self.history) + len(self.names) + self.counts[1])
        y = x + functional.gelu(self.linear(x + self.memory) * scale) * (1 + self.table["inner"]["count"])
        if hasattr(self.box, "last"):
            y = y + 0.1 * self.box.last
        self.calls += 1
        self.history.append(y.detach().mean())
        self.recent.append(self.calls)
        self.names.add(self.calls)
        self.table["inner"]["count"] += 1
        self.table[f"call {self.calls}"] = y
        self.counts[1] += 1
        self.box.last = y.mean()
        return y


class WritesTensor(nn.Module):
    """Adds to a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.memory = nn.Linear(WIDTH, WIDTH), torch.zeros(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = x + functional.gelu(self.linear(x + self.memory.clone()))
        self.memory.add_(y.detach().mean((0, 1)))
        return y


class Draws(nn.Module):
    """Draws from Python's, NumPy's and its own generators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.python, self.numpy, self.torch = random.Random(1), np.random.default_rng(1), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        factor = random.random() + float(np.random.rand()) + self.python.random() + float(self.numpy.random())
        factor += float(torch.rand(1, generator=self.torch))
        return x + functional.gelu(self.linear(x) * factor)

    def __deepcopy__(self, memo_: dict[int, Any]) -> Draws:
        made = Draws().double()
        made.load_state_dict(self.state_dict())
        return made


def state_of(model: Tower) -> list[Any]:
    """Everything that OnItself keeps, as numbers."""
    found: list[Any] = []
    for layer in model.layers:
        found += [layer.calls, [float(v) for v in layer.history], list(layer.recent), sorted(layer.names)]
        found += [layer.table["inner"]["count"], sorted(layer.table), layer.counts.tolist()]
        found += [float(layer.box.last.detach())]
    return found


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_a_block_that_writes_on_an_object_that_it_is_given(policy, alpha):
    for model in (models := pair(OnObject, policy, alpha)):
        for step in range(3):
            notes = Notes()
            model.zero_grad(set_to_none=True)
            loss = model(sequence(seed=step), notes)
            last = notes.h
            (loss + sum(notes.seen) + notes.h.mean()).backward()
            # A rerun leaves no trace on it either.
            assert notes.h is last
            assert (notes.count, len(notes.seen)) == (3, 3)
        assert model is models[0] or rebuilt(model) == (policy != "swap")
    assert_close(gradients(models[1]), gradients(models[0]))


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_a_block_that_keeps_state_of_every_kind(policy, alpha):
    for model in (models := pair(OnItself, policy, alpha)):
        for step in range(3):
            model.zero_grad(set_to_none=True)
            for layer in model.layers:
                layer.box = Slotted()
                layer.table = {"inner": {"count": step}}
            loss = model(sequence(seed=step))
            tables = [dict(layer.table) for layer in model.layers]
            loss.backward()
            for layer, table in zip(model.layers, tables, strict=True):
                assert layer.table.keys() == table.keys()
                assert all(layer.table[key] is value for key, value in table.items())
        assert model is models[0] or rebuilt(model) == (policy != "swap")
    assert state_of(models[1]) == state_of(models[0])
    assert_close(gradients(models[1]), gradients(models[0]))


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_a_block_that_adds_to_a_tensor_of_its_own(policy, alpha):
    for model in (models := pair(WritesTensor, policy, alpha)):
        for step in range(3):
            model.zero_grad(set_to_none=True)
            model(sequence(seed=step)).backward()
    for a, b in zip(*(model.layers for model in models), strict=True):
        assert torch.equal(a.memory, b.memory)
    assert_close(gradients(models[1]), gradients(models[0]))


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_generators_of_every_library_go_on_as_without_memo(policy, alpha):
    ends = []
    for model in (models := pair(Draws, policy, alpha)):
        seeded()
        for step in range(3):
            model.zero_grad(set_to_none=True)
            model(sequence(seed=step)).backward()
        ends.append((draws(), [layer.python.getstate() for layer in model.layers],
                     [layer.numpy.bit_generator.state for layer in model.layers]))  # fmt: skip
    assert ends[0] == ends[1]
    assert rebuilt(models[1]) == (policy != "swap")
    assert_close(gradients(models[1]), gradients(models[0]))


# ---- what others change between forward and backward


def _attribute(model: Tower) -> None:
    for layer in model.layers:
        layer.scale = 2.0


def _cleared(model: Tower) -> None:
    for layer in model.layers:
        layer.options = None
        del layer.scale


def _container(model: Tower) -> None:
    for layer in model.layers:
        layer.options["layers"][1] = 5.0
        layer.options["shift"] = 3.0


def _evaluation(model: Tower) -> None:
    model.eval()


def _frozen(model: Tower) -> None:
    for layer in model.layers:
        layer.down.weight.requires_grad_(False)


def _replaced(model: Tower) -> None:
    for layer in model.layers:
        layer.up.bias = nn.Parameter(torch.ones_like(layer.up.bias))
        layer.dropout = nn.Dropout(0.9)


CHANGES = [_attribute, _cleared, _container, _evaluation, _frozen, _replaced]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_changes_between_forward_and_backward_do_not_matter(change: Callable[[Tower], None], policy, alpha):
    found = []
    for model in pair(Mlp, policy, alpha):
        weights = dict(model.named_parameters())
        seeded()
        loss = model(sequence())
        change(model)
        now = [dict(vars(module)) for module in model.modules()]
        loss.backward()
        for module, before in zip(model.modules(), now, strict=True):
            assert all(vars(module)[key] is value for key, value in before.items() if key != "forward")
        found.append({name: p.grad for name, p in weights.items() if p.grad is not None})
    assert rebuilt(model) == (policy != "swap")
    assert_close(found[1], found[0])


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_weights_of_functional_call_are_those_of_the_forward(policy, alpha):
    found = []
    for model in pair(Mlp, policy, alpha):
        weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}
        fast = {name: p * 0.9 for name, p in weights.items()}
        seeded()
        torch.func.functional_call(model, fast, (sequence(),)).backward()
        found.append({name: p.grad for name, p in weights.items()})
        assert not gradients(model)
    assert_close(found[1], found[0])


@pytest.mark.parametrize(("policy", "alpha"), RERUNS)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_parameter_that_was_written_to_is_an_error_that_names_it(policy, alpha, which):
    _, model = pair(Mlp, policy, alpha)
    for _ in range(2):
        loss = model(sequence())
        with torch.no_grad():
            getattr(model.layers[2].up, which).mul_(1.5)
        with pytest.raises(StateChangedError, match=rf"layers\.2\.up\.{which}.*inplace operation"):
            loss.backward()


def test_a_parameter_that_was_written_to_is_an_error_by_tiles_too():
    """Of a bias autograd alone would read nothing."""
    _, model = pair(Mlp, "tiled", None)
    for _ in range(2):
        loss = model(sequence())
        with torch.no_grad():
            model.layers[2].up.bias.mul_(1.5)
        with pytest.raises(StateChangedError, match=r"layers\.2'.* shape \[32\].*inplace operation.*policy='swap'"):
            loss.backward()
    assert {block.executor for block in memo.report(model).blocks} == {"tiled"}


@pytest.mark.parametrize(("policy", "alpha"), RERUNS)
def test_elements_that_were_exchanged_are_an_error_that_names_them(policy, alpha):
    _, model = pair(Mlp, policy, alpha)
    for _ in range(2):
        loss = model(sequence())
        model.layers[2].up.bias.data = torch.ones(32, dtype=torch.float64)
        with pytest.raises(StateChangedError, match=r"layers\.2\.up\.bias.*\.data"):
            loss.backward()


class ReadsGlobal(nn.Module):
    """Depends on something that is no state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.linear(x) * GLOBAL["scale"])


GLOBAL = {"scale": 1.0}


@pytest.mark.parametrize(("policy", "alpha"), RERUNS)
def test_whatever_a_rerun_raises_names_its_block_and_has_its_cause(policy, alpha, monkeypatch):
    _, model = pair(ReadsGlobal, policy, alpha)
    loss = model(sequence())
    monkeypatch.setitem(globals(), "GLOBAL", {})
    with pytest.raises(ReplayMismatchError, match=r"'layers\.2'.*KeyError") as caught:
        loss.backward()
    assert isinstance(caught.value.__cause__, KeyError)


LOSSES: list[Tensor] = []
GENERATOR = random.Random(0)


class LeavesOutside(Mlp):
    """Collects in a global list, counts in its class, and draws from a generator of the process."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        LOSSES.append(x.square().mean())
        return super().forward(x) * (1.0 + GENERATOR.random())


def collected_step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    LOSSES.clear()
    GENERATOR.seed(3)
    seeded()
    LeavesOutside.calls = 0
    loss = model(sequence()) + sum(LOSSES)
    calls = LeavesOutside.calls
    loss.backward()
    return loss.detach(), take_gradients(model), calls


def test_a_first_step_leaves_nothing_outside_of_blocks():
    """Runs of the profile are no calls: what a forward leaves in globals is that of the step alone."""
    plain, wrapped = pair(LeavesOutside, "swap", None)
    want = collected_step(plain)
    for _ in range(2):
        got = collected_step(wrapped)
        assert torch.equal(got[0], want[0])
        assert_close(got[1], want[1])
        assert got[2] == want[2]
    LOSSES.clear()
