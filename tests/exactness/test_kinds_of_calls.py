"""Batches whose blocks are called in another way than those of the batches before: with a mask, or without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import memo_runtime as memo
from memo_runtime.errors import BlockFallbackError, PlanInfeasibleError
from memo_runtime.lookup import find_wrapped
from memo_runtime.records import Executor
from memo_runtime.reports import Report
from memo_runtime.wrapping import Wrapped
from tests.exactness.compare import Way, assert_clean, assert_same, model_loss, run_step
from tests.exactness.hand_written import merge_heads, sequence

TOKENS = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=512, **changes)
    return transformers.LlamaForCausalLM(config).double()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config).double()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=TOKENS - 8)
    return transformers.MistralForCausalLM(config).double()


def batch(*, padded: bool, tokens: int = TOKENS, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Block(nn.Module):
    """Attention under a bias or none, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if bias is not None:
            mixed = mixed * mixed.sigmoid()
        x = x + self.out(merge_heads(mixed))
        return x + self.down(functional.gelu(self.up(x)))


class Told(nn.Module):
    """Gives its blocks a bias where the values of its batch ask for one; the first ``spared`` get none."""

    def __init__(self, spared: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.spared = nn.ModuleList(Block() for _ in range(4)), spared
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        bias = torch.zeros(tokens, tokens, dtype=x.dtype).triu(1)[None, None] if x[0, 0, 0] > 0 else None
        for index, block in enumerate(self.blocks):
            x = block(x, bias=bias if index >= self.spared else None)
        return x


def told(*, biased: bool) -> dict[str, Tensor]:
    x = sequence(rows=2, tokens=TOKENS).clone()
    x[0, 0, 0] = 1.0 if biased else -1.0
    return {"x": x}


def output_loss(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    return model(**given).square().mean()


def wrapped_in(model: nn.Module) -> Wrapped:
    found = find_wrapped(model)
    assert found is not None
    return found


def as_planned(model: nn.Module) -> Report:
    """The last step moved, rebuilt and took what its plan says; its report."""
    report = memo.report(model)
    totals = report.totals
    assert not {block.reason for block in report.blocks} - {""}
    assert (totals.bytes_to_host, totals.recomputed_flops) == (
        totals.forecast.bytes_to_host,
        totals.forecast.recomputed_flops,
    )
    assert totals.peak_bytes == totals.forecast.peak_bytes
    return report


WAYS = {
    "recompute": {"policy": "recompute"},
    "memo": {"policy": "memo", "alpha": 0.37},
    "swap": {"policy": "swap"},
    "auto": {"policy": "auto", "keep_last": None, "budget": "1750KiB"},
    "within": {"policy": "recompute", "host_budget": "230KiB"},
    "strict": {"policy": "recompute", "strict": True},
}


@pytest.mark.parametrize("padded_first", [False, True], ids=["padded later", "padded first"])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_batches_that_are_padded_and_others(settings: dict[str, Any], make: Any, padded_first: bool) -> None:
    """Each has a plan of its own, made once, before its first step."""
    plain, wrapped = make(), make()
    way = Way(settings["policy"], settings.get("alpha"))
    memo.wrap(wrapped, **({"keep_last": 0, "loss": "native"} | settings))
    reports: dict[bool, Report] = {}
    for padded in (padded_first, not padded_first, padded_first, not padded_first, not padded_first):
        given = batch(padded=padded)
        assert_same(run_step(wrapped, given, model_loss), run_step(plain, given, model_loss), way)
        reports[padded] = as_planned(wrapped)
        with torch.no_grad():
            wrapped(**batch(padded=not padded))
    assert wrapped_in(wrapped).profiled == 2
    if way.policy != "auto":
        assert reports[True].totals.peak_bytes > reports[False].totals.peak_bytes
    assert_clean(wrapped)


def test_other_lengths_and_numbers_of_sequences_need_no_other_profile() -> None:
    plain, wrapped = llama(), llama()
    way = Way("recompute")
    way.wrap(wrapped)
    for tokens, rows in ((TOKENS, 2), (TOKENS + 24, 2), (TOKENS, 3)):
        for padded in (False, True):
            given = batch(padded=padded, tokens=tokens, rows=rows)
            assert_same(run_step(wrapped, given, model_loss), run_step(plain, given, model_loss), way)
            as_planned(wrapped)
    assert wrapped_in(wrapped).profiled == 2


def test_what_does_not_fit_is_refused_before_its_step() -> None:
    wrapped = llama()
    memo.wrap(wrapped, policy="swap", host_budget="1400KiB", keep_last=0)
    model_loss(wrapped, batch(padded=False)).backward()
    steps = wrapped_in(wrapped).session.steps
    with pytest.raises(PlanInfeasibleError, match=r"1400|1.37 MiB are allowed"):
        model_loss(wrapped, batch(padded=True))
    assert wrapped_in(wrapped).session.steps == steps
    model_loss(wrapped, batch(padded=False)).backward()
    as_planned(wrapped)


def test_micro_batches_of_both_kinds_in_one_step() -> None:
    plain, wrapped = llama(), llama()
    way = Way("memo", 0.37)
    way.wrap(wrapped)
    for _ in range(3):
        for model in (plain, wrapped):
            model.zero_grad()
            for padded in (False, True, False):
                model_loss(model, batch(padded=padded)).backward()
        for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-10, atol=1e-12)
    assert wrapped_in(wrapped).profiled == 2
    assert not [note for note in memo.report(wrapped).notes if "saved other" in note or "was called with" in note]


def test_blocks_by_tiles() -> None:
    plain, wrapped = llama(), llama()
    memo.wrap(wrapped, policy="tiled", tile=16, loss="native")
    for padded in (False, True, False, True):
        given = batch(padded=padded)
        steps = [run_step(model, given, model_loss) for model in (wrapped, plain)]
        assert_same(*steps, Way("tiled"))
        report = memo.report(wrapped)
        assert {block.executor for block in report.blocks} == {Executor.TILED}
        assert report.totals.peak_bytes == report.totals.forecast.peak_bytes
    assert wrapped_in(wrapped).profiled == 2


def test_a_window_that_only_long_batches_reach() -> None:
    """Lengths between the same powers of two, where nothing but the blocks' own arguments tells."""
    plain, wrapped = mistral(), mistral()
    way = Way("recompute")
    way.wrap(wrapped)
    short, long = (batch(padded=False, tokens=tokens) for tokens in (TOKENS - 16, TOKENS - 1))
    for given in (short, long, long, short, long, short):
        assert_same(run_step(wrapped, given, model_loss), run_step(plain, given, model_loss), way)
    as_planned(wrapped)
    assert wrapped_in(wrapped).profiled == 2


@pytest.mark.parametrize("spared", [0, 2])
def test_a_batch_whose_values_tell(spared: int) -> None:
    """The first such step runs its blocks again as a whole, with less on the host than planned, and is right."""
    plain, wrapped = Told(spared), Told(spared)
    way = Way("memo", 0.37)
    way.wrap(wrapped)
    for number, biased in enumerate((False, True, False, True, True, True)):
        given = told(biased=biased)
        assert_same(run_step(wrapped, given, output_loss), run_step(plain, given, output_loss), way)
        report = memo.report(wrapped)
        if number != 1:
            as_planned(wrapped)
            continue
        otherwise = [block for block in report.blocks if "was called with" in block.reason]
        assert len(otherwise) == 4 - spared
        assert {block.executor for block in otherwise} == {Executor.RECOMPUTE}
        assert report.totals.bytes_to_host <= report.totals.forecast.host_bytes
    assert wrapped_in(wrapped).profiled == 2


def test_kinds_that_nothing_foretells_take_turns_by_their_plans() -> None:
    """Where both are known, the plan is exchanged when the first block is called."""
    plain, wrapped = Told(), Told()
    way = Way("memo", 0.37)
    way.wrap(wrapped)
    for biased in (False, True, True):
        run_step(wrapped, told(biased=biased), output_loss)
    for biased in (False, True, False, False, True):
        given = told(biased=biased)
        assert_same(run_step(wrapped, given, output_loss), run_step(plain, given, output_loss), way)
        as_planned(wrapped)
    assert wrapped_in(wrapped).profiled == 2


def test_strict_refuses_calls_that_were_not_foreseen() -> None:
    plain, wrapped = Told(), Told()
    way = Way("memo", 0.37)
    way.wrap(wrapped, strict=True)
    run_step(wrapped, told(biased=False), output_loss)
    with pytest.raises(BlockFallbackError, match="was called with float64\\[4d\\] as its value 1"):
        output_loss(wrapped, told(biased=True))
    wrapped.zero_grad()
    for biased in (False, True, True, False):
        given = told(biased=biased)
        assert_same(run_step(wrapped, given, output_loss), run_step(plain, given, output_loss), way)
        as_planned(wrapped)


def test_a_given_plan_is_not_made_anew() -> None:
    plain, wrapped = llama(), llama()
    given = batch(padded=False)
    plan = memo.plan(memo.profile(wrapped, given), policy="recompute", keep_last=0)
    memo.wrap(wrapped, plan=plan, loss="native")
    for padded in (False, True, False):
        given = batch(padded=padded)
        step = run_step(wrapped, given, model_loss)
        assert_same(step, run_step(plain, given, model_loss), Way("recompute"))
        assert any("was called with" in block.reason for block in memo.report(wrapped).blocks) is padded
        assert memo.report(wrapped).totals.bytes_to_host <= plan.forecast.host_bytes
    assert wrapped_in(wrapped).profiled == 0


def test_a_cache_that_is_empty_or_not_there_is_the_same_way() -> None:
    given = batch(padded=False)
    wrapped = llama()
    Way("recompute").wrap(wrapped)
    for uses in (True, False, True):
        wrapped.config.use_cache = uses
        run_step(wrapped, given, model_loss)
        as_planned(wrapped)
    assert wrapped_in(wrapped).profiled == 1
