"""Masks as spans: which keys a query sees, as the first of them and the one after the last.

A mask of S x S numbers says for every pair what two numbers for each query say as well, wherever a query sees a run of
keys: causal, in a sliding window, up to padding, inside its own document, and any of these together.

    query     0  1  2  3 | 4  5  6         two documents, window of 3
    first     0  0  0  1 | 4  4  4
    end       1  2  3  4 | 5  6  7

From the spans follow the pieces that attention is computed in. A query that sees nothing is in none.

    causal   as many keys as queries, each sees those up to itself          a document, or its first window
    full     every query sees all keys of the piece                         queries behind the last key (padding)
    band     what is left: queries in chunks, with a mask of the chunk      a sliding window
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memo_runtime.recent import Recent

#: Masks of one chunk of a band have at most this many elements.
_MAX_MASK = 1 << 24
#: Queries of a chunk: about half of what they see, so that a third of its scores are masked, within these bounds.
_CHUNK = (64, 4096)


class Kind(Enum):
    """What is known of a piece; see the module's docstring."""

    CAUSAL = auto()
    FULL = auto()
    BAND = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [start, stop) of rows [above, below) with keys [first, end): computed in one call."""

    kind: Kind
    above: int
    below: int
    start: int
    stop: int
    first: int
    end: int

    @property
    def pairs(self) -> int:
        """Queries times keys that the call computes scores of; half of them where it is causal."""
        pairs = (self.below - self.above) * (self.stop - self.start) * (self.end - self.first)
        return pairs // 2 if self.kind is Kind.CAUSAL else pairs


@dataclass(frozen=True, slots=True)
class Documents:
    """What varlen kernels take: documents of each row, causal, within ``window`` keys if that is not None.

    Args:
        bounds: (row, start, stop), in order; queries that see nothing are in none.
        window: keys that a query sees at most, itself counted.
    """

    bounds: tuple[tuple[int, int, int], ...]
    window: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """How attention under some spans is computed.

    Args:
        pieces: all that has to be computed; keys may be in several.
        documents: the same as documents, where that is all there is to say.
        visible: pairs of a query and a key that it sees, of one head.
        remembered: what kernels have made of it.
    """

    pieces: tuple[Piece, ...]
    documents: Documents | None
    visible: int
    remembered: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def shared_by(self, rows: int) -> Layout:
        """Of one row: the same for ``rows`` of them."""
        if rows not in self.remembered:
            self.remembered[rows] = self._shared_by(rows)
        found: Layout = self.remembered[rows]
        return found

    def _shared_by(self, rows: int) -> Layout:
        pieces = tuple(replace(piece, below=rows) for piece in self.pieces)
        documents = self.documents
        if documents is not None:
            bounds = tuple((row, start, stop) for row in range(rows) for _, start, stop in documents.bounds)
            documents = Documents(bounds, documents.window)
        return Layout(pieces, documents, self.visible * rows)

    @property
    def overlaps(self) -> bool:
        """Some keys are in several pieces, so their gradients are sums."""
        reached: dict[int, int] = {}
        for piece in self.pieces:
            if piece.first < reached.get(piece.above, 0):
                return True
            reached[piece.above] = max(piece.end, reached.get(piece.above, 0))
        return False


def spans_tensor(first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """First keys and ends [B, S] as one tensor [B, 1, S, 2], shaped like the mask in whose place it goes."""
    return torch.stack((first, end), dim=-1).to(torch.int32).unsqueeze(1)


def is_spans(mask: torch.Tensor | None) -> bool:
    """``mask`` is none of S x S; no mask is of 32-bit integers otherwise."""
    return mask is not None and mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def dense_mask(spans: torch.Tensor, keys: int) -> torch.Tensor:
    """The boolean mask [B, 1, S, keys] that ``spans`` stand for."""
    places = torch.arange(keys, device=spans.device)
    return (places >= spans[..., :1]) & (places < spans[..., 1:])


# ---- the layout of some spans, remembered while their memory lives

_LAYOUTS: Recent[tuple[StorageWeakRef, Layout]] = Recent(16)


def _identity(spans: torch.Tensor, keys: int) -> tuple[object, ...]:
    storage = spans.untyped_storage()
    return storage._cdata, spans.storage_offset(), spans.shape, spans.stride(), spans._version, keys


def layout_of(spans: torch.Tensor, keys: int) -> Layout:
    """The layout of attention over ``keys`` keys under ``spans``.

    Reading spans of a GPU waits for it, so each is read once. What is remembered holds no memory of it; the weak
    reference keeps its address from being given to another storage.
    """
    identity = _identity(spans, keys)
    found = _LAYOUTS.get(identity)
    if found is not None:
        return found[1]
    read = spans.detach().to("cpu", torch.int64)[:, 0].clamp(min=0, max=keys)
    layout = make_layout(read[..., 0], read[..., 1])
    _LAYOUTS.put(identity, (StorageWeakRef(spans.untyped_storage()), layout))
    return layout


def make_layout(first: torch.Tensor, end: torch.Tensor) -> Layout:
    """The layout of spans [B, S] in the CPU's memory."""
    pieces: list[Piece] = []
    visible, above = 0, 0
    for row in range(len(first)):
        visible += int((end[row] - first[row]).clamp(min=0).sum())
        if row + 1 < len(first) and torch.equal(first[row], first[row + 1]) and torch.equal(end[row], end[row + 1]):
            continue
        pieces.extend(_pieces_of(first[row], end[row], (above, row + 1)))
        above = row + 1
    return Layout(tuple(pieces), _documents(first, end), visible)


