"""What a kernel of attention takes and yields, by length, learned from the kernel itself.

Shapes, strides and what a kernel allocates inside (cuDNN says to nobody how large its workspace is) differ between
kernels and releases. So the real kernel is run at two short lengths with all its heads, and every size is continued on
a line. Both lengths have the remainder of the asked one, so that what is rounded up is rounded alike; where queries
and keys are not as many (a chunk of queries and the keys before it), that holds for both, in the same proportion. A
call that is no longer than these is learned at its own length.

On CUDA what is allocated inside is what PyTorch's allocator counted during the call, less the results. On the CPU,
where no allocator counts, it is left out: buffers of each thread, the same at any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: By device type: the two lengths, and what their remainder is taken by.
_LENGTHS = {"cpu": (32, 64, 16), "cuda": (2048, 4096, 1024)}
#: Results with no more elements (seeds, lengths) are copied.
_FEW = 64
#: Shape and strides of a tensor.
Layout = tuple[tuple[int, ...], tuple[int, ...]]
#: (results, bytes asked of the allocator) at each length.
Samples = Sequence[tuple[Sequence[Any], int]]


def lengths(device_type: str, queries: int, keys: int) -> tuple[int, ...]:
    """Lengths, of the longer one, at which a call with so many ``queries`` and ``keys`` is learned."""
    short, long, step = _LENGTHS[device_type]
    tokens = max(queries, keys)
    # As the longer one loses this many, the shorter one loses a multiple of the step as well.
    step *= tokens // math.gcd(queries, keys)
    first = -(-short // step) * step + tokens % step
    second = first + -(-(long - short) // step) * step
    return (first, second) if tokens > second else (tokens,)


def _on_line(sizes: Sequence[int], at: Sequence[int], tokens: int) -> int:
    """``sizes`` at lengths ``at``, continued to ``tokens``."""
    if len(sizes) == 1 or sizes[0] == sizes[1]:
        return sizes[-1]
    return sizes[1] + (sizes[1] - sizes[0]) * (tokens - at[1]) // (at[1] - at[0])


@dataclass(frozen=True, slots=True)
class _Outline:
    """A tensor without its elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int) -> _Outline:
        """That of ``tensor``, which lies in storage number ``storage``."""
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, storage)


@dataclass(frozen=True, slots=True)
class _Result:
    """One result at each length: outlines, or anything else as it is."""

    samples: tuple[Any, ...]

    def layout(self, at: Sequence[int], tokens: int) -> Layout:
        """(shape, strides) of a tensor for ``tokens``."""
        shape = (_on_line(sizes, at, tokens) for sizes in zip(*(s.shape for s in self.samples), strict=True))
        stride = (_on_line(sizes, at, tokens) for sizes in zip(*(s.stride for s in self.samples), strict=True))
        return tuple(shape), tuple(stride)

    def make(self, storages: Sequence[torch.UntypedStorage], at: Sequence[int], tokens: int) -> Any:
        """The result for ``tokens``, not filled."""
        one = self.samples[-1]
        if isinstance(one, torch.Tensor):
            return one.clone()
        if isinstance(one, int) and not isinstance(one, bool):
            return _on_line(self.samples, at, tokens)
        if not isinstance(one, _Outline):
            return one
        shape, stride = self.layout(at, tokens)
        offset = _on_line([s.offset for s in self.samples], at, tokens)
        storage = storages[one.storage]
        return torch.empty(0, dtype=one.dtype, device=storage.device).set_(storage, offset, shape, stride)


@dataclass(frozen=True, slots=True)
class Law:
    """Results and inner memory of one kernel by length.

    ``at``: where it was learned. ``storages``: bytes of the results' storages there; ``inside``: allocated besides.
    """

    at: tuple[int, ...]
    results: tuple[_Result, ...]
    storages: tuple[tuple[int, ...], ...]
    inside: tuple[int, ...]
    device: torch.device

    def make(self, tokens: int) -> list[Any]:
        """Results for ``tokens``, not filled."""
        made = [
            torch.empty(_on_line(sizes, self.at, tokens), dtype=torch.uint8, device=self.device).untyped_storage()
            for sizes in self.storages
        ]
        return [one.make(made, self.at, tokens) for one in self.results]

    def layout(self, place: int, tokens: int) -> Layout:
        """(shape, strides) of result number ``place``."""
        result = self.results[place]
        one = result.samples[-1]
        return (one.shape, one.stride()) if isinstance(one, torch.Tensor) else result.layout(self.at, tokens)

    def inside_bytes(self, tokens: int) -> int:
        """What it allocates inside for ``tokens``."""
        return max(0, _on_line(self.inside, self.at, tokens))


def as_results(found: Any) -> tuple[Any, ...]:
    """What an operator yields, as a tuple."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def learn(prepare: Callable[[int], Callable[[], Any]], at: tuple[int, ...], device: torch.device) -> Law:
    """The law of a kernel; ``prepare`` makes the inputs of a length and yields the call."""
    samples = []
    for tokens in at:
        call = prepare(tokens)
        call()  # libraries make their handles and plans when they are first asked
        before = _asked_for(device)
        found = as_results(call())
        samples.append((found, _asked_for(device) - before))
    results, storages, small = _sorted(samples)
    # On the CPU nothing is asked for, and nothing is left.
    inside = tuple(
        max(0, asked - small[number] - sum(sizes[number] for sizes in storages))
        for number, (_, asked) in enumerate(samples)
    )
    return Law(at, results, storages, inside, device)


def _asked_for(device: torch.device) -> int:
    """Bytes that the allocator was asked for up to now."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.allocated"])


def _is_small(many: Sequence[Any]) -> bool:
    """A tensor that is the same size at any length (seeds, lengths of sequences)."""
    same = all(isinstance(one, torch.Tensor) and one.shape == many[0].shape for one in many)
    return same and many[0].numel() <= _FEW


def _sorted(samples: Samples) -> tuple[tuple[_Result, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """(results, bytes of their storages, each once, bytes of small ones at each length)."""
    keys: dict[int, int] = {}
    storages: list[tuple[int, ...]] = []
    results = []
    small = [0] * len(samples)
    for many in zip(*(found for found, _ in samples), strict=True):
        if not isinstance(many[-1], torch.Tensor):
            results.append(_Result(many))
        elif _is_small(many):
            small = [size + one.untyped_storage().nbytes() for size, one in zip(small, many, strict=True)]
            results.append(_Result(many))
        else:
            key = many[-1].untyped_storage()._cdata
            if key not in keys:
                keys[key] = len(storages)
                storages.append(tuple(one.untyped_storage().nbytes() for one in many))
            results.append(_Result(tuple(_Outline.of(one, keys[key]) for one in many)))
    return tuple(results), tuple(storages), tuple(small)
