"""Weights and gradients of decoder layers in the places of Hugging Face's and of Megatron-core's.

Megatron joins what one product can do: the heads of queries, keys and values group by group (as many groups as there
are key heads), the gate and what it gates one after the other. Nothing else differs but names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
#: Megatron's module -> those of Hugging Face's layers that it joins: Llama's, and Starcoder 2's.
_GATED = {"mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"), "mlp.linear_fc2": ("mlp.down_proj",)}
_PLAIN = {"mlp.linear_fc1": ("mlp.c_fc",), "mlp.linear_fc2": ("mlp.c_proj",)}
_REST = {
    "self_attention.linear_qkv": _ATTENTION,
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "input_layernorm": ("input_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
}


@dataclass(frozen=True, slots=True)
class Joined:
    """One parameter of a layer of Megatron's.

    Attributes:
        name: Megatron's. parts: Hugging Face's, in order, and rows: how many each has.
        groups: of rows that are together; 1: the parts are one after the other.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    groups: int

    def join(self, there: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parameter, from its parts by Hugging Face's names."""
        return torch.cat([there[part].unflatten(0, (self.groups, -1)) for part in self.parts], 1).flatten(0, 1)

    def split(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its parts by Hugging Face's names; of its gradient as of itself."""
        sizes = [rows // self.groups for rows in self.rows]
        parts = whole.unflatten(0, (self.groups, -1)).split(sizes, 1)
        return {name: part.flatten(0, 1) for name, part in zip(self.parts, parts, strict=True)}


def joined(layer: nn.Module, *, gated: bool, kv_heads: int) -> tuple[Joined, ...]:
    """How the parameters of ``layer``, one of Hugging Face's, are joined.

    Raises:
        ValueError: it has parameters that have no place in Megatron's.
    """
    sizes = {name: parameter.shape[0] for name, parameter in layer.named_parameters()}
    found = tuple(_joined(sizes, {**_REST, **(_GATED if gated else _PLAIN)}, kv_heads))
    left = sizes.keys() - {part for one in found for part in one.parts}
    if left:
        raise ValueError(f"Megatron's local spec has no place for {', '.join(sorted(left))}")
    return found


def _joined(sizes: Mapping[str, int], modules: Mapping[str, tuple[str, ...]], kv_heads: int) -> Iterator[Joined]:
    for name, parts in modules.items():
        for kind in ("weight", "bias"):
            named = tuple(f"{part}.{kind}" for part in parts)
            if all(one in sizes for one in named):
                groups = kv_heads if parts == _ATTENTION else 1
                yield Joined(f"{name}.{kind}", named, tuple(sizes[one] for one in named), groups)
