"""Where the tokens of a tensor are whose values do not tell (zeros in rows of tokens and heads).

Asked of the operators that made it, back to where sizes tell: from rows of [sequences, tokens, heads, features] a view
makes rows of tokens times heads, and that it does so shows on made-up numbers (profiling/made_up.py).
"""

from __future__ import annotations

from typing import Any

import torch

from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.operators import draws
from memo_runtime.blocks.region import tail, take
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.profiling.alone import arguments_of, run_alone, widened
from memo_runtime.profiling.compare import Lengths, close, growing_dims, splits
from memo_runtime.profiling.made_up import made_up
from memo_runtime.profiling.observe import Observation, OperatorRecord
from memo_runtime.records import TokenAxis

#: Operators of one way back: a loop over tokens has thousands, and Python's calls end before.
_MOST_STEPS = 100
#: Elements of a tensor as a view of its storage.
_Elements = tuple[int, int | torch.SymInt, torch.Size, tuple[int, ...]]


def _elements(tensor: torch.Tensor) -> _Elements | None:
    if tensor.layout is not torch.strided or hasattr(tensor, "__tensor_flatten__"):
        return None
    return storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


def _can_be_asked(record: OperatorRecord, index: int) -> bool:
    """It gave output ``index`` as it is, by itself, and so that it can be had again."""
    if record.replaced or index in record.then or not record.inputs or draws(record.key[0]):
        return False
    only = all(isinstance(value, torch.Tensor) for value in record.outputs)
    return only and record.key[0].startswith("aten.") and hasattr(record.func, "_schema")


class Origins:
    """The operators of a run on the whole, and of one on its tail, by what they made. To be used without gradients."""

    def __init__(self, whole: Observation, part: Observation, lengths: Lengths) -> None:
        self._lengths = lengths
        self._parts = part.by_key()
        self._steps = 0  # on the way back now
        self._known: dict[_Elements, TokenAxis | None] = {}
        self._makers: dict[_Elements, tuple[OperatorRecord, int]] = {}
        for record in whole.operators:
            for index, value in enumerate(() if record.mutable else record.outputs):
                elements = _elements(value) if isinstance(value, torch.Tensor) else None
                if elements is not None:
                    # The first: what it was made from is older, so that the way back ends.
                    self._makers.setdefault(elements, (record, index))

    def axis(self, whole: torch.Tensor, part: torch.Tensor) -> TokenAxis | None:
        """The only one that there can be; None: it has no single token dimension, or nothing tells."""
        dims = growing_dims(whole.shape, part.shape) or ()
        if len(dims) != 1:
            return None
        axes = list(splits(whole.shape, part.shape, dims[0], self._lengths))
        if len(axes) > 1:
            axes = self._fitting(whole, part, axes)
        elements = _elements(whole) if len(axes) > 1 else None
        if elements is not None:
            if elements not in self._known:
                self._known[elements] = None  # on the way back already
                self._known[elements] = self._asked(whole, self._makers.get(elements), axes)
            return self._known[elements]
        return axes[0] if len(axes) == 1 else None

    def _fitting(self, whole: torch.Tensor, part: torch.Tensor, axes: list[TokenAxis]) -> list[TokenAxis]:
        lengths = self._lengths
        return [axis for axis in axes if close(part, take(whole, axis, lengths.whole, lengths.start, lengths.whole))]

    def _asked(
        self, tensor: torch.Tensor, made: tuple[OperatorRecord, int] | None, axes: list[TokenAxis]
    ) -> TokenAxis | None:
        """The one of ``axes`` by which the operator that ``made`` it gives on a tail the tail of what it gives."""
        if made is None or self._steps >= _MOST_STEPS:
            return None
        record, index = made
        other = self._parts.get(record.key)
        if other is None or not _can_be_asked(record, index) or not _can_be_asked(other, index):
            return None
        self._steps += 1
        arguments = self._arguments(record, other)
        self._steps -= 1
        if arguments is None:
            return None
        with torch.autocast(tensor.device.type, enabled=False):
            for wide in (torch.float64, tensor.dtype):
                try:
                    first = run_alone(record, widened(arguments[0], wide))[index]
                    second = run_alone(other, widened(arguments[1], wide))[index]
                except Exception as error:
                    pass_on(error)
                    continue
                fitting = self._fitting(first, second, axes)
                return fitting[0] if len(fitting) == 1 else None
        return None

    def _arguments(self, record: OperatorRecord, other: OperatorRecord) -> tuple[list[Any], list[Any]] | None:
        """Made-up arguments of ``record``, and their tails in the shapes of ``other``'s; None: nothing tells where."""
        given = arguments_of(record, other)
        if given is None:
            return None
        made: list[Any] = []
        cut: list[Any] = []
        for number, (leaf, piece) in enumerate(zip(given.whole, given.part, strict=True)):
            made.append(leaf)
            cut.append(piece)
            if not (isinstance(leaf, torch.Tensor) and isinstance(piece, torch.Tensor)):
                continue
            dims = growing_dims(leaf.shape, piece.shape)
            axis = self.axis(leaf, piece)
            if dims is None or (len(dims) == 1 and axis is None):
                return None
            made[-1] = cut[-1] = made_up(leaf, number)
            if dims:
                lengths = self._lengths
                cut[-1] = tail(made[-1], axis, dims, tokens=lengths.whole, start=lengths.start)
            if cut[-1].shape != piece.shape:
                return None
        return made, cut
