"""Witnesses: a few values of every tensor that is dropped, to compare with what the rerun makes of it.

What can be rebuilt is found on a short crop, before training. Code that behaves differently at the real length, weights
that were exchanged since, or an attribute that changed, would rebuild something else, and the gradient would be wrong
with nothing to show for it. A few rows of each dropped tensor are kept and compared; a difference is an error. They are
kept and compared in host memory: on the device those of all blocks together were 1 to 2 MiB that no plan counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from memo_runtime.errors import ReplayMismatchError
from memo_runtime.records import TokenAxis
from memo_runtime.sizes import WITNESS_ROWS

_ELEMENTS = 64
#: Relative L2 difference that rounding may explain, as for crops (profiling/compare.py).
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 3e-2


def _spread(start: int, stop: int, count: int) -> torch.Tensor:
    """Up to ``count`` whole numbers of [start, stop), both ends among them."""
    count = min(count, stop - start)
    return torch.linspace(start, stop - 1, count, dtype=torch.float64).round().long()


@dataclass(slots=True)
class _Sample:
    values: torch.Tensor
    at: torch.Tensor
    axis: TokenAxis | None


@dataclass(slots=True)
class Witness:
    """Samples of the dropped tensors of one call, by index; ``prefix`` and ``tokens`` are the rows rebuilt."""

    name: str
    prefix: int
    tokens: int
    samples: dict[int, _Sample] = field(default_factory=dict)

    def see(self, index: int, tensor: torch.Tensor, axis: TokenAxis | None) -> None:
        """Remember some of saved tensor ``index`` of the forward."""
        if not tensor.numel():
            return
        if axis is not None:
            at = _spread(self.prefix, self.tokens, WITNESS_ROWS)
            values = _rows(tensor, axis, self.tokens, at)
        else:
            at = _spread(0, tensor.numel(), _ELEMENTS)
            values = _elements(tensor, at)
        self.samples[index] = _Sample(values, at, axis)

    def compare(self, index: int, rebuilt: torch.Tensor) -> None:
        """Raise ReplayMismatchError if the rerun made something else of tensor ``index``, whose form is right."""
        sample = self.samples.get(index)
        if sample is None:
            return
        if sample.axis is not None:
            found = _rows(rebuilt, sample.axis, self.tokens - self.prefix, sample.at - self.prefix)
        else:
            found = _elements(rebuilt, sample.at)
        if not _agree(found, sample.values):
            raise ReplayMismatchError(
                f"'{self.name}' was run again and made something else of saved tensor {index} {tuple(rebuilt.shape)} "
                "than its forward. Either it mixes tokens in a way that a short crop does not show (name the operator "
                "with memo.register_mixer), or something that it reads changed since: weights, an attribute, random "
                "numbers that PyTorch does not draw. No gradient of it was computed; policy='swap' runs nothing again"
            )


def _rows(tensor: torch.Tensor, axis: TokenAxis, tokens: int, at: torch.Tensor) -> torch.Tensor:
    split: torch.Tensor = tensor.unflatten(axis.dim, (axis.outer, tokens, axis.inner))
    return split.index_select(axis.dim + 1, at.to(tensor.device)).cpu()


def _elements(tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Elements by their number in the order of dimensions, wherever they lie in memory."""
    at = at.to(tensor.device)
    return (tensor.view(-1)[at] if tensor.is_contiguous() else tensor[torch.unravel_index(at, tensor.shape)]).cpu()


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if expected.is_complex():
        found, expected = torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    a, b = torch.nan_to_num(found.double()), torch.nan_to_num(expected.double())
    gap = torch.linalg.vector_norm((a - b).clamp(-1e100, 1e100)).item()
    return bool(gap <= _TOLERANCE.get(found.dtype, _COARSE) * max(torch.linalg.vector_norm(b).item(), 1e-30))
