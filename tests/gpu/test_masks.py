"""Attention under spans on a GPU: its kernels, whole steps in bfloat16, and memory far below S x S."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import memo_runtime as memo
from memo_runtime.blocks.spans import dense_mask, layout_of, spans_tensor
from memo_runtime.execution.mixers import varlen
from memo_runtime.execution.mixers.masked import masked_attention
from memo_runtime.integrations import attention_masks
from tests.gpu.models import VOCABULARY, batch, error, step

pytestmark = pytest.mark.gpu

TOKENS = 2000
PLACES = torch.arange(TOKENS)


def starts(*lengths: int) -> torch.Tensor:
    each = torch.tensor(lengths)
    return torch.repeat_interleave(each.cumsum(0) - each, each)


DOCUMENTS = starts(700, 1, 299, 900, 100)
SPANS = {
    "documents": (DOCUMENTS, PLACES + 1),
    "window": ((PLACES - 255).clamp(min=0), PLACES + 1),
    "window in documents": (torch.maximum(PLACES - 255, DOCUMENTS), PLACES + 1),
    "padding in front": (0 * PLACES + 77, torch.where(PLACES >= 77, PLACES + 1, 77)),
    "padding behind": (0 * PLACES, (PLACES + 1).clamp(max=1777)),
    "padding behind a window": ((PLACES - 255).clamp(min=0, max=1777), (PLACES + 1).clamp(max=1777)),
}


def attention_case(name: str, dtype: torch.dtype, depth: int, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    first, end = SPANS[name]
    generator = torch.Generator("cuda").manual_seed(7)
    shapes = ((rows, TOKENS, 8, depth), (rows, TOKENS, 2, depth), (rows, TOKENS, 2, depth))
    made = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64) for shape in shapes]
    given = [one.to(dtype).transpose(1, 2).requires_grad_() for one in made]
    return spans_tensor(first[None], end[None]).cuda(), given


def with_gradients(output: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, given, weights.to(output))]


def gap(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    pairs = list(zip(found, exact, strict=True))
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize(("depth", "rows"), [(64, 3), (128, 1), (256, 1)])
@pytest.mark.parametrize("long", [4096, 500, 1], ids=["varlen", "both", "by document"])
def test_it_is_as_near_to_float64_as_attention_under_the_mask(name, depth, rows, long, monkeypatch):
    monkeypatch.setattr(varlen, "_LONG", long)
    spans, given = attention_case(name, torch.bfloat16, depth, rows)
    wide = [one.detach().double().requires_grad_() for one in given]
    mask = dense_mask(spans, TOKENS)
    with sdpa_kernel(SDPBackend.MATH):
        exact = with_gradients(scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True), wide)
    key, value = (one.repeat_interleave(4, dim=1) for one in given[1:])
    theirs = with_gradients(scaled_dot_product_attention(given[0], key, value, attn_mask=mask), given)
    ours = with_gradients(masked_attention(*given, spans), given)
    assert gap(ours, exact) <= 1.5 * gap(theirs, exact)


@pytest.mark.parametrize("name", SPANS)
def test_in_float32_it_is_attention_under_the_mask(name):
    spans, given = attention_case(name, torch.float32, 64, 3)
    key, value = (one.repeat_interleave(4, dim=1) for one in given[1:])
    mask = dense_mask(spans, TOKENS)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        theirs = with_gradients(scaled_dot_product_attention(given[0], key, value, attn_mask=mask), given)
    assert gap(with_gradients(masked_attention(*given, spans), given), [one.double() for one in theirs]) < 1e-3


@pytest.mark.parametrize("name", ["window", "documents", "padding in front"])
def test_the_varlen_kernel_takes_what_it_is_for(name):
    spans, given = attention_case(name, torch.bfloat16, 64, 3)
    made = varlen.sections_of(layout_of(spans, TOKENS).shared_by(3), *given)
    assert made is not None
    assert [one.piece for one in made] == [None]
    assert made[0].stop == 3 * TOKENS


def gemma(dtype: torch.dtype, *, window: int, blocks: int = 3) -> torch.nn.Module:
    """A Gemma3 shape, two sliding layers of three, on the GPU."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, vocab_size=VOCABULARY, max_position_embeddings=65536,
        sliding_window=window, pad_token_id=0,
        layer_types=["full_attention" if at % 3 == 2 else "sliding_attention" for at in range(blocks)],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).to("cuda", dtype).train()


def packed(rows: int, tokens: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Three documents in each row."""
    data, first = batch(rows, tokens, seed), tokens // 5
    lengths = (first, 2 * first, tokens - 3 * first)
    positions = torch.cat([torch.arange(one) for one in lengths]).cuda()
    return data | {"position_ids": positions.expand(rows, -1)}


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("policy", [{"policy": "recompute"}, {"policy": "tiled", "tile": 512}])
def test_bfloat16_error_of_a_step_is_that_of_the_unwrapped_model(kind, policy, monkeypatch):
    monkeypatch.setattr(attention_masks, "SMALL_MASK", 0)
    ratios = []
    for seed in range(5):
        model = gemma(torch.bfloat16, window=256)
        data = packed(2, 1500, seed) if kind == "packed" else batch(2, 1500, seed)
        reference = copy.deepcopy(model).double()
        with sdpa_kernel(SDPBackend.MATH):
            _, exact = step(reference, data)
        _, plain = step(model, data)
        memo.wrap(model, keep_last=0, loss="native", **policy)
        assert model.config._attn_implementation == attention_masks.NAME
        step(model, data)
        _, found = step(model, data)
        ratios.append(error(found, exact) / error(plain, exact))
        memo.unwrap(model)
    assert statistics.median(ratios) <= 1.1


def peak_of_a_step(window: int, data: dict[str, torch.Tensor]) -> int:
    """Bytes beyond what is there before a steady step."""
    model = gemma(torch.bfloat16, window=window)
    memo.wrap(model, policy="tiled", tile=8192, alpha=0.0)
    step(model, data)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = step(model, data)
    assert torch.isfinite(loss)
    return torch.cuda.max_memory_allocated() - before


def test_windows_at_32768_tokens_take_far_less_than_a_mask_of_all_pairs():
    """1 GiB of booleans, and 2 GiB more where a kernel takes them as numbers; all else is as without any mask."""
    tokens = 32768
    plain = peak_of_a_step(2 * tokens, batch(1, tokens))
    assert peak_of_a_step(1024, packed(1, tokens)) - plain < tokens * tokens // 4
