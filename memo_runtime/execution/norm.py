"""The norm behind the blocks, by tiles where the hidden state is long: see ``blocks/final_norm.py``."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.final_norm import LONG_BYTES
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.install import install_forward, original_forward, remove_forward
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.records import Plan
from memo_runtime.sizes import NORM_TILE

logger = logging.getLogger("memo_runtime")


class NormForward:
    """Takes the place of the norm's forward; not part of any copy of the model."""

    runs_by_tiles = True

    def __init__(self, norm: nn.Module, long_bytes: int = LONG_BYTES) -> None:
        self._norm = weakref.ref(norm)
        self._own = original_forward(norm)
        self._tiles: TiledBlock | None = TiledBlock(norm, tile=NORM_TILE, forward=self._own)
        self._long = long_bytes
        #: By tiles however short the state is.
        self.always = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """By tiles, exactly as blocks are; as it is where it is short, or cannot be captured."""
        tiles = self._tiles
        if torch.compiler.is_compiling() or tiles is None or not torch.is_grad_enabled() or not self._is_long(args):
            return self._own(*args, **kwargs)
        call = BlockCall.of(args, kwargs)
        try:
            captured = tiles.captured(call)
        except CaptureRefusedError as error:
            self._tiles = None
            logger.warning("memo: the norm behind the blocks runs as it is, on all tokens at once: %s", error)
            return self._own(*args, **kwargs)
        return tiles.run(captured, call, tiles.way())

    def _is_long(self, args: tuple[Any, ...]) -> bool:
        norm = self._norm()
        if len(args) != 1 or norm is None:
            return False
        hidden = args[0]
        plain = all(type(one) in (torch.Tensor, nn.Parameter) for one in (hidden, *norm.parameters()))
        return plain and hidden.dim() > 1 and hidden.requires_grad and (self.always or hidden.nbytes >= self._long)


def install_norm(norm: nn.Module) -> bool:
    """Let ``norm`` run by tiles; False: it has a forward of its own, which stays."""
    if "forward" in vars(norm):
        return False
    install_forward(norm, NormForward(norm))
    return True


def run_as_planned(norm: nn.Module, plan: Plan) -> None:
    """Let ``norm`` run by tiles at any length, or from where it is long, as ``plan`` needs it."""
    forward = vars(norm).get("forward")
    if isinstance(forward, NormForward):
        forward.always = plan.norm_by_tiles


def remove_norm(norm: nn.Module) -> None:
    """Undo ``install_norm``."""
    if isinstance(vars(norm).get("forward"), NormForward):
        remove_forward(norm)
