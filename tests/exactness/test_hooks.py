"""Hooks inside of blocks are state as attributes are: a rerun has those of its forward, and nothing leaves more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.exactness.test_state import WAYS, WIDTH, Tower, assert_close, gradients, pair, sequence


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class HooksItself(Mlp):
    """Registers a hook once, in its first forward, as Hugging Face models do for what they collect."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.up.register_forward_hook(lambda _, __, out: out * 1.5)
            self.hooked = True
        return super().forward(x)


def hooks(model: nn.Module) -> list[int]:
    """How many hooks every module inside of a block has."""
    inner = [m for layer in model.layers for m in layer.modules() if m is not layer]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in inner]


@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_a_block_that_registers_hooks_in_its_first_forward(policy, alpha):
    plain, wrapped = pair(HooksItself, policy, alpha)
    for _ in range(3):
        for model in (plain, wrapped):
            model.zero_grad(set_to_none=True)
            model(sequence()).backward()
        assert hooks(wrapped) == hooks(plain) == [1, 0] * 3
        assert_close(gradients(wrapped), gradients(plain))


def _removed(model: Tower) -> Callable[[], Any]:
    """Hooks of the forward, removed before backward."""
    handles = [layer.up.register_forward_hook(lambda _, __, out: out * 1.5) for layer in model.layers]
    handles += [
        layer.down.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + 0.5,), kwargs), with_kwargs=True)
        for layer in model.layers
    ]
    return lambda: [handle.remove() for handle in handles]


def _added(model: Tower) -> Callable[[], Any]:
    """Hooks that the forward did not have."""
    return lambda: [layer.up.register_forward_hook(lambda _, __, out: out * 9.0) for layer in model.layers]


def _once(model: Tower) -> Callable[[], Any]:
    """Hooks that remove themselves when they are called."""
    for layer in model.layers:
        def hook(_: Any, __: Any, out: Tensor, layer: nn.Module = layer) -> Tensor:
            layer.handle.remove()
            return out * 1.5

        layer.__dict__["handle"] = layer.up.register_forward_hook(hook)
    return lambda: None


@pytest.mark.parametrize("change", [_removed, _added, _once], ids=lambda change: change.__name__)
@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_hooks_are_those_of_the_forward(change: Callable[[Tower], Callable[[], Any]], policy, alpha):
    for first in (True, False):  # the step that profiles, and one that does not
        found, left = [], []
        for model in pair(Mlp, policy, alpha):
            if not first:
                model(sequence()).backward()
                model.zero_grad(set_to_none=True)
            after = change(model)
            loss = model(sequence())
            after()
            loss.backward()
            found.append(gradients(model))
            left.append(hooks(model))
        assert left[0] == left[1]
        assert any(left[0]) == (change is _added)
        assert_close(found[1], found[0])


@pytest.mark.parametrize(("policy", "alpha"), [*WAYS, ("tiled", None)])
def test_hooks_on_parameters_see_the_gradients_of_the_step_alone(policy, alpha):
    """In the step that profiles, and in one with another number of sequences."""
    seen: dict[str, list[tuple[str, Tensor]]] = {"plain": [], "wrapped": []}
    models = dict(zip(("plain", "wrapped"), pair(Mlp, policy, alpha), strict=True))
    for which, model in models.items():
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda grad, which=which, name=name: seen[which].append((name, grad)))
            parameter.register_post_accumulate_grad_hook(
                lambda leaf, which=which, name=name: seen[which].append((f"{name}, summed", leaf.grad))
            )
    for rows in (1, 3):
        for which, model in models.items():
            seen[which].clear()
            model.zero_grad(set_to_none=True)
            model(sequence()[:1].repeat(rows, 1, 1)).backward()
        assert len(seen["plain"]) == 2 * len(list(models["plain"].parameters()))
        assert sorted(name for name, _ in seen["wrapped"]) == sorted(name for name, _ in seen["plain"])
        assert_close(dict(seen["wrapped"]), dict(seen["plain"]))


class OwnParameter(nn.Parameter):
    """As libraries of quantised or sharded tensors have."""


class HooksItsScale(Mlp):
    """Registers a hook on a leaf once, in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.leaf()

    def leaf(self) -> Tensor:
        return nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.scale.register_hook(lambda grad: grad * 2.0)
            self.hooked = True
        return super().forward(x) * self.scale


class HooksItsOwnParameter(HooksItsScale):
    def leaf(self) -> Tensor:
        return OwnParameter(torch.full((WIDTH,), 1.5))


class HooksAnAttribute(HooksItsScale):
    def leaf(self) -> Tensor:
        return torch.full((WIDTH,), 1.5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", [HooksItsScale, HooksItsOwnParameter, HooksAnAttribute])
@pytest.mark.parametrize(("policy", "alpha"), WAYS)
def test_a_block_that_hooks_a_leaf_in_its_first_forward(kind, policy, alpha):
    plain, wrapped = pair(kind, policy, alpha)
    for _ in range(2):
        scales = []
        for model in (plain, wrapped):
            model.zero_grad(set_to_none=True)
            for layer in model.layers:
                layer.scale.grad = None
            model(sequence()).backward()
            scales.append({f"scale {number}": layer.scale.grad for number, layer in enumerate(model.layers)})
        assert [len(layer.scale._backward_hooks) for layer in wrapped.layers] == [1] * 3
        assert_close(gradients(wrapped), gradients(plain))
        assert_close(scales[1], scales[0])
