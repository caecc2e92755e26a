"""Counting what a run on meta would cost a GPU: products, attention, and bytes of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks.operators import is_mutable, operator_flops
from memo_runtime.blocks.rerun import storage_key

#: A product of 16-bit matrices does as many FLOPs a byte as its smallest side has, where the others are far larger.
#: Below this it waits for memory on any GPU (an A100 has 150 FLOPs for each byte at its peaks, an H100 290).
_THIN, _FAR = 64, 8
#: Products by name, and where their two matrices are among the arguments.
_MATRICES = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.baddbmm": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOPs of matrix products and of attention (half of the square where it is causal), bytes read and written, and
    how many operators did it.
    """

    matmul: int = 0
    attention: int = 0
    traffic: int = 0
    operators: int = 0


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one attention: numbers of query and key heads, and bytes of q, k, v and the result for one token."""

    queries: int
    keys: int
    query_bytes: int
    key_bytes: int


class WorkMeter(TorchDispatchMode):
    """Counts while it is entered; ``take`` gives what came since."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._matmul = self._attention = self._traffic = self._operators = 0
        self.heads: list[Heads] = []

    def take(self) -> Work:
        """The work since the last call."""
        work = Work(
            matmul=self._matmul, attention=self._attention, traffic=self._traffic, operators=self._operators
        )  # fmt: skip
        self._matmul = self._attention = self._traffic = self._operators = 0
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count ``func``."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._operators += 1
        flops = operator_flops(func, args, kwargs, result)
        if not flops:
            self._traffic += _traffic(func, args, kwargs, result)
        elif "scaled_dot_product" in func.name() or "flash_attn" in func.name():
            self._attention += flops // 2 if _is_causal(func, args, kwargs) else flops
            if "backward" not in func.name():
                self._note_heads(args[0], args[1])
        else:
            self._matmul += flops
            self._traffic += _traffic(func, args, kwargs, result) if is_thin(func, args) else 0
        return result

    def _note_heads(self, query: torch.Tensor, key: torch.Tensor) -> None:
        rows, heads, _, width = query.shape
        size = rows * width * query.element_size()
        self.heads.append(Heads(heads, key.shape[1], heads * size, key.shape[1] * size))


def is_thin(func: Any, args: Sequence[Any]) -> bool:
    """Whether ``func`` is a product that takes as long as its bytes, and not its FLOPs, such as those of adapters."""
    first = _MATRICES.get(str(getattr(func, "_overloadpacket", "")))
    if first is None:
        return False
    left, right = args[first : first + 2]
    small, middle, _ = sorted((left.shape[-2], left.shape[-1], right.shape[-1]))
    return bool(small < _THIN and _FAR * small <= middle)


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" in kwargs:
        return bool(kwargs["is_causal"])
    position = names.index("is_causal") if "is_causal" in names else len(args)
    return bool(args[position]) if position < len(args) else False


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads and writes; views and fresh memory cost nothing."""
    read = {storage_key(t): t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    written = [t for t in _pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    if not is_mutable(func) and all(storage_key(tensor) in read for tensor in written):
        return 0
    if func.name().startswith(("aten::empty", "aten::new_empty")):
        return 0
    # What is expanded is read once.
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*read.values(), *written)
    )
