"""What the arguments of the model take on the device during a step: their caller holds them to its end.

Tensors in tuples, lists and dicts are counted; what else holds some (a dataclass, NumPy arrays) is not looked into.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.region import shrink
from memo_runtime.blocks.rerun import is_sparse, sparse_parts
from memo_runtime.sizes import Growth

#: Tokens of a mask come twice, those of anything else once.
_MOST_AXES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """What blocks have seen of a batch.

    Attributes:
        rows: sequences. lengths: tokens of each, of which encoder and decoder may have other numbers.
        width: features of a token.
    """

    rows: int
    lengths: Collection[int]
    width: int

    def token_axes(self, tensor: torch.Tensor) -> list[int]:
        """Sizes along the dimensions of ``tensor`` that grow with tokens, at most two.

        There may be as many sequences as tokens, and as many features: the first dimension is then one of sequences,
        and the last of real numbers in three dimensions or more one of features.
        """
        sizes = list(tensor.shape)
        if tensor.is_floating_point() and len(sizes) > _MOST_AXES and sizes[-1] == self.width:
            sizes.pop()
        if len(sizes) > 1 and sizes[0] == self.rows:
            sizes.pop(0)
        return [size for size in sizes if self._is_tokens(size)][-_MOST_AXES:]

    def _is_tokens(self, size: int) -> bool:
        """Shifted inputs and labels may come as one of a token more."""
        return size > 1 and (size in self.lengths or size - 1 in self.lengths)

    def guessed(self, tensor: torch.Tensor) -> bool:
        """It may be a bias for all pairs of tokens where ``token_axes`` sees features of each."""
        shape = tensor.shape
        three = tensor.is_floating_point() and tensor.dim() > _MOST_AXES
        return three and shape[-1] == self.width == shape[-2] and self._is_tokens(self.width)


def batch_bytes(batch: Any, sequences: Sequences, calls: Iterable[BlockCall]) -> Growth:
    """Bytes of the tensors of ``batch`` by tokens of a sequence, those that ``calls`` of blocks count left out."""
    counted: dict[int, int] = {}
    for storage, tensor in _storages([tensor for call in calls for _, tensor in call.tensors()]):
        counted[storage] = max(counted.get(storage, 0), _bytes(tensor))
    found = [0.0] * (_MOST_AXES + 1)
    for storage, tensor in dict(_storages(_pytree.tree_leaves(batch))).items():
        tokens = sequences.token_axes(tensor)
        share = float(max(0, _bytes(tensor) - counted.get(storage, 0)))
        for size in tokens:
            share /= size
        found[len(tokens)] += share
    constant, linear, quadratic = found
    return Growth(constant=constant, linear=linear, quadratic=quadratic)


def note_on_features(batch: Any, sequences: Sequences) -> Iterator[str]:
    """What has to be said where a tensor of the batch was taken for features by chance."""
    guessed = (tensor for _, tensor in _storages(_pytree.tree_leaves(batch)) if sequences.guessed(tensor))
    for tensor in guessed:
        yield (
            f"an argument {tuple(tensor.shape)} of the model is taken for {sequences.width} features of each token, "
            "and could be one number for each pair of tokens: let the factory return a batch of another length"
        )


def _storages(leaves: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """(storage, tensor without expanded dimensions) of all tensors among ``leaves``."""
    for leaf in leaves:
        for part in _parts(leaf) if isinstance(leaf, torch.Tensor) else ():
            yield part.untyped_storage()._cdata, shrink(part.detach())


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Dense tensors that hold what ``tensor`` has; strided nested tensors are not on meta, and so in no batch."""
    if tensor.is_nested:
        return (tensor.values(),) if tensor.layout is torch.jagged else ()
    return sparse_parts(tensor) if is_sparse(tensor) else (tensor,)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
