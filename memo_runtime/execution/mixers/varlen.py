"""Documents and windows by flash attention's varlen kernel.

The kernel takes all rows one after another, [B * S, H, D], and where each document begins. It takes windows, and is the
only one that does. Documents go through it in sections:

    documents in a row that are short     one call
    a long one, with a window             one call: a call costs its longest document times the number of documents
    a long one without a window           a call of plain attention: cuDNN's is half again as fast on an H100

Queries that see nothing are in no section, or documents of their own there, whose results and gradients are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from memo_runtime.blocks.spans import Documents, Kind, Layout, Piece
from memo_runtime.execution.mixers.attention import Inputs, Settings, kernels_for

aten: Any = torch.ops.aten
#: Documents of this many tokens keep a GPU busy one at a time.
_LONG = 4096


@dataclass(frozen=True, slots=True)
class Section:
    """Tokens [start, stop) of all rows one after another.

    ``piece``: it is a document for plain attention. Else ``begins``: where each document begins and the last one ends,
    counted from ``start``, on the device; ``longest``: of its documents; ``blind``: those whose queries see nothing.
    """

    start: int
    stop: int
    piece: Piece | None = None
    begins: torch.Tensor | None = None
    longest: int = 0
    blind: tuple[tuple[int, int], ...] = ()

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Its tokens of [B, H, S, ...], as [tokens, H, ...]; no copy where memory is token-major."""
        return in_a_row(tensor)[self.start : self.stop]


def in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, S, ...] as [B * S, H, ...]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def sections_of(
    layout: Layout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Section, ...] | None:
    """How documents go through the kernel; None: it does not serve."""
    documents = layout.documents
    if documents is None or not documents.bounds or query.device.type != "cuda":
        return None
    settings = Settings(dropout=0.0, causal=True, scale=1.0, grouped=True)
    if key.shape[2] != query.shape[2] or "flash" not in kernels_for(Inputs(query, key, value, None), settings):
        return None
    remembered = (query.device, query.shape[2], _LONG)
    if remembered not in layout.remembered:
        layout.remembered[remembered] = tuple(make_sections(documents, query.shape[2], query.device))
    found: tuple[Section, ...] = layout.remembered[remembered]
    return found


def make_sections(documents: Documents, tokens: int, device: torch.device) -> Iterator[Section]:
    """Sections of ``documents`` of rows of ``tokens``."""
    short: list[tuple[int, int]] = []
    for row, start, stop in documents.bounds:
        flat = (row * tokens + start, row * tokens + stop)
        if stop - start < _LONG:
            short.append(flat)
            continue
        if short:
            yield _section(short, device)
            short = []
        if documents.window is None:
            yield Section(*flat, piece=Piece(Kind.CAUSAL, row, row + 1, start, stop, start, stop))
        else:
            yield _section([flat], device)
    if short:
        yield _section(short, device)


def _section(bounds: Sequence[tuple[int, int]], device: torch.device) -> Section:
    origin = bounds[0][0]
    begins, blind = [0], []
    for start, stop in bounds:
        if start - origin > begins[-1]:
            blind.append((begins[-1], start - origin))
            begins.append(start - origin)
        begins.append(stop - origin)
    longest = max(stop - start for start, stop in pairwise(begins))
    places = torch.tensor(begins, dtype=torch.int32, device=device)
    return Section(origin, bounds[-1][1], None, places, longest, tuple(blind))


def _window(layout: Layout) -> dict[str, int]:
    """The window, as the kernel counts it: keys before the query's own."""
    assert layout.documents is not None, "sections are of documents"
    window = layout.documents.window
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def varlen_forward(
    section: Section, layout: Layout, tensors: Sequence[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [tokens, H, D], log-sum-exp [H, tokens]) of queries, keys and values [B, H, S, D]."""
    longest = section.longest
    output, lse, *_ = aten._flash_attention_forward(
        *map(section.of, tensors), section.begins, section.begins, longest, longest, 0.0, True, False, scale=scale,
        **_window(layout),
    )  # fmt: skip
    for start, stop in section.blind:
        output[start:stop] = 0
    return output, lse


def varlen_backward(
    section: Section, layout: Layout, tensors: Sequence[torch.Tensor], lse: torch.Tensor, scale: float
) -> Sequence[torch.Tensor]:
    """Gradients [tokens, H, D] of queries, keys and values; ``tensors``: that of the output, these, the output."""
    longest, device = section.longest, lse.device
    # Nothing was dropped, so no state of a generator is read.
    state, unused = (torch.zeros(size, dtype=torch.uint64, device=device) for size in (2, ()))
    found: Sequence[torch.Tensor] = aten._flash_attention_backward(
        *map(section.of, tensors), lse.contiguous(), section.begins, section.begins, longest, longest, 0.0, True,
        state, unused, scale=scale, **_window(layout),
    )  # fmt: skip
    for one in found:
        for start, stop in section.blind:
            one[start:stop] = 0
    return found
