"""Another memory optimiser in the same step is refused by name; without it the model trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint

import memo_runtime as memo
from memo_runtime.errors import OffloaderActiveError
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import acted, assert_nothing_held, assert_trains_as, llama, refused, step
from tests.api.towers import POLICIES, Block, Tower, signal, tower


class OffloadActivations(saved_tensors_hooks):
    """As in TRL and torchtune: hooks of its own around the step."""

    def __init__(self) -> None:
        def pack_tensor(tensor: Tensor) -> Tensor:
            return tensor.clone()

        def unpack_tensor(tensor: Tensor) -> Tensor:
            return tensor

        super().__init__(pack_tensor, unpack_tensor)


CONTEXTS: dict[str, tuple[Callable[[], Any], str]] = {
    "save_on_cpu": (save_on_cpu, "save_on_cpu"),
    "TRL": (OffloadActivations, "OffloadActivations"),
    "hooks": (lambda: saved_tensors_hooks(lambda t: t, lambda t: t), "saved-tensor hooks"),
}


@pytest.mark.parametrize("when", ["first step", "later"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_hooks_around_the_step(context: str, when: str) -> None:
    make_context, name = CONTEXTS[context]
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    if when == "later":
        step(model, signal())
    with make_context():
        message = refused(OffloaderActiveError, step, model, signal())
    assert name in message
    assert "Leave that context, or do not wrap" in message
    assert_trains_as(model, plain, signal())
    acted(model)
    assert_nothing_held(model)
    with make_context(), torch.no_grad():
        assert torch.equal(model(signal()), plain(signal()))
    memo.unwrap(model)
    with make_context():
        assert_trains_as(model, plain, signal(), bound=0)


class Offloading(Tower):
    """A model that offloads by itself, inside its forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with save_on_cpu():
            for layer in self.layers:
                x = layer(x)
        return self.last(x)


def test_hooks_inside_the_forward() -> None:
    model = memo.wrap(Offloading().double(), **POLICIES["memo"])
    for _ in range(2):
        assert "save_on_cpu" in refused(OffloaderActiveError, step, model, signal())
    plain = tower()
    plain.load_state_dict(model.state_dict())
    assert_trains_as(memo.unwrap(model), plain, signal())


# Gradient checkpointing.


class Checkpointed(Tower):
    """A model that calls ``torch.utils.checkpoint`` itself, one way or the other."""

    reentrant = False
    on = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.on else layer(x)
        return self.last(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["first step", "later"])
def test_torch_checkpoint_in_the_models_own_forward(reentrant: bool, when: str) -> None:
    model = memo.wrap(Checkpointed().double(), **POLICIES["memo"])
    model.reentrant, model.on = reentrant, when == "first step"
    plain = tower()
    plain.load_state_dict(model.state_dict())
    if when == "later":
        assert_trains_as(model, plain, signal())
        model.on = True
    for _ in range(2):
        assert "heckpoint" in refused(OffloaderActiveError, step, model, signal())
    model.on = False
    assert_trains_as(model, plain, signal())
    acted(model)
    assert_nothing_held(model)
    model.on = True
    assert_trains_as(memo.unwrap(model), plain, signal())


def test_hugging_face_checkpointing_before_wrap() -> None:
    model, plain = llama(), llama()
    model.gradient_checkpointing_enable()
    keys = [list(vars(module)) for module in model.modules()]
    message = refused(OffloaderActiveError, memo.wrap, model)
    assert "gradient checkpointing is on in " in message
    assert "_checkpointing_disable()" in message
    assert [list(vars(module)) for module in model.modules()] == keys
    assert_trains_as(model, plain)
    model.gradient_checkpointing_disable()
    assert_trains_as(memo.wrap(model, **POLICIES["memo"]), plain)
    acted(model)


@pytest.mark.parametrize("steps", [0, 1])
def test_hugging_face_checkpointing_after_wrap(steps: int) -> None:
    model, plain = memo.wrap(llama(), **POLICIES["memo"]), llama()
    for _ in range(steps):
        step(model)
    model.gradient_checkpointing_enable()
    for _ in range(2):
        assert "_checkpointing_disable()" in refused(OffloaderActiveError, step, model)
    model.gradient_checkpointing_disable()
    assert_trains_as(model, plain)
    acted(model)
    model.gradient_checkpointing_enable()
    assert_trains_as(memo.unwrap(model), plain)


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


WRAPPERS = {"checkpoint_wrapper": checkpoint_wrapper, "offload_wrapper": offload_wrapper}


@pytest.mark.parametrize("name", WRAPPERS)
def test_torchs_wrappers_before_wrap(name: str) -> None:
    model, plain = tower(), tower()
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=WRAPPERS[name], check_fn=is_block)
    message = refused(OffloaderActiveError, memo.wrap, model)
    assert f"{name}" in message
    assert "'layers.0'" in message
    assert_trains_as(model, plain, signal())


@pytest.mark.parametrize("name", WRAPPERS)
def test_torchs_wrappers_after_wrap(name: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=WRAPPERS[name], check_fn=is_block)
    assert name in refused(OffloaderActiveError, step, model, signal())
    assert_trains_as(memo.unwrap(model), plain, signal())


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_checkpoint_around_one_part_of_a_block_works(policy: str) -> None:
    model, plain = tower(), tower()
    for layer in model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)
    memo.wrap(model, **POLICIES[policy])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)
    assert_nothing_held(model)


def test_a_reentrant_checkpoint_inside_a_block() -> None:
    model, plain = tower(), tower()
    for layer in model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp, checkpoint_impl=CheckpointImpl.REENTRANT)
    memo.wrap(model, **POLICIES["memo"])
    for _ in range(2):
        message = refused(OffloaderActiveError, step, model, signal())
        assert "'layers.0'" in message
        assert "use_reentrant=False" in message
    assert_trains_as(memo.unwrap(model), plain, signal())


def test_a_checkpoint_around_a_later_block() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    inner = model.layers[2]

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model.layers[2] = Around()
    for _ in range(2):
        assert "torch.utils.checkpoint" in refused(OffloaderActiveError, step, model, signal())
    model.layers[2] = inner
    assert_trains_as(model, plain, signal())
    acted(model)
    assert_nothing_held(model)
