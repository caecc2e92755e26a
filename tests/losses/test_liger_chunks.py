"""Liger's logits grow with the tokens: where they are too many, tiles that do not run."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memo_runtime.losses import head_loss, liger, linear_cross_entropy, tiles
from memo_runtime.losses.head_loss import Backend
from memo_runtime.losses.tiles import Criterion, Head

WIDTH, VOCABULARY, MIB = 2048, 128_256, 2**20


def chosen(tokens: int, backend: str) -> Backend:
    meta = torch.device("meta")
    head = Head(
        hidden=torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device=meta),
        weight=torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, device=meta),
        bias=None,
        target=torch.empty(tokens, dtype=torch.int64, device=meta),
        compute=torch.bfloat16,
    )
    return head_loss._choose(head, Criterion(), "mean", backend)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    # What a rehearsal of 2,177,792 tokens saw Liger take was 65,536 rows: 15.66 GiB.
    [(2_177_792, 65_536), (129_024, 2048), (129_025, 4096), (1, 1), (127, 4), (0, 0)],
)
def test_its_logits_are_as_large_as_the_hidden_states_or_twice_that(tokens: int, rows: int) -> None:
    assert liger.chunk_bytes(tokens, WIDTH, VOCABULARY, torch.bfloat16) == rows * VOCABULARY * 2


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(1, 1), (2048, 2048), (2092, 2092), (2093, 2048), (5000, 2048), (8192, 2048), (20_001, 2048), (32_768, 2048),
     (65_536, 2048), (129_024, 2048), (129_025, 4096), (2_177_792, 65_536)],
)  # fmt: skip
def test_its_chunks_are_as_large_as_a_tile_where_they_can_be(tokens: int, rows: int) -> None:
    sizes = (tokens, WIDTH, VOCABULARY, torch.bfloat16)
    assert liger.chunk_bytes(*sizes, liger.chunk_constant(*sizes)) == rows * VOCABULARY * 2


@given(st.integers(1, 300_000), st.integers(64, 8192), st.integers(2, 300_000))
def test_no_chunk_is_larger_than_a_tile_unless_all_are(tokens: int, width: int, vocabulary: int) -> None:
    sizes = (tokens, width, vocabulary, torch.bfloat16)

    def fits(constant: int) -> bool:
        return liger.chunk_bytes(*sizes, constant) <= tiles.TILE_BYTES["cuda"]

    factors = range(-(-vocabulary // width), 0, -1)
    assert liger.chunk_constant(*sizes) == next(filter(fits, factors), 1)


@pytest.mark.parametrize("can", [True, False])
def test_it_is_told_how_large_its_chunks_are_where_it_can_be(monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    told: dict[str, object] = {}

    def older(*, accum_dtype: object, **given: object) -> tuple[torch.Tensor, ...]:
        told.update(given)
        return (torch.zeros(()),) * 4

    def newer(*, chunk_mem_const: int = 1, **given: object) -> tuple[torch.Tensor, ...]:
        return older(**given, constant=chunk_mem_const)

    monkeypatch.setattr(liger, "_load", lambda: (newer if can else older, ""))
    head = Head(
        hidden=torch.empty(8192, WIDTH, dtype=torch.bfloat16, device="meta"),
        weight=torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16, device="meta"),
        bias=None,
        target=torch.empty(8192, dtype=torch.int64, device="meta"),
        compute=torch.bfloat16,
    )
    liger.evaluate(head, Criterion(), reduction="mean", wanted=tiles.Wanted(hidden=True))
    assert told.get("constant") == (20 if can else None)
    assert "chunk_mem_const" not in told


def test_auto_leaves_long_sequences_to_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "obstacle", lambda *_, **__: None)
    assert [chosen(tokens, "auto") for tokens in (129_024, 129_025)] == [Backend.LIGER, Backend.TILED]
    assert chosen(2_177_792, "liger") is Backend.LIGER, "it was asked for"


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="no liger-kernel")
@pytest.mark.parametrize("tokens", [32_768, 131_072, 524_288])
def test_what_a_loss_takes_on_a_gpu_is_bounded(tokens: int) -> None:
    hidden = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(VOCABULARY, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, weight, target)
    taken = torch.cuda.max_memory_allocated() - before
    gradients = hidden.nbytes + 4 * weight.numel()
    assert gradients < taken <= gradients + tiles.largest_bytes(VOCABULARY, torch.bfloat16) + 64 * MIB
    loss.backward()
