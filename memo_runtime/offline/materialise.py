"""One block on the CPU, with made-up values: what its structure is found on.

Whether an operator mixes tokens, and which tensors a rerun needs, does not depend on values; so weights are noise of
the usual size, floating arguments noise, integers count along their last dimension, booleans are true.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.errors import ProfileError

#: Noise is drawn once and repeated: drawing it for every weight would take longer than all else.
_NOISE = 1 << 16
_MOST_BYTES = 1 << 30


def real_block(block: nn.Module) -> nn.Module:
    """A copy of ``block`` with values, on the CPU.

    Raises:
        ProfileError: it cannot be copied.
    """
    made = _copied(block).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            if not tensor.is_floating_point():
                tensor.fill_(1)
            elif tensor.dim() < 2:
                tensor.copy_(1 + 0.1 * torch.randn(tensor.shape, generator=generator))
            else:
                noise = torch.randn(min(tensor.numel(), _NOISE), generator=generator) * tensor.shape[-1] ** -0.5
                repeated = noise.to(tensor.dtype).repeat(-(-tensor.numel() // noise.numel()))
                tensor.copy_(repeated[: tensor.numel()].view(tensor.shape))
    return made


def _copied(block: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(block)
    except Exception as error:
        pass_on(error)
        kept = [
            f"{name}.{key}".lstrip(".")
            for name, module in block.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        buffers = [name for name, value in block.named_buffers() if not value.is_leaf]
        found = ", ".join(kept + buffers)
        what = f"it keeps results of its forward ({found})" if found else first_line(error)
        raise ProfileError(
            f"a {type(block).__name__} cannot be copied, to be tried on the CPU: {what}; profile the model on its "
            "device with memo.profile instead"
        ) from error


def real_call(call: BlockCall, name: str) -> BlockCall:
    """``call`` with values, on the CPU.

    Raises:
        ProfileError: its tensors are too large to try.
    """
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in call.tensors())
    if size > _MOST_BYTES:
        raise ProfileError(
            f"{name} is called with {size / 2**30:.1f} GiB of arguments: let the factory return a batch of a few "
            "hundred tokens; --seq-len says what is planned for"
        )
    generator = torch.Generator().manual_seed(1)
    return call.replaced({leaf: _values(tensor, generator) for leaf, tensor in call.tensors()})


def _values(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        return noise.requires_grad_(tensor.requires_grad)
    if tensor.dtype == torch.bool or not tensor.dim():
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.arange(tensor.shape[-1]).expand(tensor.shape).to(tensor.dtype).clone()
