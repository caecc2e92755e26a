"""Several wrapped models in one process: side by side, one behind the other, and inside a model that is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import AlreadyWrappedError, ArgumentError, HostLimitError, NotWrappedError
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import Gradients, acted, assert_close, assert_nothing_held
from tests.api.towers import POLICIES, Tower, signal, tower

every_policy = pytest.mark.parametrize("policy", MAIN_POLICIES)
Loss = Callable[[], Tensor]


def other(blocks: int = 2) -> Tower:
    """A tower with other weights."""
    torch.manual_seed(1)
    return Tower(blocks).double()


def gradients(*models: nn.Module) -> Gradients:
    """Taken away from all ``models``."""
    found = {}
    for number, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{number}.{name}"] = parameter.grad
                parameter.grad = None
    return found


def after(loss: Tensor, *models: nn.Module) -> Gradients:
    loss.backward()
    return gradients(*models)


class Game:
    """A generator and what tells its work from the real; each has its own optimizer, as both are trained in turns."""

    def __init__(self, *, policy: str | None) -> None:
        self.makes, self.tells = tower(), other()
        if policy is not None:
            memo.wrap(self.makes, **POLICIES[policy])
            memo.wrap(self.tells, **POLICIES[policy])
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (self.makes, self.tells)]

    def play(self, seed: int) -> list[Gradients]:
        """Both turns."""
        noise, real = signal(seed=seed), signal(seed=seed + 100)
        found = []
        made = self.makes(noise)
        self.tells(real).mean().add(-self.tells(made.detach()).square().mean()).backward()
        found.append(self._turn(1))
        self.tells(made).square().mean().backward()
        gradients(self.tells)
        found.append(self._turn(0))
        return found

    def _turn(self, number: int) -> Gradients:
        model = (self.makes, self.tells)[number]
        taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.optimizers[number].step()
        self.optimizers[number].zero_grad()
        return taken


@every_policy
def test_two_models_that_train_against_each_other(policy: str) -> None:
    plain, wrapped = Game(policy=None), Game(policy=policy)
    for seed in range(3):
        for got, want in zip(wrapped.play(seed), plain.play(seed), strict=True):
            # What differs in the last bits differs more after some steps.
            assert_close(got, want, 1e-11)
    for model in (wrapped.makes, wrapped.tells):
        assert memo.report(model).totals.bytes_to_host > 0
        assert_nothing_held(model)


@every_policy
@pytest.mark.parametrize("teacher_learns", [False, True])
def test_a_student_beside_its_teacher(policy: str, teacher_learns: bool) -> None:
    found = []
    for wrap in (False, True):
        teacher, student = tower(), other()
        for model in (teacher, student) if wrap else ():
            memo.wrap(model, **POLICIES[policy])
        for seed in range(2):
            with torch.set_grad_enabled(teacher_learns):
                target = teacher(signal(seed=seed))
            loss = functional.mse_loss(student(signal(seed=seed)), target)
            found.append(after(loss, teacher, student))
        if wrap:
            acted(student)
            assert_nothing_held(student)
            assert_nothing_held(teacher)
            assert (memo.report(teacher).totals.steps > 0) == teacher_learns
    for got, want in zip(found[2:], found[:2], strict=True):
        assert_close(got, want)


@every_policy
def test_a_policy_beside_its_reference(policy: str) -> None:
    """Preference training: the reference is a copy, made before or after wrap, and only evaluated."""

    def loss(policy_model: nn.Module, reference: nn.Module) -> Tensor:
        chosen, rejected = signal(rows=1, seed=3), signal(rows=1, tokens=31, seed=4)
        with torch.no_grad():
            before = reference(chosen).mean() - reference(rejected).mean()
        now = policy_model(chosen).mean() - policy_model(rejected).mean()
        return -functional.logsigmoid(3 * (now - before))

    plain, reference = tower(), other(3)
    want = after(loss(plain, reference), plain)
    wrapped = memo.wrap(tower(), **POLICIES[policy])
    reference = memo.wrap(other(3), **POLICIES[policy])
    for judge in (reference, copy.deepcopy(reference)):
        assert_close(after(loss(wrapped, judge), wrapped), want)
    assert_nothing_held(wrapped)
    assert memo.report(reference).totals.steps == 0


class Pair(nn.Module):
    """Two towers and layers of its own around them."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = tower(), other()
        torch.manual_seed(2)
        self.before = nn.Linear(8, 8).double()
        self.behind = nn.Linear(16, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        both = torch.cat([self.image(x), self.text(x.flip(1))], dim=-1)
        return self.behind(both.tanh())


@every_policy
def test_wrapped_models_inside_one_that_is_trained(policy: str) -> None:
    plain, model = Pair(), Pair()
    memo.wrap(model.image, **POLICIES[policy])
    memo.wrap(model.text, **POLICIES[policy])
    for seed in range(2):
        got, want = (after(each(signal(seed=seed)).square().mean(), each) for each in (model, plain))
        assert_close(got, want)
    for inside in (model.image, model.text):
        acted(inside)
        assert_nothing_held(inside)


@every_policy
def test_one_wrapped_model_inside_one_that_is_trained(policy: str) -> None:
    plain, model = Pair(), Pair()
    memo.wrap(model.image, **POLICIES[policy])
    got, want = (after(each(signal()).square().mean(), each) for each in (model, plain))
    assert_close(got, want)
    assert memo.report(model) == memo.report(model.image)
    acted(model)


def test_what_is_asked_of_a_model_with_several_wrapped_ones_inside() -> None:
    model = Pair()
    memo.wrap(model.image, **POLICIES["memo"])
    memo.wrap(model.text, **POLICIES["swap"])
    model(signal()).sum().backward()
    ask: dict[str, Callable[[], Any]] = {
        "report": lambda: memo.report(model),
        "profile": lambda: memo.profile(model, (signal(),)),
        "check": lambda: memo.check(model, (signal(),)),
    }
    for call in ask.values():
        with pytest.raises(ArgumentError, match=r"Pair holds 2 wrapped models \(image, text\).*model\.image"):
            call()
    with pytest.raises(AlreadyWrappedError, match=r"Tower is wrapped already with policy 'memo'.*1 more"):
        memo.wrap(model)
    assert memo.unwrap(model) is model
    assert all("forward" not in module.__dict__ for module in model.modules())
    memo.wrap(model, **POLICIES["memo"])
    model(signal()).sum().backward()
    acted(model)
    with pytest.raises(AlreadyWrappedError, match=r"part of a model that is wrapped already with policy 'memo'"):
        memo.wrap(model.text, **POLICIES["swap"])


def test_a_part_of_a_wrapped_model_is_no_handle_of_it() -> None:
    """Neither is what is inside a wrapper that was given to wrap; nothing is undone on the way."""
    model, inner = memo.wrap(Pair(), **POLICIES["memo"]), tower()
    around = memo.wrap(torch.compile(inner), **POLICIES["memo"])
    for call in (memo.report, memo.unwrap):
        for part in (model.text, model.text.layers[0], inner):
            with pytest.raises(NotWrappedError, match=r"are managed \(policy 'memo'\), and it is not what memo.wrap"):
                call(part)
    model(signal()).sum().backward()
    acted(model)
    assert memo.unwrap(model) is model
    assert memo.unwrap(around) is around
    assert memo.unwrap(inner) is inner
    with pytest.raises(NotWrappedError, match=r"is not wrapped: call memo.wrap"):
        memo.report(inner)


def test_each_has_a_host_budget_of_its_own() -> None:
    """What one may not have is refused by its own name, and the other trains on."""
    enough, little = memo.wrap(tower(), **POLICIES["swap"], host_budget="1GiB"), other()
    memo.wrap(little, **POLICIES["swap"], host_budget="4KiB")
    enough(signal()).sum().backward()
    with pytest.raises(HostLimitError, match="host"):
        little(signal())
    enough(signal()).sum().backward()
    acted(enough)
    assert_nothing_held(enough)
    memo.unwrap(little)
    little(signal()).sum().backward()


def test_unwrapping_one_leaves_the_other() -> None:
    first, second = memo.wrap(tower(), **POLICIES["memo"]), memo.wrap(other(), **POLICIES["memo"])
    loss = first(second(signal())).square().mean()
    memo.unwrap(second)
    got = after(loss, first, second)
    plain = tower(), other()
    assert_close(got, after(plain[0](plain[1](signal())).square().mean(), *plain))
    got = after(first(second(signal())).square().mean(), first, second)
    assert_close(got, after(plain[0](plain[1](signal())).square().mean(), *plain))
    acted(first)
    assert_nothing_held(first)
