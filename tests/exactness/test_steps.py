"""What training loops do around a step: accumulate, go backward twice, evaluate in between, change shapes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from tests.exactness.compare import (
    MAIN_WAYS,
    SWAP,
    Step,
    Way,
    assert_acted,
    assert_clean,
    assert_gradients,
    assert_same,
    assert_trade,
    model_loss,
    plan_of,
    run_step,
    take_gradients,
    weighted,
)
from tests.exactness.models import FAMILIES, text

three_ways = pytest.mark.parametrize("way", MAIN_WAYS, ids=str)


def make(family: str = "gpt2") -> nn.Module:
    """GPT-2 with dropout, unless another family is named."""
    return FAMILIES[family].make()


def batch(*, rows: int = 2, tokens: int = 21, seed: int = 1) -> dict[str, Tensor]:
    return text(rows=rows, tokens=tokens, seed=seed)


def pair(way: Way, family: str = "gpt2", **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same model unwrapped and wrapped."""
    return make(family), way.wrap(make(family), **settings)


@three_ways
def test_accumulation_of_gradients(way: Way) -> None:
    plain, wrapped = pair(way)
    for model in (plain, wrapped):
        torch.manual_seed(3)
        for seed in range(3):
            (model_loss(model, batch(seed=seed)) / 3).backward()
    assert_gradients(take_gradients(wrapped), take_gradients(plain), way)
    assert_acted(wrapped, way)
    assert_trade(wrapped)
    assert_clean(wrapped)


@three_ways
def test_backward_twice(way: Way) -> None:
    """Everything is fetched and rebuilt a second time, after other steps' buffers were freed."""
    plain, wrapped = pair(way, "llama")
    for model in (plain, wrapped):
        loss = model_loss(model, batch())
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        del loss
    assert_gradients(take_gradients(wrapped), take_gradients(plain), way)
    assert_acted(wrapped, way)
    assert_clean(wrapped)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), "together"], ids=str)
@three_ways
def test_two_forwards_before_a_backward(way: Way, order: Any) -> None:
    plain, wrapped = pair(way)
    for model in (plain, wrapped):
        torch.manual_seed(3)
        losses = [model_loss(model, batch(seed=seed)) for seed in range(2)]
        if order == "together":
            (losses[0] * losses[1]).backward()
        else:
            for index in order:
                losses[index].backward()
        del losses
    assert_gradients(take_gradients(wrapped), take_gradients(plain), way)
    assert_trade(wrapped, times=2)
    assert_clean(wrapped)


@three_ways
def test_evaluation_between_steps_and_inside_one(way: Way) -> None:
    plain, wrapped = pair(way)
    outputs = []
    for model in (plain, wrapped):
        torch.manual_seed(3)
        first = model_loss(model, batch())
        with torch.no_grad():
            outputs.append(model.eval()(**batch(rows=3, tokens=9)).logits)
        model.train()
        first.backward()
        with torch.inference_mode():
            outputs.append(model.eval()(**batch(seed=4)).logits.clone())
        model.train()
        model_loss(model, batch(seed=5)).backward()
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert_gradients(take_gradients(wrapped), take_gradients(plain), way)
    assert_acted(wrapped, way)
    assert_trade(wrapped)
    assert_clean(wrapped)


