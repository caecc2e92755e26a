"""Wrapped Hugging Face decoders whose masks are said in spans: the same step, and no tensor of S x S in it."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import memo_runtime as memo
from memo_runtime.blocks.spans import dense_mask, is_spans
from memo_runtime.integrations import attention_masks
from memo_runtime.integrations.mask_spans import NoSpansError, spans_of
from memo_runtime.records import Executor
from tests.exactness.compare import TOLERANCE, Step, relative_error, run_step
from tests.exactness.models import _DECODER, FAMILIES, Family, text
from tests.execution.test_tiled_families import _MORE

TOKENS = 149
_LONG = {"max_position_embeddings": 512}
_WINDOW = {"sliding_window": 21}
MODELS: dict[str, Family] = {
    **{name: FAMILIES[name] for name in ("llama", "qwen3", "gemma3", "gpt2")},
    **{name: _MORE[name] for name in ("mistral", "gpt-neox", "phi3")},
    "qwen2": Family(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, _DECODER),
}
_CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 512, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mistral": _LONG | _WINDOW, "gemma3": _LONG | _WINDOW, "phi3": _LONG | _WINDOW | {"pad_token_id": 0},
}  # fmt: skip
KINDS = ("right", "left", "packed")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Spans also where the mask would be small."""
    monkeypatch.setattr(attention_masks, "SMALL_MASK", 0)
    monkeypatch.setattr(attention_masks, "_said", set())
    return


def model_of(name: str, **changes: Any) -> Any:
    return MODELS[name].make(**(_CHANGES.get(name, _LONG) | changes))


def batch_of(kind: str, tokens: int = TOKENS) -> dict[str, Tensor]:
    batch = text(rows=3, tokens=tokens, padded=kind == "right", left=kind == "left")
    if kind == "packed":
        whole = torch.arange(tokens)
        batch["position_ids"] = torch.stack([torch.cat((whole[:40], whole[:1], whole[: tokens - 41])),
                                             torch.cat((whole[:9], whole[: tokens - 9])), whole])  # fmt: skip
    return batch


