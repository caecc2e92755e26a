"""What may happen to a model around ``wrap``: casts, PEFT, accelerate, compile, hooks, generate."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from tests.api.main_ways import MAIN_POLICIES
from tests.api.subjects import (
    acted,
    assert_close,
    assert_nothing_held,
    assert_trains_as,
    llama,
    refused,
    step,
    totals,
    wrapped_llama,
)
from tests.api.towers import HIDDEN, POLICIES, Block, signal, tower
from tests.integrations.models import batch, make

# Casts.


def test_wrap_before_a_cast() -> None:
    model, plain = tower(dtype=torch.float32), tower(dtype=torch.float32).double()
    memo.wrap(model, **POLICIES["memo"]).to(torch.float64)
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)


def test_a_cast_between_steps_is_planned_anew() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["swap"]), tower()
    assert_trains_as(model, plain, signal())
    wide = acted(model).totals
    model.float()
    plain.float()
    narrow = signal(dtype=torch.float32)
    assert_trains_as(model, plain, narrow, bound=0)
    half = acted(model).totals  # what is too small to be worth a copy stays
    assert 2 * (half.bytes_to_host + half.bytes_kept) == wide.bytes_to_host + wide.bytes_kept
    assert totals(model).peak_bytes == totals(model).forecast.peak_bytes < wide.peak_bytes
    model.double()
    plain.double()
    assert_trains_as(model, plain, signal())
    assert acted(model).totals.bytes_to_host == wide.bytes_to_host
    assert_nothing_held(model)


def test_freezing_and_evaluation_mode_between_steps_are_planned_anew() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    assert_trains_as(model, plain, signal())
    for m in (model, plain):
        m.layers[0].requires_grad_(False)
        m.first.requires_grad_(False)
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)
    for m in (model.eval(), plain.eval()):
        m.requires_grad_(True)
    assert_trains_as(model, plain, signal())
    acted(model)


# PEFT.


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.0)
    return get_peft_model(model, config)


@pytest.mark.parametrize("order", ["wrap first", "peft first", "stepped before peft"])
@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_peft(order: str, policy: str) -> None:
    plain, model = adapted(llama()), llama()
    if order != "peft first":
        memo.wrap(model, **POLICIES[policy])
    if order == "stepped before peft":
        assert_trains_as(model, llama())
    model = adapted(model)
    if order == "peft first":
        assert memo.wrap(model, **POLICIES[policy]) is model
    for _ in range(2):
        assert_trains_as(model, plain)
        report = acted(model)
        assert {block.executor for block in report.blocks} == {"replay"}
    memo.unwrap(model)
    assert_trains_as(model, plain, bound=0)


# accelerate.


@pytest.mark.parametrize("order", ["wrap first", "prepare first"])
def test_accelerate(order: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, plain = llama(), llama()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    if order == "wrap first":
        memo.wrap(model, **POLICIES["memo"])
    model, optimizer = accelerator.prepare(model, optimizers[0])
    if order == "prepare first":
        memo.wrap(model, **POLICIES["memo"])
    for seed in range(3):
        inputs = batch(tokens=24, seed=seed)
        accelerator.backward(model(**inputs).loss)
        plain(**inputs).loss.backward()
        for some in (optimizer, optimizers[1]):
            some.step()
            some.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    acted(model)
    memo.unwrap(accelerator.unwrap_model(model))
    assert_trains_as(model, plain, bound=1e-8)


@pytest.mark.parametrize("order", ["wrap first", "prepare first"])
def test_accelerate_in_bf16(order: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    made = [tower(dtype=torch.float32) for _ in range(2)]
    if order == "wrap first":
        memo.wrap(made[0], **POLICIES["swap"])
    model, plain = (accelerator.prepare(m) for m in made)
    if order == "prepare first":
        memo.wrap(model, **POLICIES["swap"])
    for _ in range(2):
        assert_trains_as(model, plain, signal(dtype=torch.float32), bound=0)
        acted(model)
    AcceleratorState._reset_state(reset_partial_state=True)


# torch.compile.


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["wrap first", "compile first"])
@pytest.mark.parametrize(
    ("policy", "backend"),
    [("memo", "aot_eager"),
     *(pytest.param(*one, marks=pytest.mark.slow)
       for one in (("memo", "eager"), ("swap", "aot_eager"), ("recompute", "aot_eager")))],
)  # fmt: skip
def test_a_compiled_model_works(policy: str, order: str, backend: str, fresh_dynamo: None) -> None:
    model, plain = tower(2), tower(2)
    if order == "wrap first":
        memo.wrap(model, **POLICIES[policy])
    compiled: Any = torch.compile(model, backend=backend)
    if order == "compile first":
        assert memo.wrap(compiled, **POLICIES[policy]) is compiled
    for _ in range(3):
        assert_trains_as(compiled, plain, signal())
        report = acted(compiled)
        assert [block.executor for block in report.blocks] == ["replay", "replay"]
    assert_nothing_held(compiled)
    memo.unwrap(compiled)
    assert_trains_as(compiled, plain, signal())


def _doubled(x: Tensor) -> Tensor:
    return 2.0 * x


class CompiledBlock(Block):
    act: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + CompiledBlock.act(x)


class CallsCompiled(nn.Module):
    """A tower with a compiled function in front of its blocks, and in each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(CompiledBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = CompiledBlock.act(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.anew
@pytest.mark.parametrize("policy", ["swap", "memo"])
def test_functions_that_are_compiled_work_in_front_of_blocks_and_inside(
    policy: str, fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What looks at every function that starts is none that is compiled with them."""
    compiled = torch.compile(lambda x: _doubled(x).relu(), backend="aot_eager")
    monkeypatch.setattr(CompiledBlock, "act", staticmethod(compiled))
    torch.manual_seed(0)
    plain = CallsCompiled().double()
    model = copy.deepcopy(plain)
    memo.wrap(model, **POLICIES[policy])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["wrap first", "compile first"])
def test_a_compiled_llama_works(order: str, fresh_dynamo: None) -> None:
    model, plain = llama(), llama()
    if order == "wrap first":
        memo.wrap(model, **POLICIES["memo"])
    compiled: Any = torch.compile(model, backend="aot_eager")
    if order == "compile first":
        memo.wrap(compiled, **POLICIES["memo"])
    for _ in range(2):
        assert_trains_as(compiled, plain)
        acted(compiled)


def test_a_model_compiled_in_place_works(fresh_dynamo: None) -> None:
    model, plain = memo.wrap(tower(2), **POLICIES["memo"]), tower(2)
    model.compile(backend="aot_eager")
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_a_compiled_module_inside_a_block(policy: str, fresh_dynamo: None) -> None:
    model, plain = tower(2), tower(2)
    for layer in model.layers:
        layer.mlp = torch.compile(layer.mlp, backend="aot_eager")
    memo.wrap(model, **POLICIES[policy])
    for _ in range(3):
        assert_trains_as(model, plain, signal())
    report = memo.report(model)
    assert all(block.bytes_to_host > 0 for block in report.blocks)
    assert_nothing_held(model)


@pytest.mark.parametrize("order", ["wrap first", "compile first"])
def test_compiled_blocks(order: str, fresh_dynamo: None) -> None:
    model, plain = tower(2), tower(2)
    if order == "wrap first":
        memo.wrap(model, **POLICIES["memo"])
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    if order == "compile first":
        memo.wrap(model, **POLICIES["memo"])
    for _ in range(3):
        assert_trains_as(model, plain, signal())
    assert all(block.bytes_to_host > 0 for block in memo.report(model).blocks)
    assert_nothing_held(model)


@pytest.mark.parametrize("order", ["wrap first", "compile first"])
def test_one_graph_for_all_is_refused_by_name(order: str, fresh_dynamo: None) -> None:
    model, plain = tower(2), tower(2)
    if order == "wrap first":
        memo.wrap(model, **POLICIES["memo"])
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    if order == "compile first":
        memo.wrap(compiled, **POLICIES["memo"])
    message = refused(torch._dynamo.exc.Unsupported, step, compiled, signal())
    assert "memo_runtime manages this block" in message
    assert "compile without fullgraph=True" in message
    assert_trains_as(memo.unwrap(compiled), plain, signal())


def test_data_parallel_is_refused_by_name() -> None:
    """On several devices it calls copies that share the blocks' forwards."""
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    copied = model._replicate_for_data_parallel()
    message = refused(memo.MemoError, copied, signal())
    assert "nn.DataParallel" in message
    assert "DistributedDataParallel" in message
    assert_trains_as(model, plain, signal())
    one_device = nn.DataParallel(model)
    assert_trains_as(one_device, plain, signal())


# Hooks, evaluation, generate.


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_forward_hooks_see_and_change_what_blocks_yield(policy: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES[policy]), tower()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for which, m in enumerate((model, plain)):
        m.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.25,))
        m.layers[1].register_forward_hook(lambda module, args, output: output * 0.5)
        m.layers[1].mlp.register_forward_hook(lambda module, args, output: output.tanh())
        m.layers[2].register_forward_hook(lambda module, args, output, which=which: seen[which].append(output.detach()))
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        torch.testing.assert_close(seen[0][-1], seen[1][-1], rtol=0, atol=0)
        acted(model)


@pytest.mark.parametrize("policy", MAIN_POLICIES)
def test_backward_hooks_inside_blocks_fire_once(policy: str) -> None:
    model, plain = memo.wrap(tower(), **POLICIES[policy]), tower()
    step(model, signal())
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for which, m in enumerate((model, plain)):
        for module in (m.layers[0], m.layers[1].mlp):
            module.register_full_backward_hook(lambda module, given, got, which=which: seen[which].append(got[0]))
    assert_trains_as(model, plain, signal())
    assert len(seen[0]) == len(seen[1]) == 2
    for got, want in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


def test_hidden_states_are_the_unwrapped_models() -> None:
    model, plain = wrapped_llama(), make("llama")
    for _ in range(2):
        outputs = [m(**batch(tokens=24), output_hidden_states=True) for m in (model, plain)]
        assert len(outputs[0].hidden_states) == len(outputs[1].hidden_states) == 3
        for got, want in zip(*(o.hidden_states for o in outputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_evaluation_is_the_models_own_forward() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(signal()), plain(signal()))
    assert totals(model).steps == 0
    assert_trains_as(model, plain, signal())
    steps = totals(model).steps
    with torch.no_grad():
        assert torch.equal(model(signal(seed=5)), plain(signal(seed=5)))
    assert totals(model).steps == steps
    assert_nothing_held(model)


def test_evaluation_between_forward_and_backward() -> None:
    model, plain = memo.wrap(tower(), **POLICIES["memo"]), tower()
    step(model, signal())
    losses = [m(signal()).square().mean() for m in (model, plain)]
    with torch.no_grad():
        model(signal(seed=9))
    for loss in losses:
        loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_before_and_after_steps(use_cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, plain = wrapped_llama(), make("llama")
    prompt = batch()["input_ids"][:2]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    for _ in range(2):
        with caplog.at_level(logging.WARNING, logger="memo_runtime"):
            assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
            assert not caplog.records
        got, want = step(model), step(plain)
        assert_close(got, want, 1e-6)  # transformers' own loss is float32
    acted(model)
    assert_nothing_held(model)


def test_a_model_is_wrapped_through_whatever_is_around_it() -> None:
    model = memo.wrap(tower(), **POLICIES["swap"])
    around = nn.Sequential(model)
    step(around, signal())
    assert memo.report(around) == memo.report(model)
    memo.unwrap(around)
    assert "not wrapped" in refused(memo.errors.NotWrappedError, memo.report, model)
