"""Forms: what every saved tensor of a forward looks like and whose memory it is, to compare with a rerun's.

Saved tensors are told apart by their number alone. An operator that takes another way in the rerun (``linear`` saves
weight and input the other way round where it has to copy the input first) may save as many tensors in another order,
and where their shapes happen to fit, gradients would be wrong with nothing to show for it. So what takes the place of a
dropped tensor has its shape, dtype and strides, and memory that lives on from the forward to the rerun (parameters,
masks) is saved in the places where it was saved then. Nothing of this waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memo_runtime.blocks.region import has_strides
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.errors import ReplayMismatchError
from memo_runtime.execution.stash import Holder, Stash
from memo_runtime.records import Action, TokenAxis

#: Shape, strides, dtype and storage.
_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, int]
#: What is done with pieces into which a rerun writes.
_REBUILT = frozenset((Action.PREFIX, Action.REBUILD))


class Forms:
    """Forms of the tensors ``saved`` by one forward; a rerun makes tokens [prefix, tokens) of them."""

    def __init__(self, name: str, saved: Sequence[torch.Tensor], *, prefix: int, tokens: int) -> None:
        self._name = name
        try:
            # Of every tensor at every call: as few calls as will do.
            self._forms = [(one.shape, one.stride(), one.dtype, one.untyped_storage()._cdata) for one in saved]
        except RuntimeError:  # a sparse one has no strides and no storage
            self._forms = [_form(tensor) for tensor in saved]
        self._rows = tokens - prefix if prefix else 0
        self._alive: set[int] = set()

    def begin(self, stash: Stash) -> None:
        """A rerun begins: what stayed where it was is still there, so no other storage goes by its name."""
        holders = map(stash.holder, range(len(self._forms)))
        kept = [holder.index for holder in holders if holder is not None and holder.kept is not None]
        self._alive = {self._forms[index][3] for index in kept}

    def check(self, holder: Holder, tensor: torch.Tensor) -> None:
        """Raise ReplayMismatchError unless ``tensor`` is what the forward saved in the place of ``holder``."""
        form = self._forms[holder.index]
        shape, strides, dtype, storage = form
        own = storage_key(tensor)
        fits = own == storage or own not in self._alive
        piece = holder.piece
        if fits and piece is not None and piece.action in _REBUILT:
            axis = piece.region.views[holder.position].axis if piece.region is not None else None
            fits = tensor.dtype == dtype and tensor.shape == self._rebuilt(shape, axis)
            fits = fits and (bool(self._rows) or not tensor.numel() or has_strides(tensor, strides))
        if not fits:
            raise ReplayMismatchError(
                f"'{self._name}' was run again and saved another tensor in place {holder.index} than its forward: "
                f"{_words(_form(tensor))} instead of {_words(form)}. An operator of it took another way, or what it "
                "reads changed since (an attribute, data, a global variable). No gradient of it was computed; "
                "policy='swap' runs nothing again"
            )

    def _rebuilt(self, shape: torch.Size, axis: TokenAxis | None) -> tuple[int, ...]:
        """What a rerun makes of a tensor of ``shape``."""
        if axis is None or not self._rows:
            return shape
        return (*shape[: axis.dim], axis.outer * self._rows * axis.inner, *shape[axis.dim + 1 :])


def _form(tensor: torch.Tensor) -> _Form:
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return tensor.shape, strides, tensor.dtype, storage_key(tensor)


def _words(form: _Form) -> str:
    shape, strides, dtype, _ = form
    return f"{tuple(shape)} with strides {strides} and {str(dtype).removeprefix('torch.')}"
