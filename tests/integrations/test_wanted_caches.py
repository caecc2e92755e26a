"""A key/value cache that somebody asks for is filled as it is unwrapped, and one left empty is not used in silence."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import memo_runtime as memo
from memo_runtime.blocks.cache import HOLDS_TOKENS
from memo_runtime.errors import ArgumentError, BlockFallbackError
from memo_runtime.execution.caches import WANTED
from memo_runtime.records import Executor
from tests.integrations.models import make

IDS = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(3))


def in_segments(model: LlamaForCausalLM) -> tuple[float, int, list[torch.Tensor]]:
    """(loss, tokens in the cache, gradients) of two halves, the second of which attends to the first."""
    model.zero_grad()
    cache = DynamicCache()
    model(input_ids=IDS[:, :24], past_key_values=cache, use_cache=True)
    loss = model(input_ids=IDS[:, 24:], past_key_values=cache, use_cache=True).logits.square().mean()
    loss.backward()
    return loss.item(), cache.get_seq_length(), [parameter.grad for parameter in model.parameters()]


def decoded(model: LlamaForCausalLM) -> list[int]:
    """Greedy decoding by hand, where nobody has switched gradients off."""
    model.eval()
    output, found = model(input_ids=IDS[:1, :6], use_cache=True), []
    for _ in range(4):
        token = output.logits[:, -1:].argmax(-1)
        found.append(token.item())
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    model.train()
    return found


def trained(model: LlamaForCausalLM) -> None:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("policy", ["swap", "recompute", "tiled", "none"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_cache_that_was_asked_for_is_filled(policy: str, steps_before: int) -> None:
    plain = make("llama")
    model = copy.deepcopy(plain)
    memo.wrap(model, policy=policy, keep_last=0 if policy not in ("none", "tiled") else None)
    for _ in range(steps_before):
        trained(model)
    want, got = in_segments(plain), in_segments(model)
    assert got[:2] == pytest.approx(want[:2], rel=1e-12)
    assert got[1] == 48
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-14) for one, other in zip(got[2], want[2], strict=True))
    assert decoded(model) == decoded(plain)
    trained(model)  # and the next step is managed again
    assert Executor.NATIVE not in {block.executor for block in memo.report(model).blocks}


def test_the_report_and_one_warning_say_why_blocks_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    memo.wrap(model, policy="swap", keep_last=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(input_ids=IDS, past_key_values=DynamicCache()).logits.sum().backward()
    (said,) = [record.message for record in caplog.records if "given by the caller" in record.message]
    assert "whatever the budget" in said
    report = memo.report(model)
    assert {(block.executor, block.reason) for block in report.blocks} == {(Executor.NATIVE, WANTED)}
    assert said in report.notes


@pytest.mark.parametrize("asked", [False, True])
def test_in_training_it_is_off_and_whoever_asked_is_warned(asked: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    memo.wrap(model, policy="swap", keep_last=0)
    with caplog.at_level(logging.INFO):
        output = model(input_ids=IDS, **({"use_cache": True} if asked else {}))
    assert output.past_key_values.get_seq_length() == 0
    levels = [record.levelno for record in caplog.records if "cache stays empty" in record.message]
    assert levels == [logging.WARNING] * asked
    assert any("cache is off" in record.message for record in caplog.records)
    assert {block.executor for block in memo.report(model).blocks} == {Executor.REPLAY}


@pytest.mark.parametrize("policy", ["swap", "tiled"])
@pytest.mark.parametrize("filled", [False, True])
def test_strict_refuses_it_under_every_policy(policy: str, filled: bool) -> None:
    model, cache = make("llama"), DynamicCache()
    if filled:
        with torch.no_grad():
            model(input_ids=IDS[:, :8], past_key_values=cache)
    memo.wrap(model, policy=policy, strict=True)
    with pytest.raises(BlockFallbackError, match="holds tokens already" if filled else "given by the caller"):
        model(input_ids=IDS[:, 8:], past_key_values=cache)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_cache_that_was_left_empty_is_refused_as_an_argument(gradients: bool) -> None:
    model = make("llama")
    memo.wrap(model, policy="swap", keep_last=0)
    output = model(input_ids=IDS)
    output.logits.sum().backward()
    with torch.set_grad_enabled(gradients), pytest.raises(ArgumentError, match=r"is empty: .*DynamicCache"):
        model(input_ids=IDS[:, :1], past_key_values=output.past_key_values)
    trained(model)  # nothing is half done


def test_a_profile_says_that_the_cache_holds_tokens() -> None:
    model, cache = make("llama"), DynamicCache()
    with torch.no_grad():
        model(input_ids=IDS[:, :8], past_key_values=cache)
    profile = memo.profile(model, {"input_ids": IDS[:, 8:], "past_key_values": cache})
    assert {block.reason for block in profile.blocks} == {HOLDS_TOKENS}
    assert cache.get_seq_length() == 8


def test_a_part_that_is_called_by_itself_is_not_left_alone_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    memo.wrap(model, policy="swap", keep_last=0)
    with caplog.at_level(logging.WARNING):
        model.model(input_ids=IDS).last_hidden_state.square().mean().backward()
    assert any("wrap that part" in record.message for record in caplog.records)
    assert {block.executor for block in memo.report(model).blocks} == {Executor.NATIVE}
    trained(model)
    model.model(input_ids=IDS).last_hidden_state.square().mean().backward()
    assert {block.executor for block in memo.report(model).blocks} == {Executor.REPLAY}
    memo.unwrap(model)
    memo.wrap(model, policy="swap", keep_last=0, strict=True)
    with pytest.raises(BlockFallbackError, match="wrap that part"):
        model.model(input_ids=IDS)


class Batched(nn.Module):
    """Takes its batch as one object."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Any:
        return self.model(**batch)


