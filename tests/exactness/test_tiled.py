"""``memo.wrap(policy="tiled")`` against the model as it is, in float64, to 1e-12, with the trade to the byte."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime import checking
from memo_runtime.errors import BlockFallbackError, HostLimitError, PlanInfeasibleError, ProfileError
from memo_runtime.execution import tiled_mixing
from memo_runtime.lookup import find_wrapped
from memo_runtime.persist import load_plan, save
from memo_runtime.records import Executor
from tests.capture.blocks import DocumentMask, LearnedPositions, StraightThrough
from tests.exactness import hand_written
from tests.exactness.compare import (
    TOLERANCE,
    Step,
    assert_clean,
    assert_trade,
    model_loss,
    output_loss,
    relative_error,
    run_step,
)
from tests.exactness.hand_written import WIDTH
from tests.exactness.models import FAMILIES
from tests.execution.test_tiled_families import _MORE, _NO_DROPOUT

FAMILIES_BY_TILES = (
    "llama", "qwen3", "gpt2", "gemma3", "bert", "vit", "t5", "llama-eager", "olmo", "phi3", "gpt-neox",
)  # fmt: skip
TILED: dict[str, Any] = {"policy": "tiled", "tile": 8, "alpha": 0.5, "keep_last": 0, "loss": "native"}


def stack(*kinds: type[nn.Module]) -> nn.Module:
    """Two blocks unless they are named: capturing one takes seconds. Three show what is under way at once."""
    torch.manual_seed(0)
    return hand_written.Stack(*(kind() for kind in kinds or (hand_written.Attention,) * 2)).double()


def batch_of(tokens: int = 17, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, tokens, WIDTH, generator=generator, dtype=torch.float64)}


def assert_close(got: Step, want: Step) -> None:
    assert abs(float(got.loss - want.loss)) <= TOLERANCE * abs(float(want.loss))
    assert relative_error(got.gradients, want.gradients) <= TOLERANCE


def assert_tiled(
    model: nn.Module, batch: Mapping[str, Any], loss_of: Any = output_loss, **changes: Any
) -> memo.Report:
    """Two steps by tiles are those of the model as it is, and do what the plan says."""
    want = run_step(model, batch, loss_of)
    memo.wrap(model, **(TILED | changes))
    for _ in range(2):
        assert_close(run_step(model, batch, loss_of), want)
    report = memo.report(model)
    assert {block.executor for block in report.blocks} == {Executor.TILED}
    assert_trade(model)
    totals = report.totals
    assert (totals.stash_peak_bytes, totals.host_bytes) == (
        totals.forecast.stash_peak_bytes,
        totals.forecast.host_bytes,
    )
    assert_clean(model)
    return report


@pytest.mark.parametrize(
    ("blocks", "alpha", "keep_last", "tokens", "tile"),
    [
        pytest.param(3, 0.0, 0, 17, 5, marks=pytest.mark.slow), (3, 0.5, 1, 17, 4), (3, 0.0, 2, 17, 5),
        (2, 1.0, 0, 16, 4), (2, 0.5, 2, 17, 17), (2, 0.3, 0, 17, 100),
    ],
)  # fmt: skip
def test_a_model_by_tiles(blocks, alpha, keep_last, tokens, tile):
    model = stack(*[hand_written.Attention] * blocks)
    report = assert_tiled(model, batch_of(tokens), alpha=alpha, keep_last=keep_last, tile=tile)
    assert {block.attention for block in report.blocks} == {("cpu",)}
    assert [block.bytes_to_host > 0 for block in report.blocks] == [True] * (blocks - keep_last) + [False] * keep_last
    assert all(block.recomputed_flops > 0 for block in report.blocks)
    assert "tiled" in str(report)
    assert "cpu" in str(report)


@pytest.mark.parametrize("kind", [
    hand_written.TwoMixers,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in (hand_written.BufferedMask, hand_written.EagerAttention)),
])  # fmt: skip
def test_other_blocks(kind):
    assert_tiled(stack(kind, kind).eval(), batch_of())  # tiles draw other dropout masks


@pytest.mark.slow
def test_experts_that_are_declared():
    """Every block by tiles, and the trade to the byte: choices of the router stay on the device."""
    model = FAMILIES["mixtral"].make()
    for layer in model.model.layers:
        assert memo.token_wise(layer.mlp) is layer.mlp
    assert_tiled(model, FAMILIES["mixtral"].batch(rows=3, tokens=17), model_loss)


def test_a_module_that_mixes_where_it_was_declared_runs_in_another_way():
    model = stack(hand_written.Squeeze, hand_written.Squeeze)
    for block in model.blocks:
        memo.token_wise(block)
    want = run_step(model, batch_of(), output_loss)
    memo.wrap(model, **TILED)
    assert_close(run_step(model, batch_of(), output_loss), want)
    for block in memo.report(model).blocks:
        assert block.executor is not Executor.TILED
        assert "memo.token_wise block: it does not run" in block.reason or "mixes tokens" in block.reason


def test_a_word_for_what_is_no_module():
    with pytest.raises(TypeError, match=r"memo\.token_wise takes a module"):
        memo.token_wise("mlp")


def test_what_a_profile_and_a_plan_file_say_of_tiles(tmp_path):
    model, batch = stack(), batch_of()
    want = run_step(model, batch, output_loss)
    profile = memo.profile(model, batch, tiles=True)
    planned = memo.plan(profile, policy="tiled", tile=8, alpha=0.5, keep_last=0)
    save(planned, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == planned
    assert "tiled" in str(planned)
    memo.wrap(model, plan=tmp_path / "plan.json", loss="native")
    assert_close(run_step(model, batch, output_loss), want)
    assert_trade(model)


def test_everything_is_chosen_within_the_budgets():
    model, batch = stack(*[hand_written.Attention] * 3), batch_of(64)
    want = run_step(model, batch, output_loss)
    profile = memo.profile(model, batch, tiles=True)
    loose = memo.plan(profile, policy="tiled", budget="1GiB")
    assert [block.alpha for block in loose.blocks] == [1.0] * 3
    assert loose.forecast.host_bytes == 0
    needed = memo.plan(profile, policy="tiled", alpha=0.0, keep_last=0, tile=8).forecast.peak_bytes
    tight = memo.plan(profile, policy="tiled", budget=needed, tile=8)
    assert tight.forecast.peak_bytes <= needed
    assert tight.forecast.host_bytes > 0
    with pytest.raises(PlanInfeasibleError, match="short by"):
        memo.plan(profile, policy="tiled", budget=needed // 2)
    with pytest.raises(HostLimitError, match="host_budget"):
        memo.plan(profile, policy="tiled", budget=needed, host_budget=4096, keep_last=0)
    memo.wrap(model, policy="tiled", budget=needed, tile=8, loss="native")
    assert_close(run_step(model, batch, output_loss), want)
    assert memo.report(model).totals.peak_bytes <= needed


def test_blocks_that_cannot_fall_back_and_say_why(caplog):
    model, batch = stack(hand_written.Attention, StraightThrough, StraightThrough), batch_of()
    want = run_step(model, batch, output_loss)
    memo.wrap(model, **TILED, blocks=list(model.blocks))
    for _ in range(2):
        assert_close(run_step(model, batch, output_loss), want)
    report = memo.report(model)
    assert report.blocks[0].executor is Executor.TILED
    for block in report.blocks[1:]:
        assert block.executor in (Executor.REPLAY, Executor.RECOMPUTE)
        assert "autograd.Function 'Round'" in block.reason
    assert sum("Round" in record.getMessage() for record in caplog.records) == 1
    assert_clean(model)


def test_strict_raises_before_the_first_step():
    model, batch = stack(hand_written.Attention, StraightThrough), batch_of()
    memo.wrap(model, **TILED, strict=True, blocks=list(model.blocks))
    with pytest.raises(BlockFallbackError, match=r"autograd\.Function 'Round'"):
        model(**batch)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("strict", [False, True])
def test_a_hook_that_comes_later_is_obeyed(strict):
    """A block that was captured and cannot be any more: as it is in one step, another way from the next on."""
    model, batch = stack(), batch_of()
    memo.wrap(model, **TILED, strict=strict)
    run_step(model, batch, output_loss)
    model.blocks[1].merge.register_forward_hook(lambda module, args, out: 2 * out)
    if strict:
        with pytest.raises(BlockFallbackError, match=r"cannot take policy 'tiled'.*hooks of inner modules"):
            run_step(model, batch, output_loss)
        return
    plain = memo.unwrap(copy.deepcopy(model))
    want = run_step(plain, batch, output_loss)
    assert_close(run_step(model, batch, output_loss), want)
    assert memo.report(model).blocks[1].executor is Executor.NATIVE
    assert_close(run_step(model, batch, output_loss), want)
    report = memo.report(model)
    assert report.blocks[1].executor is Executor.REPLAY
    assert "hooks of inner modules" in report.blocks[1].reason
    assert report.blocks[0].executor is Executor.TILED


def test_what_wrap_promises():
    """Copies, evaluation, a graph that is kept, accumulation, a step that is given up, unwrapping in between."""
    model, batch = stack(), batch_of()
    plain = copy.deepcopy(model)
    want = run_step(plain, batch, output_loss)
    names = list(model.state_dict())
    memo.wrap(model, **TILED)
    assert_close(run_step(model, batch, output_loss), want)
    assert list(model.state_dict()) == names
    assert_close(run_step(copy.deepcopy(model), batch, output_loss), want)
    with torch.no_grad():
        assert torch.equal(model(**batch)[0], plain(**batch)[0])
    loss = output_loss(model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: parameter.grad / 2 for name, parameter in model.named_parameters()}
    assert relative_error(twice, want.gradients) <= TOLERANCE
    model.zero_grad()
    assert_clean(model)  # though the loss is still there
    output_loss(model, batch)  # no backward
    loss = output_loss(model, batch)
    memo.unwrap(model)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_error(found, want.gradients) <= TOLERANCE


def test_lora_with_its_adapter_switched_between_steps():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "merge"], init_lora_weights=False)
    model = peft.get_peft_model(stack(), config).double()
    batch = batch_of()
    want = run_step(model, batch, output_loss)
    with model.disable_adapter():
        plain = output_loss(model, batch)
    memo.wrap(model, **TILED)
    assert_close(run_step(model, batch, output_loss), want)
    assert_trade(model)  # attention of the first block needs no gradient, and its result stays on the device
    assert memo.report(model).blocks[0].bytes_kept > memo.report(model).blocks[1].bytes_kept
    with model.disable_adapter():
        assert abs(float(output_loss(model, batch) - plain)) <= TOLERANCE * abs(float(plain))
    assert_close(run_step(model, batch, output_loss), want)
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}


def test_an_error_in_the_middle_of_a_block(monkeypatch):
    """The step is lost, nothing of it is held, and the next one is as if it had never been."""
    model, batch = stack(), batch_of()
    want = run_step(model, batch, output_loss)
    memo.wrap(model, **TILED)
    run_step(model, batch, output_loss)
    places, kinds = ("attention_forward", "attention_backward"), (KeyboardInterrupt, RuntimeError)
    for where, kind in itertools.product(places, kinds):
        with monkeypatch.context() as patch:
            patch.setattr(tiled_mixing, where, failing_second(getattr(tiled_mixing, where), kind))
            with pytest.raises(kind):
                run_step(model, batch, output_loss)
        model.zero_grad()
        gc.collect()
        assert_clean(model)
        assert_close(run_step(model, batch, output_loss), want)
        assert_trade(model)


def failing_second(original: Any, kind: type[BaseException]) -> Any:
    calls: list[int] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise kind("in the second block")
        return original(*args, **kwargs)

    return failing


def test_a_check_by_tiles():
    result = memo.check(stack(), batch_of(), policy="tiled", tile=8, alpha=0.5)
    assert result.ok
    assert result.report.totals.recomputed_flops > 0


class Trained(nn.Module):
    """A stack with dropout in front of it and inside, and a loss in training alone, as models have that generate."""

    def __init__(self, dropout: float, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, dtype=torch.float64) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.dropout(x, 0.2, self.training)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean() if self.training else {"tokens": x.argmax(-1)}


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_a_check_of_tiles_that_draw_dropout_has_their_blocks_in_evaluation_mode(dropout):
    """Their masks are not those of the model as it is, so a step of the one says nothing about a step of the other."""
    model, x = Trained(dropout).train(), torch.randn(2, 24, 16, dtype=torch.float64)
    result = memo.check(model, x, policy="tiled", tile=8)
    assert {block.executor for block in result.report.blocks} == {Executor.TILED}
    assert result.ok, result
    assert ["in evaluation mode" in remark for remark in result.remarks] == [True] * bool(dropout)
    assert all(remark in str(result) for remark in result.remarks)
    assert all(module.training for module in model.modules())
    drawn = memo.wrap(copy.deepcopy(model), policy="tiled", tile=8)
    drawn(x).backward()
    assert any("seeds of their own" in note for note in memo.report(drawn).notes) == bool(dropout)


class NarrowNorm(nn.Module):
    """Float32 in between where ``narrow``, its weight's gradient too."""

    narrow = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(16, dtype=torch.float64))
        self.up, self.down = (nn.Linear(*pair, dtype=torch.float64) for pair in ((16, 32), (32, 16)))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.narrow else x.dtype
        normed = nn.functional.layer_norm(x.to(dtype), (16,), self.weight.to(dtype)).to(x.dtype)
        return x + self.down(nn.functional.gelu(self.up(normed)))


