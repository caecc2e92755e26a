"""What a forward assigns to: parameters, buffers and modules of its block that are others when it is done.

No operator shows that, and whoever runs a block over other tensors has them put back as soon as its forward is done
(``functional_call``), with whatever was assigned in their place. Tiles would go on with the first values for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.rerun import storage_key

_KINDS = {"_parameters": "parameter", "_buffers": "buffer", "_modules": "module"}
_ABSENT = object()


class Tables:
    """What the tables of all modules in ``block`` hold at one point."""

    def __init__(self, block: nn.Module) -> None:
        self._found = [(name, module, _read(module)) for name, module in block.named_modules()]

    def assigned(self) -> str:
        """The first entry that is another one now, in words; "": none is.

        A new one and one that has gone count, and so do tensors that are the same in other memory (``.data``), or that
        want a gradient where they did not.
        """
        for name, module, before in self._found:
            for (table, old), (_, new) in zip(before, _read(module), strict=True):
                keys = (key for key in {**old, **new} if not _same(old.get(key, _ABSENT), new.get(key, _ABSENT)))
                key = next(keys, None)
                if key is not None:
                    return f"{_KINDS[table]} '{f'{name}.' if name else ''}{key}'"
        return ""


def _read(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    return [(table, {key: _entry(one) for key, one in getattr(module, table).items()}) for table in _KINDS]


def _entry(one: Any) -> tuple[Any, ...]:
    return (one, storage_key(one), one.requires_grad) if isinstance(one, torch.Tensor) else (one,)


def _same(old: Any, new: Any) -> bool:
    return old is not _ABSENT and new is not _ABSENT and old[0] is new[0] and old[1:] == new[1:]


class Watched(nn.Module):
    """``block`` inside another module, which looks at its tables while those of ``functional_call`` are in force."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        #: What the last forward has assigned to, in words.
        self.assigned = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block yields."""
        before = Tables(self.block)
        output = self.block(*args, **kwargs)
        self.assigned = before.assigned()
        return output

    def over(self, tensors: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block yields with ``tensors``, by their names in it, in the place of its own."""
        named = {f"block.{name}": tensor for name, tensor in tensors.items()}
        return torch.func.functional_call(self, named, args, kwargs)
