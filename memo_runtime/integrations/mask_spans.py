"""transformers' mask functions as spans, without evaluating them for all pairs.

transformers says what a mask is by a function of (row, head, query, key), put together from a few by ``and_masks``.
Each of those that are known here yields the run of keys that a query sees; of several, the common part. A function that
is not known, or holes in the padding, are said by name, and the caller makes the mask that transformers makes.

What was read from closures is not believed: the function itself is asked at both ends of every run, on either side, and
at some other keys. That is some numbers per query, not a number per pair.

A description of what such a function is in words:

    causal_mask_function                          keys up to the query
    sliding_window_overlay(w)                     keys behind query - w
    chunked_overlay(c, padding)                   keys of the query's chunk
    packed_sequence_mask_function(documents)      keys of the query's document
    remap_positions_for_packed_sequence(f, p)     f of the positions p inside the documents
    padding_mask_function(mask)                   keys that are no padding
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MaskFunction = Callable[..., Any]
#: Other keys at which a function is asked for every query.
_PROBES = 4


class NoSpansError(Exception):
    """A mask cannot be said in spans; the text says why."""


@dataclass(slots=True)
class _Reader:
    """Reads functions for queries [B, S], whose indices are ``places``; ``shift`` is added to get their positions."""

    places: torch.Tensor
    keys: int
    #: The positions in the documents less the places; a run of positions is one of places only within a document.
    shift: torch.Tensor | None = None
    #: What has been read is inside one document of consecutive positions.
    within: bool = False

    def read(self, function: MaskFunction) -> tuple[torch.Tensor, torch.Tensor]:
        """(first key, end) of each query."""
        name = getattr(function, "__qualname__", type(function).__qualname__).removesuffix(".<locals>.inner_mask")
        held = _closure(function)
        if name == "and_masks.<locals>.and_mask":
            return self._common([self.read(one) for one in held["mask_functions"]])
        reader = _READERS.get(name)
        if reader is None:
            raise NoSpansError(f"{name} is not known to yield runs of keys")
        return reader(self, held)

    def _common(self, runs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        first, end = runs[0]
        for low, high in runs[1:]:
            first, end = torch.maximum(first, low), torch.minimum(end, high)
        return first, end

    @property
    def _zero(self) -> torch.Tensor:
        return torch.zeros_like(self.places)

    def causal(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._zero, self.places + 1

    def sliding(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.places - int(held["sliding_window"]) + 1, self._zero + self.keys

    def chunked(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        size, padding = int(held["chunk_size"]), held["left_padding"].to(self.places)[:, None]
        positions = self.places if self.shift is None else self.places + self.shift
        first = self.places - (positions - padding) % size
        return first, first + size

    def packed(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        documents = held["packed_sequence_mask"].to(self.places)
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        self.within = True
        first = torch.where(starts, self.places, 0).cummax(1).values
        ends = torch.where(starts, self.places, self.keys)[:, 1:]
        ends = torch.nn.functional.pad(ends, (0, 1), value=self.keys).flip(1).cummin(1).values.flip(1)
        return first, ends

    def remapped(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        self.shift = held["position_ids"].to(self.places) - self.places
        return self.read(held["mask_function"])

    def padded(self, held: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        kept = held["padding_mask"].to(torch.bool)[:, : self.keys]
        counts = kept.sum(-1, keepdim=True)
        first = kept.to(torch.int8).argmax(-1, keepdim=True)
        end = kept.shape[1] - kept.flip(-1).to(torch.int8).argmax(-1, keepdim=True)
        if bool((counts != torch.where(counts > 0, end - first, 0)).any()):
            raise NoSpansError("there is padding between tokens")
        end = torch.where(counts > 0, end, first)
        return self._zero + first, self._zero + end


_READERS: dict[str, Callable[[_Reader, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]] = {
    "causal_mask_function": _Reader.causal,
    "sliding_window_overlay": _Reader.sliding,
    "chunked_overlay": _Reader.chunked,
    "packed_sequence_mask_function": _Reader.packed,
    "remap_positions_for_packed_sequence": _Reader.remapped,
    "padding_mask_function": _Reader.padded,
}


def _closure(function: MaskFunction) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def spans_of(
    function: MaskFunction, rows: int, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(first key, end) [B, S] of what ``function`` says for ``tokens`` queries and as many keys.

    Raises:
        NoSpansError: it does not say runs of keys, or what was read is not what it says.
    """
    places = torch.arange(tokens, device=device).expand(rows, tokens)
    reader = _Reader(places, tokens)
    try:
        first, end = reader.read(function)
    except (KeyError, AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise NoSpansError(f"transformers' mask functions are not as they are known: {error}") from error
    if reader.shift is not None and not reader.within:
        raise NoSpansError("positions are given that are no documents")
    first, end = first.clamp(min=0, max=tokens), end.clamp(min=0, max=tokens)
    blind = end <= first
    first, end = torch.where(blind, 0, first), torch.where(blind, 0, end)
    _ask(function, first, end)
    return first, end


def _ask(function: MaskFunction, first: torch.Tensor, end: torch.Tensor) -> None:
    """Ask ``function`` at the ends of all runs, on either side, and elsewhere."""
    rows, tokens = first.shape
    batch = torch.arange(rows, device=first.device)[:, None]
    head, queries = torch.zeros_like(batch), torch.arange(tokens, device=first.device)[None]
    generator = torch.Generator(first.device).manual_seed(tokens)
    asked = [first - 1, first, end - 1, end]
    asked += [
        torch.randint(0, tokens, first.shape, generator=generator, device=first.device) for _ in range(_PROBES)
    ]
    wrong = torch.zeros((), dtype=torch.bool, device=first.device)
    for keys in asked:
        inside = keys.clamp(0, tokens - 1)
        says = function(batch, head, queries, inside)
        wrong |= (says != ((inside >= first) & (inside < end))).any()
    if bool(wrong):
        raise NoSpansError("what was read of it is not what it says")