class WideNorm(NarrowNorm):
    narrow = False


class AlwaysDrops(WideNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.2, training=True)


def test_a_check_of_tiles_that_draw_dropout_in_evaluation_mode_too_is_refused():
    model, x = nn.Sequential(*(AlwaysDrops() for _ in range(2))), torch.randn(2, 24, 16, dtype=torch.float64)
    with pytest.raises(ProfileError, match=r"draw dropout in evaluation mode too.*policy='replay'"):
        memo.check(model, x, policy="tiled", tile=8)


def test_a_check_in_float64_of_blocks_that_compute_in_float32_in_between():
    model, x = nn.Sequential(*(NarrowNorm() for _ in range(2))), torch.randn(2, 40, 16, dtype=torch.float64)
    result = memo.check(model, x, policy="tiled", tile=8)
    assert result.ok, result
    assert 1e-12 < result.gradient_error < 1e-5 == result.bound
    assert "with the bound of float32" in str(result)
    swapped = memo.check(model, x, policy="swap")
    assert (swapped.bound, swapped.remarks) == (1e-12, ())


def test_a_check_in_float64_of_blocks_that_do_not_is_not_excused(monkeypatch):
    model, x = nn.Sequential(*(WideNorm() for _ in range(2))), torch.randn(2, 40, 16, dtype=torch.float64)
    assert memo.check(model, x, policy="tiled", tile=8).gradient_error < 1e-12
    run = checking._run

    def wrong(model: nn.Module, *given: Any) -> Any:
        loss, gradients = run(model, *given)
        off = 1e-6 * (find_wrapped(model) is not None)
        return loss, {name: gradient * (1 + off) for name, gradient in gradients.items()}

    monkeypatch.setattr(checking, "_run", wrong)
    result = memo.check(model, x, policy="tiled", tile=8)
    assert not result.ok
    assert (result.bound, result.remarks) == (1e-12, ())


