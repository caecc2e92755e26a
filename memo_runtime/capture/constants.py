"""Tensors that a block makes from Python data (``torch.tensor([...])``, an index that is a list), as one operator.

A trace has such a tensor as an attribute of its module. Here its numbers become arguments of an operator: they are
part of the graph's text, so blocks share programs only where they are the same, and where the data are an attribute or
a global that changes, the block is captured again (``key.py``, ``blocks/outside.py``). What does not depend on tokens
is made once per call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import Library

from memo_runtime.capture.rules import operator_name
from memo_runtime.errors import CaptureRefusedError

aten = torch.ops.aten
#: More numbers are data rather than a setting, and belong into a buffer.
_MOST = 4096
_LIBRARY = Library("memo_runtime", "FRAGMENT")
_LIBRARY.define("constant(Scalar[] numbers, int[] shape, ScalarType dtype, Device device) -> Tensor")


class _Numbers(tuple[Any, ...]):
    """Equal to others only where they read the same: -0.0 is another number than 0."""

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@lru_cache(maxsize=64)
def _made(numbers: _Numbers, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The tensor, kept on its device: each copy from the host would wait for it."""
    with torch.inference_mode(mode=False):
        return torch.tensor(numbers, dtype=dtype, device=device).reshape(shape)


def _constant(numbers: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # A new one each time: compiled programs write over results of operators that nothing reads any more.
    return _made(_Numbers(numbers), tuple(shape), dtype, device).clone()


def _shape(numbers: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


_LIBRARY.impl("constant", _constant, "CompositeExplicitAutograd")
torch.library.register_fake("memo_runtime::constant", _shape, lib=_LIBRARY)


def lift_constants(graph: fx.Graph) -> None:
    """Replace attributes of the traced module in ``graph``.

    Raises:
        CaptureRefusedError: one is no tensor with numbers, or has too many.
    """
    for node in [one for one in graph.nodes if one.op == "get_attr"]:
        value = getattr(graph.owning_module, str(node.target), None)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            raise CaptureRefusedError(str(node.target), "it is part of the trace and no tensor made from Python data")
        if value.numel() > _MOST:
            reason = f"a tensor of {value.numel():,} numbers is made from Python data inside the block"
            raise CaptureRefusedError("torch.tensor", reason)
        device = _device(node, value.device)
        with graph.inserting_before(node):
            args = (value.flatten().tolist(), list(value.shape), value.dtype, device)
            made = graph.call_function(torch.ops.memo_runtime.constant.default, args)
        made.meta["val"] = node.meta["val"].to(device)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _device(node: fx.Node, own: torch.device) -> torch.device:
    """Where the values are that ``node`` is an index of, which would be copied there at every use."""
    users = list(node.users)
    if len(users) == 1 and operator_name(users[0]).startswith("aten.lift_fresh"):
        users = list(users[0].users)
    indexed = [user.args[0].meta["val"].device for user in users if operator_name(user) == "aten.index"]  # type: ignore
    return indexed[0] if indexed and len(set(indexed)) == 1 and len(indexed) == len(users) else own