def _pieces_of(first: torch.Tensor, end: torch.Tensor, rows: tuple[int, int]) -> list[Piece]:
    """Runs of queries whose spans go on in one way."""
    tokens = len(first)
    by_first, by_end = first.diff(), end.diff()
    plain = (by_first >= 0) & (by_first <= 1) & (by_end >= 0) & (by_end <= 1)
    blind = end <= first
    # A query whose first key is its own begins a document, which is a piece of its own.
    plain &= (blind[1:] == blind[:-1]) & (first[1:] != torch.arange(1, tokens))
    # 0: nothing goes on here; else 1 + how both go on. Of blind queries only that they are matters.
    steps = torch.where(plain, 1 + 2 * by_first + by_end, 0)
    steps[blind[1:] & blind[:-1]] = 5
    values, counts = torch.unique_consecutive(steps, return_counts=True)
    found: list[Piece] = []
    start, at = 0, 0  # ``at``: steps before this one are used up; step t leads from query t to t + 1
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        stop = at + count + 1
        if value == 0:  # each of these queries but the last is alone, or ends the run before
            while start < stop - 1:
                found.extend(_run(first, end, rows, start, start + 1))
                start += 1
        elif start < stop:
            found.extend(_run(first, end, rows, start, stop))
            start = stop
        at += count
    if start < tokens:
        found.extend(_run(first, end, rows, start, tokens))
    return found


def _run(first: torch.Tensor, end: torch.Tensor, rows: tuple[int, int], start: int, stop: int) -> list[Piece]:
    low, last_low = int(first[start]), int(first[stop - 1])
    high, last_high = int(end[start]), int(end[stop - 1])
    if high <= low:
        return []
    if low == last_low and high == last_high:
        return [Piece(Kind.FULL, *rows, start, stop, low, high)]
    if low == last_low == start and high == start + 1 and last_high == stop:
        return [Piece(Kind.CAUSAL, *rows, start, stop, start, stop)]
    seen = max(high - low, last_high - last_low)
    size = min(max(seen // 2, _CHUNK[0]), _CHUNK[1])
    size = max(1, min(size, _MAX_MASK // (seen + size)))
    found = []
    for chunk in range(start, stop, size):
        last = min(chunk + size, stop)
        found.append(Piece(Kind.BAND, *rows, chunk, last, int(first[chunk]), int(end[last - 1])))
    return found


def _documents(first: torch.Tensor, end: torch.Tensor) -> Documents | None:
    """All of it as documents, if it can be."""
    places = torch.arange(first.shape[1])
    sees = end > first
    if not bool((end == places + 1)[sees].all()):
        return None
    # Where a document begins: no query from there on sees a key before it.
    reach = torch.where(sees, first, places)
    begins = reach.flip(1).cummin(1).values.flip(1) >= places
    begins |= torch.cat((sees[:, :1], sees[:, 1:] != sees[:, :-1]), dim=1)
    since = torch.where(begins, places, 0).cummax(1).values
    wide = (end - first)[sees & (first > since)]
    window = int(wide.max()) if len(wide) else None
    lowest = since if window is None else torch.maximum(since, places + 1 - window)
    if not torch.equal(first[sees], lowest[sees]):
        return None
    bounds: list[tuple[int, int, int]] = []
    for row in range(len(first)):
        starts = begins[row].nonzero()[:, 0].tolist()
        used = sees[row, starts].tolist()
        ends = [*starts[1:], first.shape[1]]
        bounds.extend((row, a, b) for a, b, use in zip(starts, ends, used, strict=True) if use)
    return Documents(tuple(bounds), window)
