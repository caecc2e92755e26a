"""PyTorch's fused kernels of attention: what they are called, and what stands in for their arithmetic.

A stand-in computes attention in which every token sees itself alone: the output is the value, and the gradient of the
output is that of the value. So what it yields is finite and as large as the real thing, and its forward and backward
belong to each other; it takes one pass over memory where the kernel takes tokens x tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Named = dict[str, Any]

#: Names of one argument in different kernels.
GRADS, MASKS = ("grad_out", "grad_out_"), ("attn_bias", "attn_mask")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One fused kernel.

    Attributes:
        name: what reports call it. operator: of its forward in ``aten``; that of its backward ends in ``_backward``.
        saved: what backward calls the first results of forward.
    """

    name: str
    operator: str
    saved: tuple[str, ...]

    @property
    def backward(self) -> str:
        """The operator of its backward."""
        return f"{self.operator}_backward"


_WITH_LENGTHS = (
    "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"
)  # fmt: skip

#: By device type.
KERNELS: Mapping[str, tuple[Kernel, ...]] = {
    "cpu": (Kernel("cpu", "_scaled_dot_product_flash_attention_for_cpu", ("out", "logsumexp")),),
    "cuda": (
        Kernel("cudnn", "_scaled_dot_product_cudnn_attention", _WITH_LENGTHS),
        Kernel("flash", "_scaled_dot_product_flash_attention", _WITH_LENGTHS),
        Kernel(
            "efficient",
            "_scaled_dot_product_efficient_attention",
            ("out", "logsumexp", "philox_seed", "philox_offset"),
        ),
    ),
}


def named_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Named:
    """All arguments of a call of operator ``func`` by name; a call leaves out those that have their default."""
    schema = func._schema
    named: Named = {one.name: one.default_value for one in schema.arguments if one.has_default_value()}
    named.update(zip((one.name for one in schema.arguments), args, strict=False))
    return named | dict(kwargs)


def call_named(kernel: Any, keyset: Any, func: Any, named: Mapping[str, Any]) -> Any:
    """Call the real ``kernel`` of ``func``."""
    arguments = func._schema.arguments
    args = [named[one.name] for one in arguments if not one.kwarg_only]
    return kernel.call_boxed(keyset, *args, **{one.name: named[one.name] for one in arguments if one.kwarg_only})


def forward_arguments(func: Any, named: Mapping[str, Any]) -> Named:
    """Arguments of a forward, ``func``, from those of a call of it or of its backward."""
    asked = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
    asked["compute_log_sumexp"] = True
    return {one.name: named.get(one.name, asked.get(one.name)) for one in func._schema.arguments}


def first_of(named: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The argument that has one of ``names``; None if there is none."""
    return next((named[name] for name in names if name in named), None)


def fill_forward(named: Named, outputs: Sequence[Any]) -> None:
    """Write what forward yields: values, and as log-sum-exp that of equal scores."""
    value, output = named["value"], outputs[0]
    rows = min(value.shape[2], output.shape[2])
    by_group = output[:, :, :rows].unflatten(1, (value.shape[1], -1))
    by_group.copy_(value[:, :, :rows].unsqueeze(2).expand_as(by_group))
    output[:, :, rows:].zero_()
    if outputs[1] is not None and outputs[1].numel():
        outputs[1].fill_(math.log(max(1, value.shape[2])))


def fill_backward(named: Named, outputs: Sequence[Any]) -> None:
    """Write the gradients: queries, keys and a mask have none, values that of the output."""
    value = outputs[2]
    for one in (*outputs[:2], *outputs[3:]):
        if isinstance(one, torch.Tensor):
            one.zero_()
    if value is None:
        return
    grad = first_of(named, GRADS)
    rows = min(value.shape[2], grad.shape[2])
    by_group = grad[:, :, :rows].unflatten(1, (value.shape[1], -1))
    value[:, :, rows:].zero_()
    if by_group.shape[2] == 1:
        value[:, :, :rows].copy_(by_group[:, :, 0])
    else:
        torch.sum(by_group, dim=2, out=value[:, :, :rows])
