"""Matrix products of half precision on the CPU, in float32.

A processor without instructions for bfloat16 takes several times as long for a product in it as for one in float32, and
a block that is tried for its structure is run many times: nearly all of that time is in products. Kernels sum in
float32 and round the result, which is what is done here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.dispatch import OutsideCompiled

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_HALF = (torch.bfloat16, torch.float16)


class ProductsInFloat32(OutsideCompiled):
    """While it is entered, products of tensors in half precision on the CPU are those of float32, rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, its factors in float32 where they are to be."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or any(not _is_half(one) for one in args):
            return func(*args, **kwargs)
        return func(*(one.float() for one in args), **kwargs).to(args[0].dtype)


def _is_half(value: Any) -> bool:
    return type(value) in (torch.Tensor, nn.Parameter) and value.dtype in _HALF and value.device.type == "cpu"