def test_a_check_under_autocast():
    """Parameters in float32, products in bfloat16: the error is compared with that of the unwrapped model."""
    model = nn.Sequential(*(WideNorm().float() for _ in range(2)))
    with torch.autocast("cpu", torch.bfloat16):
        result = memo.check(model, torch.randn(2, 40, 16), policy="tiled", tile=8)
    assert result.ok, result
    assert result.bound > 1
    assert "with the bound of bfloat16" in str(result)


def test_packed_documents():
    batch = batch_of() | {"documents": torch.tensor([[0] * 6 + [1] * 11] * 3)}
    assert_tiled(stack(DocumentMask, DocumentMask), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", *FAMILIES_BY_TILES])
def test_a_family(name, monkeypatch):
    """Mistral has a sliding window of six tokens."""
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm
    # Gemma's norms compute in float32, where sums over tiles differ in the last bits of float32.
    monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))
    family = (FAMILIES | _MORE)[name]
    model = family.make(**_NO_DROPOUT.get(name, {}))
    batch = family.batch(rows=3, tokens=17)
    loss_of = model_loss if "labels" in batch else output_loss
    assert_tiled(model, batch, loss_of)


def test_lengths_and_batch_sizes_that_follow_each_other():
    model = stack()
    plain = copy.deepcopy(model)
    memo.wrap(model, **TILED)
    for tokens, rows in ((17, 3), (25, 3), (17, 1), (17, 3)):
        batch = batch_of(tokens, rows)
        assert_close(run_step(model, batch, output_loss), run_step(plain, batch, output_loss))
        assert_trade(model)


class FirstOfResults(hand_written.Stack):
    """Blocks yield a number beside their result."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, tokens, _ = block(x)
            assert (type(tokens), tokens) == (int, x.shape[1])
        return x


def test_positions_that_are_made_of_a_parameter_have_the_length_of_each_call():
    """Asked for its bytes, such a value once fixed its capture to the first length."""
    torch.manual_seed(0)
    model = FirstOfResults(LearnedPositions(), LearnedPositions()).double()
    plain = copy.deepcopy(model)
    memo.wrap(model, **TILED)
    for tokens in (19, 27, 11):  # one token more or less would make another last tile, which is traced anew
        assert_close(
            run_step(model, batch_of(tokens), output_loss), run_step(plain, batch_of(tokens), output_loss)
        )
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}


class ChangesResults(nn.Module):
    """Changes what each block yields in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(hand_written.Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x.mul_(2)
        return x


def test_results_may_be_changed_in_place():
    torch.manual_seed(0)
    model = ChangesResults().double()
    want = run_step(copy.deepcopy(model), batch_of(), output_loss)
    memo.wrap(model, **TILED)
    assert_close(run_step(model, batch_of(), output_loss), want)
    assert {block.executor for block in memo.report(model).blocks} == {Executor.TILED}