@three_ways
def test_training_changes_the_parameters_alike(way: Way) -> None:
    plain, wrapped = pair(way)
    for model in (plain, wrapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(3)
        for seed in range(4):
            model_loss(model, batch(seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_gradients(dict(wrapped.named_parameters()), dict(plain.named_parameters()), way)
    assert_acted(wrapped, way)


@three_ways
def test_loss_from_all_hidden_states(way: Way) -> None:
    def loss_of(model: nn.Module, inputs: Any) -> Tensor:
        output = model(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == 3
        return weighted([output.loss, *output.hidden_states])

    plain, wrapped = pair(way)
    assert_same(run_step(wrapped, batch(), loss_of), run_step(plain, batch(), loss_of), way)
    assert_acted(wrapped, way)
    assert_trade(wrapped)


@three_ways
def test_loss_from_a_hidden_state_in_the_middle(way: Way) -> None:
    """The last block never goes backward: its stash is freed unused."""

    def loss_of(model: nn.Module, inputs: Any) -> Tensor:
        return weighted(model(**inputs, output_hidden_states=True).hidden_states[1])

    plain, wrapped = pair(way)
    assert_same(run_step(wrapped, batch(), loss_of), run_step(plain, batch(), loss_of), way)
    first, last = memo.report(wrapped).blocks
    assert first.bytes_to_device > 0
    assert last.bytes_to_host > 0
    assert last.recomputed_flops == 0
    assert_clean(wrapped)


@three_ways
def test_hooks_of_the_user(way: Way) -> None:
    """On blocks: one that reads, one that changes the output, one on its gradient, one before the forward.

    The profiling pass of the first step calls the block once more, and so its hooks.
    """
    plain, wrapped = pair(way, "llama")
    seen: dict[int, list[Tensor]] = {}
    for model in (plain, wrapped):
        found = seen.setdefault(id(model), [])
        block = model.get_submodule("model.layers.0")
        block.register_forward_hook(lambda _, __, out, found=found: found.append(out.detach().clone()))
        block.register_forward_hook(lambda _, __, out: out * 1.5)
        block.register_forward_pre_hook(lambda _, args: (args[0] + 0.25, *args[1:]))
        block.register_full_backward_hook(lambda _, __, out, found=found: found.append(out[0].clone()))
    want, got = run_step(plain, batch()), run_step(wrapped, batch())
    assert_same(got, want, way)
    forward, backward = zip(seen[id(plain)][-2:], seen[id(wrapped)][-2:], strict=True)
    assert torch.equal(*forward)
    assert (backward[0] - backward[1]).norm() <= 1e-12 * backward[0].norm()
    assert_acted(wrapped, way)
    assert_trade(wrapped)


@three_ways
def test_changes_of_length_and_batch_size(way: Way) -> None:
    plain, wrapped = pair(way)
    shapes = [(2, 21), (2, 33), (1, 33), (2, 21), (3, 10), (2, 4)]
    for rows, tokens in shapes:
        inputs = batch(rows=rows, tokens=tokens)
        assert_same(run_step(wrapped, inputs), run_step(plain, inputs), way)
        assert {block.tokens for block in plan_of(wrapped).blocks} == {tokens}
        assert_trade(wrapped)
        assert_clean(wrapped)


@three_ways
def test_training_and_evaluation_mode_in_turn(way: Way) -> None:
    """Without dropout other tensors are saved; each mode has its own plan."""
    plain, wrapped = pair(way)
    for training in (True, False, True):
        plain.train(training)
        wrapped.train(training)
        assert_same(run_step(wrapped, batch()), run_step(plain, batch()), way)
        assert_acted(wrapped, way)
        assert_trade(wrapped)


@three_ways
def test_gradients_of_some_parameters_only(way: Way) -> None:
    plain, wrapped = pair(way)
    found = []
    for model in (plain, wrapped):
        torch.manual_seed(3)
        chosen = [model.get_parameter(f"transformer.h.{block}.mlp.c_fc.weight") for block in (0, 1)]
        found.append(dict(enumerate(torch.autograd.grad(model_loss(model, batch()), chosen))))
    assert_gradients(found[1], found[0], way)
    assert_clean(wrapped)


@three_ways
def test_inputs_that_need_gradients(way: Way) -> None:
    plain, wrapped = pair(way, "llama")
    hidden = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    steps: list[Step] = []
    for model in (plain, wrapped):
        inputs = {"inputs_embeds": hidden.clone().requires_grad_(), "labels": batch()["labels"]}
        steps.append(run_step(model, inputs))
    assert "batch.inputs_embeds" in steps[0].gradients
    assert_same(steps[1], steps[0], way)
    assert_acted(wrapped, way)
    assert_trade(wrapped)


@three_ways
def test_an_exception_in_a_step_leaves_clean_state(way: Way) -> None:
    plain, wrapped = pair(way)
    want = run_step(plain, batch())
    for model in (plain, wrapped):
        block = model.get_submodule("transformer.h.1.mlp")
        handle = block.register_forward_hook(_fail)
        with contextlib.suppress(KeyboardInterrupt):
            run_step(model, batch())
        handle.remove()
    for _ in range(2):
        assert_same(run_step(wrapped, batch()), want, way)
    assert_acted(wrapped, way)
    assert_trade(wrapped)
    assert_clean(wrapped)


def _fail(*_: Any) -> None:
    raise KeyboardInterrupt


@three_ways
def test_a_block_that_changes_after_it_was_profiled(way: Way) -> None:
    """It saves other tensors than its profile has: all are swapped whole, and the report says so."""
    plain, wrapped = pair(way, "llama")
    assert_same(run_step(wrapped, batch()), run_step(plain, batch()), way)
    for model in (plain, wrapped):
        model.get_submodule("model.layers.0.mlp").act_fn = torch.nn.GELU()
        model.get_submodule("model.layers.1.mlp").act_fn = torch.nn.Softplus()
    assert_same(run_step(wrapped, batch()), run_step(plain, batch()), way)
    for model in (plain, wrapped):
        model.get_submodule("model.layers.0.mlp").act_fn = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.SiLU())
    assert_same(run_step(wrapped, batch()), run_step(plain, batch()), way)
    changed = memo.report(wrapped).blocks[0]
    assert "saved other tensors" in changed.reason
    assert changed.alpha == 1.0
    assert changed.recomputed_flops == 0
    assert_clean(wrapped)


@three_ways
def test_unwrapping_between_forward_and_backward(way: Way) -> None:
    plain, wrapped = pair(way)
    want = run_step(plain, batch())
    torch.manual_seed(3)
    loss = model_loss(wrapped, batch())
    memo.unwrap(wrapped)
    loss.backward()
    assert_gradients(take_gradients(wrapped), want.gradients, way)
    assert_same(run_step(wrapped, batch()), want, SWAP)