def test_caches_inside_of_a_batch_are_seen() -> None:
    model = Batched(make("llama"))
    memo.wrap(model, policy="recompute", keep_last=0)
    cache = DynamicCache()
    model({"input_ids": IDS, "past_key_values": cache})
    assert cache.get_seq_length() == 48
    left = model({"input_ids": IDS}).past_key_values
    with pytest.raises(ArgumentError, match="is empty"):
        model({"input_ids": IDS[:, :2], "past_key_values": left})


@pytest.mark.parametrize("way", ["itself", "a copy"])
def test_one_that_a_part_left_empty_is_refused_until_it_is_filled(way: str) -> None:
    model = make("llama").train()
    memo.wrap(model, policy="swap", keep_last=0)
    trained(model)
    cache = DynamicCache()
    model.model(input_ids=IDS[:, :16], past_key_values=cache)  # of whose arguments the wrapped model knows nothing
    held = cache if way == "itself" else copy.deepcopy(cache)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(ArgumentError, match="is empty"):
            model(input_ids=IDS[:, 16:], past_key_values=held)
    memo.unwrap(model)
    with torch.no_grad():
        model.model(input_ids=IDS[:, :16], past_key_values=cache)
    memo.wrap(model, policy="swap", keep_last=0)
    with torch.no_grad():  # it holds its tokens now
        model(input_ids=IDS[:, 16:], past_key_values=cache)
    assert cache.get_seq_length() == 48


def test_one_that_others_filled_in_part_is_refused_all_the_same() -> None:
    model = make("llama", num_hidden_layers=3)
    memo.wrap(model, policy="swap", keep_last=0, blocks=list(model.model.layers)[1:])
    left = model(input_ids=IDS).past_key_values
    assert [layer.get_seq_length() for layer in left.layers][:1] == [48]
    with torch.no_grad(), pytest.raises(ArgumentError, match="is empty"):
        model(input_ids=IDS[:, :1], past_key_values=left)


