"""flash-attn's functions in a trace, as one operator each.

``flash_attn_func`` and ``flash_attn_varlen_func`` are autograd Functions: an operator that has no gradient of its own,
and a backward that no graph shows. While a block is traced, their ``apply`` yields a stand-in of the right shape; when
the block runs, the Function itself runs, and goes backward, through autograd's graph (``mixers/by_graph.py``). So
nothing here depends on what flash-attn saves or how its kernels are called.

The library is never imported from here. Tried with a look-alike only, on no GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import Library

from memo_runtime.errors import CaptureRefusedError

_MODULE = "flash_attn.flash_attn_interface"
_CLASSES = ("FlashAttnFunc", "FlashAttnVarlenFunc")
#: What releases call the argument that asks for attention weights.
_WEIGHTS = ("return_softmax", "return_attn_probs")
OPERATOR = "memo_runtime.flash_attention"
_LIBRARY = Library("memo_runtime", "FRAGMENT")
_LIBRARY.define("flash_attention(Tensor[] tensors, str key) -> Tensor")


@dataclass(frozen=True, slots=True)
class FlashCall:
    """One way to call a Function: its arguments, None where tensors go (``places``)."""

    function: Any
    arguments: tuple[Any, ...]
    places: tuple[int, ...]

    def run(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The Function on ``tensors``."""
        given = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=True):
            given[place] = tensor
        found: torch.Tensor = self.function.apply(*given)
        return found


_CALLS: dict[str, FlashCall] = {}


def flash_call(key: str) -> FlashCall:
    """The call that an operator of a trace stands for."""
    return _CALLS[key]


def _shape(tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    query, _, value = tensors[:3]
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_backward(ctx: Any, grad: torch.Tensor) -> Any:
    raise AssertionError("stand-ins of a trace never run backward")


torch.library.register_fake("memo_runtime::flash_attention", _shape, lib=_LIBRARY)
torch.library.register_autograd("memo_runtime::flash_attention", _no_backward, lib=_LIBRARY)


class _StandIn:
    """What ``apply`` of a Function is while a block is traced."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._names = list(inspect.signature(function.forward).parameters)[1:]

    def __call__(self, *arguments: Any) -> torch.Tensor:
        named = dict(zip(self._names, arguments, strict=False))
        name = f"flash_attn.{self._function.__name__}"
        if "dropout_p" not in named or not any(asked in named for asked in _WEIGHTS):
            raise CaptureRefusedError(name, f"its arguments are not those of flash-attn 2: {', '.join(self._names)}")
        if named["dropout_p"]:
            raise CaptureRefusedError(name, "what it drops cannot be compared with the block's own")
        if any(named.get(asked) for asked in _WEIGHTS):
            raise CaptureRefusedError(name, "it yields attention weights, of all pairs of tokens")
        places = tuple(at for at, one in enumerate(arguments) if isinstance(one, torch.Tensor))
        constants = tuple(None if at in places else one for at, one in enumerate(arguments))
        if any(isinstance(one, (torch.SymInt, torch.SymFloat)) for one in constants):
            raise CaptureRefusedError(name, "the number of tokens is one of its settings")
        key = f"{self._function.__name__}{constants}{places}"
        _CALLS[key] = FlashCall(self._function, constants, places)
        found: torch.Tensor = torch.ops.memo_runtime.flash_attention([arguments[at] for at in places], key)
        return found


@contextlib.contextmanager
def flash_stands_in() -> Iterator[None]:
    """Trace flash-attn's Functions as one operator each, where the library is loaded."""
    module = sys.modules.get(_MODULE)
    found = [getattr(module, name) for name in _CLASSES if hasattr(module, name)]
    for function in found:
        function.apply = _StandIn(function)
    try:
        yield
    finally:
        for function in found:
            del function.apply
