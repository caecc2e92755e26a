"""Masks and biases of all pairs of tokens that a block is given, which long sequences have no room for."""

from __future__ import annotations

import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.units import format_bytes

#: Fewer bytes than this are nothing beside a block.
_WORTH_SAYING = 1 << 26


def about_squares(call: BlockCall) -> str | None:
    """What to say of the largest argument with two token dimensions; None: there is none, or it is small."""
    if call.input_leaf is None:
        return None
    source: torch.Tensor = call.leaves[call.input_leaf]
    if source.is_nested:  # its sequences have as many tokens as they have
        return None
    tokens = int(source.shape[-2])
    found = [
        tensor for _, tensor in call.tensors()
        if tensor is not source and tensor.layout is torch.strided and sum(size == tokens for size in tensor.shape) > 1
    ]  # fmt: skip
    largest = max(found, key=_bytes, default=None)
    if largest is None:
        return None
    kwargs = call.original[1] if call.original is not None else {}
    named = next((f"'{name}', " for name, value in kwargs.items() if value is largest), "")
    shape = " x ".join(f"{size:,}" for size in largest.shape)
    one = f"an argument for all pairs of tokens ({named}{str(largest.dtype).removeprefix('torch.')}, {shape}) takes"
    return what_squares_take(one, _bytes(largest), tokens)


def what_squares_take(begin: str, size: int, tokens: int) -> str | None:
    """What to say of ``size`` bytes for all pairs of ``tokens`` tokens, after ``begin``; None: they are few."""
    if size < _WORTH_SAYING:
        return None
    return (
        f"{begin} {format_bytes(size)} at {tokens:,} tokens, and four times as much at twice as many; nothing here "
        "makes it smaller. Say causal attention by is_causal=True and no mask, windows and documents by a kernel that "
        "takes them (flex attention, flash-attn, memo.register_mixer); Hugging Face decoders need no such mask with "
        "attn_implementation='sdpa', see docs/masks.md"
    )


def _bytes(tensor: torch.Tensor) -> int:
    """Of its memory, of which an expanded dimension has none."""
    size = tensor.element_size()
    for count, step in zip(tensor.shape, tensor.stride(), strict=True):
        size *= count if step else 1
    return int(size)
