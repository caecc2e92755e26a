"""Masks as spans: the pieces that attention is computed in, and what is remembered of them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from memo_runtime.blocks import spans as module
from memo_runtime.blocks.spans import Kind, dense_mask, is_spans, layout_of, spans_tensor

TOKENS = 60
PLACES = torch.arange(TOKENS)


def documents(*lengths: int) -> Tensor:
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    return torch.repeat_interleave(starts, torch.tensor(lengths))


ZERO = torch.zeros_like(PLACES)
PADDED = torch.where(PLACES >= 7, PLACES + 1, 7)
#: (first keys, ends) by name.
CASES: dict[str, tuple[Tensor, Tensor]] = {
    "causal": (ZERO, PLACES + 1),
    "window": ((PLACES - 8).clamp(min=0), PLACES + 1),
    "documents": (documents(20, 1, 1, 38), PLACES + 1),
    "window in documents": (torch.maximum(PLACES - 8, documents(20, 5, 35)), PLACES + 1),
    "padding behind": (ZERO, (PLACES + 1).clamp(max=41)),
    "padding behind a window": ((PLACES - 8).clamp(min=0, max=41), (PLACES + 1).clamp(max=41)),
    "padding in front": (ZERO + 7, PADDED),
    "padding on both sides": (ZERO + 7, PADDED.clamp(max=50)),
    "full": (ZERO, ZERO + TOKENS),
    "window both ways": ((PLACES - 8).clamp(min=0), (PLACES + 9).clamp(max=TOKENS)),
    "nothing": (ZERO, ZERO),
}


@pytest.mark.parametrize("name", CASES)
def test_pieces_hold_every_visible_pair_once_and_no_query_that_sees_nothing(name):
    first, end = CASES[name]
    spans = spans_tensor(first[None], end[None])
    mask = dense_mask(spans, TOKENS)[0, 0]
    covered = torch.zeros(TOKENS, TOKENS, dtype=torch.int64)
    layout = layout_of(spans, TOKENS)
    for piece in layout.pieces:
        queries, keys = slice(piece.start, piece.stop), slice(piece.first, piece.end)
        shown = mask[queries, keys]
        assert shown.any(1).all()
        if piece.kind is Kind.CAUSAL:
            assert torch.equal(shown, torch.ones_like(shown).tril())
            assert shown.shape[0] == shown.shape[1]
        elif piece.kind is Kind.FULL:
            assert shown.all()
        covered[queries, keys] += shown
    assert torch.equal(covered, mask.long())
    assert layout.visible == mask.sum()


@pytest.mark.parametrize(
    ("name", "count", "window"),
    [("causal", 1, None), ("window", 1, 9), ("documents", 4, None), ("window in documents", 3, 9),
     ("padding in front", 1, None)],
)  # fmt: skip
def test_documents_and_windows_are_known_as_such(name, count, window):
    first, end = CASES[name]
    found = layout_of(spans_tensor(first[None], end[None]), TOKENS).documents
    assert found is not None
    assert (len(found.bounds), found.window) == (count, window)


@pytest.mark.parametrize("name", ["padding behind", "full", "window both ways"])
def test_what_is_none_is_not_taken_for_documents(name):
    first, end = CASES[name]
    assert layout_of(spans_tensor(first[None], end[None]), TOKENS).documents is None


def test_rows_that_are_equal_share_their_pieces():
    first = torch.stack([ZERO, documents(20, 40), documents(20, 40)])
    pieces = layout_of(spans_tensor(first, (PLACES + 1).expand(3, -1)), TOKENS).pieces
    assert [(one.above, one.below) for one in pieces] == [(0, 1), (1, 3), (1, 3)]


def test_pieces_of_a_window_are_many_but_their_work_is_not():
    tokens, window = 1 << 17, 1024
    places = torch.arange(tokens)
    layout = layout_of(spans_tensor((places - window + 1).clamp(min=0)[None], places[None] + 1), tokens)
    assert layout.visible < tokens * window
    assert sum(one.pairs for one in layout.pieces) < 2 * layout.visible
    assert max(one.pairs for one in layout.pieces) <= 1 << 24


def test_a_layout_is_read_once_and_again_when_its_memory_is_written_or_gone(monkeypatch):
    made = []
    own = module.make_layout
    monkeypatch.setattr(module, "make_layout", lambda first, end: made.append(1) or own(first, end))
    spans = spans_tensor(*(one[None] for one in CASES["causal"]))
    assert layout_of(spans, TOKENS) is layout_of(spans.detach(), TOKENS)
    assert len(made) == 1
    spans[0, 0, 30:, 0] = 30
    assert len(layout_of(spans, TOKENS).pieces) == 2
    del spans
    gc.collect()
    for name in CASES:  # the allocator gives the same address again
        layout = layout_of(spans_tensor(*(one[None] for one in CASES[name])), TOKENS)
        assert layout.visible == dense_mask(spans_tensor(*(one[None] for one in CASES[name])), TOKENS).sum()


def test_no_other_mask_is_taken_for_spans():
    spans = spans_tensor(*(one[None] for one in CASES["causal"]))
    assert is_spans(spans)
    assert spans.shape == (1, 1, TOKENS, 2)
    assert not any(is_spans(one) for one in (None, dense_mask(spans, TOKENS), spans.double(), spans[0], spans.long()))
