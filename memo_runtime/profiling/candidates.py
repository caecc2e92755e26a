"""Which dimensions of a block's arguments may be the token dimension, the likeliest first.

Sizes alone do not tell: a batch of 7 sequences of 7 tokens, a head size equal to the length. Candidates are
therefore tried in turn, and the comparison of a slice with the whole decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.records import ArgumentAxes

#: A slice needs two tokens and so does what precedes it: attention treats one query specially.
MIN_TOKENS = 4
_MAX_COMBINATIONS = 8


def token_dims(hidden: torch.Tensor) -> list[int]:
    """Token dimensions of an input hidden state to try: the second, then the first, then the third."""
    order = [0] if hidden.dim() == 2 else [1, 0, *range(2, hidden.dim() - 1)]
    return [dim for dim in order if hidden.shape[dim] >= MIN_TOKENS]


def _options(tensor: torch.Tensor, tokens: int, token_dim: int, like_input: bool) -> list[tuple[int, ...]]:
    dims = [dim for dim, size in enumerate(tensor.shape) if size == tokens]
    if len(dims) <= 1:
        return [tuple(dims)]
    last_two = (tensor.dim() - 2, tensor.dim() - 1)
    options: list[tuple[int, ...]] = []
    if like_input and token_dim in dims:
        options.append((token_dim,))
    if all(dim in dims for dim in last_two):
        options.append(last_two)
    if token_dim in dims:
        options.append((token_dim,))
    options += [(dim,) for dim in dims] + [tuple(dims), ()]
    return list(dict.fromkeys(options))


def _by_kind(tensor: torch.Tensor, options: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A weight has no tokens, whatever its size, unless a block only runs where it is cut (learned positions)."""
    return list(dict.fromkeys([(), *options])) if isinstance(tensor, nn.Parameter) else options


def argument_axes(call: BlockCall, input_leaf: int, token_dim: int) -> Iterator[tuple[ArgumentAxes, ...]]:
    """Assignments of token dimensions to all tensor arguments, given the input's."""
    hidden = call.leaves[input_leaf]
    tokens = hidden.shape[token_dim]
    leaves = []
    choices = []
    for leaf, tensor in call.tensors():
        if leaf == input_leaf:
            continue
        same_rank = tensor.dim() == hidden.dim() and tensor.dim() < 4
        leaves.append(leaf)
        options = _options(tensor, tokens, token_dim, same_rank)
        if options == [(tensor.dim() - 1,)] and hidden.shape[-1] == tokens:
            options.append(())  # features, of as many as there are tokens: what a block is conditioned on
        choices.append(_by_kind(tensor, options))
    for combination in itertools.islice(itertools.product(*choices), _MAX_COMBINATIONS):
        axes = [ArgumentAxes(leaf=input_leaf, dims=(token_dim,))]
        axes += [ArgumentAxes(leaf=leaf, dims=dims) for leaf, dims in zip(leaves, combination, strict=True) if dims]
        yield tuple(axes)