class Owner(nn.Module):
    """Keeps its cache from step to step, and begins anew where it holds something."""

    def __init__(self, base: LlamaForCausalLM) -> None:
        super().__init__()
        self.base, self.cache = base, DynamicCache()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.cache.get_seq_length():
            self.cache = DynamicCache()
        return self.base.model(input_ids=ids, past_key_values=self.cache).last_hidden_state.square().mean()


class Looped(nn.Module):
    """Two rounds of the same layers, each with slots of its own in one cache."""

    def __init__(self, base: LlamaForCausalLM) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        cache, count = DynamicCache(), len(self.base.model.layers)
        hidden = self.base.model.embed_tokens(ids)
        places = self.base.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        for number in range(2):
            for index, layer in enumerate(self.base.model.layers):
                layer.self_attn.layer_idx = number * count + index
                hidden = layer(hidden, position_embeddings=places, past_key_values=cache)
        return hidden.square().mean()


@pytest.mark.parametrize("kind", [Owner, Looped])
def test_caches_that_a_model_keeps_or_loops_over_are_its_own(kind: type[nn.Module]) -> None:
    plain = kind(make("llama"))
    model = copy.deepcopy(plain)
    memo.wrap(model, policy="recompute", keep_last=0)
    for _ in range(3):
        for one in (plain, model):
            one.zero_grad()
            one(IDS).backward()
        pairs = zip(model.named_parameters(), plain.named_parameters(), strict=True)
        for (_, got), (_, want) in pairs:
            assert (got.grad is None) == (want.grad is None)
            assert got.grad is None or torch.allclose(got.grad, want.grad, rtol=1e-9, atol=1e-13)


def test_use_cache_within_a_batch_is_seen() -> None:
    model = Batched(make("llama")).eval()
    memo.wrap(model, policy="swap", keep_last=0)
    assert model({"input_ids": IDS, "use_cache": True}).past_key_values.get_seq_length() == 48


def test_what_was_asked_ends_with_a_forward_that_raises() -> None:
    model = make("llama").eval()
    memo.wrap(model, policy="swap", keep_last=0)
    trained(model)
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=IDS, use_cache=True)
    handle.remove()
    model.model(input_ids=IDS).last_hidden_state.square().mean().backward()
    assert {block.executor for block in memo.report(model).blocks} == {Executor.REPLAY}


def test_generation_between_and_within_steps_leaves_training_managed() -> None:
    model = make("llama")
    memo.wrap(model, policy="swap", keep_last=0, strict=True)
    trained(model)

    def sample(*_: Any) -> None:
        training = model.training
        if not torch.is_grad_enabled():
            return  # within itself
        with torch.no_grad():
            model.eval().generate(IDS[:, :4], max_new_tokens=2, do_sample=False)
        model.train(training)

    sample()
    model.model(input_ids=IDS).last_hidden_state.square().mean().backward()
    handle = model.model.embed_tokens.register_forward_hook(sample)
    trained(model)
    handle.remove()
    assert {block.executor for block in memo.report(model).blocks} == {Executor.REPLAY}


def test_blocks_without_a_cache_are_planned_beside_those_with_one() -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=97, dropout_rate=0.0,
                      decoder_start_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    memo.wrap(model, policy="swap", keep_last=0)
    output = model(input_ids=IDS, decoder_input_ids=IDS[:, :12], use_cache=True)
    assert output.past_key_values.get_seq_length() == 12
    output.logits.square().mean().backward()
    found = {block.name.partition(".")[0]: block.executor for block in memo.report(model).blocks}
    assert found == {"encoder": Executor.REPLAY, "decoder": Executor.NATIVE}


@pytest.mark.parametrize("verb", [memo.check, memo.rehearse])
def test_what_runs_a_batch_several_times_refuses_caches(verb: Any) -> None:
    cache = DynamicCache()
    with pytest.raises(ArgumentError, match="leave it out"):
        verb(make("llama"), {"input_ids": IDS, "labels": IDS, "past_key_values": cache})
    assert cache.get_seq_length() == 0