class Squares(TorchDispatchMode):
    """Finds operators that make a tensor of ``tokens`` x ``tokens``."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in _pytree.tree_leaves(out):
            sizes = tuple(one.shape) if isinstance(one, Tensor) else ()
            if all(type(size) is int for size in sizes) and sizes.count(self.tokens) > 1:
                self.found.add(str(func))
        return out


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(**batch, use_cache=False).loss
    return found


def step_and_squares(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Step, set[str]]:
    with Squares(batch["input_ids"].shape[1]) as squares:
        return run_step(model, batch, loss_of), squares.found


def compare(model: Any, batch: dict[str, Tensor], **way: Any) -> memo.Report:
    """Two steps with a plan against one without."""
    want, squares = step_and_squares(model, batch)
    assert squares or "position_ids" not in batch
    memo.wrap(model, strict=True, keep_last=0, loss="native", **way)
    for _ in range(2):
        got, squares = step_and_squares(model, batch)
        assert not squares
        assert abs(float(got.loss - want.loss)) <= TOLERANCE * abs(float(want.loss))
        assert relative_error(got.gradients, want.gradients) <= TOLERANCE
    report = memo.report(model)
    memo.unwrap(model)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "sdpa"
    again, _ = step_and_squares(model, batch)
    assert torch.equal(again.loss, want.loss)
    return report


# ---- mask functions


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_spans_stand_for_the_masks_of_the_unwrapped_model(name, kind, monkeypatch):
    """And plain causal attention has none, as before."""
    model, batch, seen = model_of(name), batch_of(kind, 61), []
    own, ours = masking_utils.sdpa_mask, attention_masks.mask

    def mask(**given: Any) -> Tensor | None:
        found, theirs = ours(**given), own(**given)
        seen.append(found)
        assert (found is None) == (theirs is None)
        if found is not None:
            assert theirs is not None
            assert is_spans(found)
            assert torch.equal(dense_mask(found, 61), theirs)
        return found

    monkeypatch.setattr(attention_masks, "mask", mask)
    installed = attention_masks.install_masks(model)
    assert installed.active
    with torch.no_grad():
        got = model(**batch, use_cache=False).logits
        installed.remove()
        want = model(**batch, use_cache=False).logits
    assert seen
    assert (got - want).norm() <= TOLERANCE * want.norm()


def test_chunks_are_spans_in_documents_too():
    chunked = masking_utils.chunked_causal_mask_function(7, torch.tensor([0, 3]))
    positions = torch.stack([torch.cat((torch.arange(20), torch.arange(17))), torch.arange(37)])
    packed = masking_utils.packed_sequence_mask_function(masking_utils.find_packed_sequence_indices(positions))
    function = masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(chunked, positions), packed
    )
    for one in (chunked, function):
        first, end = spans_of(one, 2, 37, torch.device("cpu"))
        want = masking_utils.sdpa_mask(2, 37, 37, mask_function=one, allow_is_causal_skip=False)
        assert torch.equal(dense_mask(torch.stack((first, end), -1).unsqueeze(1), 37), want)


def _renamed(function: Any, name: str) -> Any:
    function.__qualname__ = name
    return function


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (masking_utils.or_masks(masking_utils.causal_mask_function), "or_masks"),
        (masking_utils.padding_mask_function(torch.tensor([[1, 1, 0, 1, 1]]).bool()), "between tokens"),
        # Another release that means something else by the same name.
        (_renamed(lambda b, h, q, k: k < q, "causal_mask_function"), "not what it says"),
        (_renamed(lambda b, h, q, k: k < q, "sliding_window_overlay.<locals>.inner_mask"), "not as they are known"),
        (masking_utils.remap_positions_for_packed_sequence(
            masking_utils.causal_mask_function, torch.tensor([[0, 1, 0, 1, 2]])), "positions"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(function, reason):
    with pytest.raises(NoSpansError, match=reason):
        spans_of(function, 1, 5, torch.device("cpu"))


# ---- steps


@pytest.mark.parametrize(("name", "kind"), [("gemma3", "left"), ("mistral", "packed")])
def test_a_step_by_replay_is_the_unwrapped_one(name, kind):
    report = compare(model_of(name), batch_of(kind), policy="memo", alpha=0.9)
    assert {block.executor for block in report.blocks} == {Executor.REPLAY}
    assert report.totals.recomputed_flops > 0


@pytest.mark.slow
def test_a_step_by_tiles_is_the_unwrapped_one():
    report = compare(model_of("mistral"), batch_of("packed", 61), policy="tiled", tile=32)
    assert {block.executor for block in report.blocks} == {Executor.TILED}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"policy": "swap"}, {"policy": "recompute"}, {"policy": "tiled", "tile": 64}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_steps_of_all_families_are_the_unwrapped_ones(name, kind, policy, monkeypatch):
    norm = transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm
    # Its own goes down to float32, in which no sum over tiles is that of the whole to 1e-12.
    monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))
    compare(model_of(name), batch_of(kind), **policy)


def test_masks_that_are_small_are_made_as_they_were(monkeypatch):
    monkeypatch.setattr(attention_masks, "SMALL_MASK", 3 * TOKENS**2 + 1)
    model, batch = model_of("llama"), batch_of("right")
    want = run_step(model, batch, loss_of)
    memo.wrap(model, policy="swap", loss="native")
    got = run_step(model, batch, loss_of)
    assert all(torch.equal(got.gradients[name], one) for name, one in want.gradients.items())


@pytest.mark.parametrize("what", ["dropout", "holes"])
def test_what_spans_cannot_say_gets_the_mask_and_is_said_once(what, caplog):
    changes = {"attention_dropout": 0.5} if what == "dropout" else {}
    model, batch = model_of("llama", **changes), batch_of("right", 37)
    if what == "holes":
        batch["attention_mask"][0, 20] = 0
    want = run_step(model, batch, loss_of)
    with caplog.at_level(logging.WARNING, logger="memo_runtime"):
        memo.wrap(model, policy="swap", loss="native")
        got = run_step(model, batch, loss_of)
    assert torch.equal(got.loss, want.loss)
    said = [record.message for record in caplog.records if "37 x 37" in record.message]
    assert len(said) == 1
    assert {"dropout": "dropout", "holes": "padding between tokens"}[what] in said[0]


# ---- the setting


def test_the_setting_comes_back_and_copies_never_have_it():
    model = model_of("llama")
    before = model.config.to_json_string()
    memo.wrap(model)
    assert model.config._attn_implementation == attention_masks.NAME
    for other in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert other.config._attn_implementation == "sdpa"
        assert type(other.config._attn_implementation) is str
    assert model.config.to_json_string() == before
    memo.unwrap(model)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.config._attn_implementation) is str


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_what_the_user_sets_after_wrap_stays():
    model = model_of("llama")
    memo.wrap(model)
    model.set_attn_implementation("eager")
    memo.unwrap(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("chosen", ["eager", "flex_attention"])
def test_another_choice_of_the_users_is_respected(chosen):
    model = model_of("llama", attn_implementation=chosen)
    memo.wrap(model)
    assert model.config._attn_implementation == chosen


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_encoders_and_cross_attention_are_left_alone(name):
    model = FAMILIES[name].make()
    memo.wrap(model)
    assert model.config._attn_implementation == "sdpa"
    memo.unwrap(model)


def test_models_that_ask_for_sdpa_by_name_are_left_alone():
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    assert not attention_masks.install_masks(transformers.FalconForCausalLM(config)).active


def test_towers_keep_their_own_setting():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config=shape | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97},
        vision_config=shape | {"image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).double()
    installed = attention_masks.install_masks(model)
    assert config.text_config._attn_implementation == config._attn_implementation == attention_masks.NAME
    assert config.vision_config._attn_implementation == "sdpa"
    installed.remove()
    assert {one._attn_implementation for one in (config, config.text_config, config.vision_config)} == {"sdpa"}


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_generate_with_a_cache_says_the_same(name):
    model = model_of(name).eval()
    batch = {key: one for key, one in batch_of("left", 40).items() if key != "labels"}
    want = model.generate(**batch, max_new_tokens=6, do_sample=False)
    memo.wrap(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), want)


def test_attention_weights_are_refused_as_before():
    model, batch = model_of("llama"), batch_of("right", 37)
    want = model(**batch, use_cache=False, output_attentions=True).attentions
    memo.wrap(model, policy="swap")
    assert model(**batch, use_cache=False, output_attentions=True).attentions == want
