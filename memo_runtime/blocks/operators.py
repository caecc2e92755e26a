"""What is known about operators by name: which mix tokens, which draw random numbers, and what they cost.

Names are those of overloads at dispatch level (``aten.bmm.default``). Operators that are not listed are judged by
comparing a run on a token slice with the run on the whole sequence (profiling/slicing.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from memo_runtime.blocks.spans import layout_of
from memo_runtime.records import PinKind

_MIXER_MARKS = (
    "scaled_dot_product",
    "_flash_attention",
    "flash_attn",
    "_efficient_attention",
    "cudnn_attention",
    "flex_attention",
    "fused_attn",
    "selective_scan",
    "causal_conv1d",
)
#: Random operators that PyTorch does not tag as such.
_UNTAGGED_RANDOM = ("random", "random_", "binomial", "_sample_dirichlet")
_ROUTING_NAMES = ("topk",)

#: Operators that mix along some dimension whatever their values. Whether that is the token dimension, and whether they
#: happen to be the identity today, cannot be told from results, so they are always pinned.
_ALONG_A_DIMENSION = (
    "_cudnn_rnn", "miopen_rnn",
    "convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "_slow_conv2d_forward",
    "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "constant_pad_nd",
    "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update",
    "_fft_c2c", "_fft_r2c", "_fft_c2r", "avg_pool1d", "avg_pool2d", "max_pool2d_with_indices", "im2col", "col2im",
    "upsample_nearest1d", "upsample_linear1d", "reflection_pad1d", "replication_pad1d",
)  # fmt: skip

#: Attention under spans (``execution/mixers/masked.py``), which is treated like an operator that the user has named.
MASKED_ATTENTION = "memo_runtime.masked_attention"
_NAMED_HERE = frozenset({MASKED_ATTENTION, f"{MASKED_ATTENTION}_backward"})
#: Mixers registered by the user with memo.register_mixer: qualified operator names without overload.
_registered_mixers: set[str] = set()


@cache
def full_name(func: Any) -> str:
    """Name of an overload or of an operator with all its overloads, which PyTorch would put together at every call."""
    return str(func)


def base_name(name: str) -> str:
    """Operator of an overload name: ``aten.bmm.default`` -> ``bmm``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def register_mixer_operator(name: str) -> None:
    """Treat operator ``namespace::name`` (or ``namespace.name``) as one that mixes tokens."""
    _registered_mixers.add(name.replace("::", "."))


def is_registered_mixer(name: str) -> bool:
    """``name`` (an overload) was named as one that mixes tokens, by the user or here."""
    base = name.rsplit(".", 1)[0]
    return any(one in _registered_mixers or one in _NAMED_HERE for one in (name, base))


def registered_mixers() -> frozenset[str]:
    """All that were named, at this point."""
    return _NAMED_HERE | _registered_mixers


def pin_kind(name: str) -> PinKind | None:
    """Why the result of operator ``name`` must be saved rather than recomputed; None: it need not by its name."""
    known = _pin_kind_unnamed(name)
    return PinKind.MIXER if known is not PinKind.MIXER and is_registered_mixer(name) else known


@cache
def _pin_kind_unnamed(name: str) -> PinKind | None:
    """The same where nobody has named it."""
    base = base_name(name)
    if any(mark in name for mark in _MIXER_MARKS) and "backward" not in base:
        return PinKind.MIXER
    if base in _ALONG_A_DIMENSION:
        return PinKind.MIXER
    if draws(name) and "backward" not in base:
        return PinKind.RANDOM
    if base in _ROUTING_NAMES:
        return PinKind.ROUTING
    return None


@cache
def draws(name: str) -> bool:
    """Operator ``name`` (an overload) draws from PyTorch's generators, attention with dropout in it included."""
    if base_name(name) in _UNTAGGED_RANDOM:
        return True
    namespace, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    try:
        func = getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default")
    except AttributeError:  # no operator of a library: a higher-order one, or of a library that is not loaded
        return False
    return torch.Tag.nondeterministic_seeded in func.tags


def is_mutable(func: Any) -> bool:
    """The operator writes to an argument."""
    schema = getattr(func, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a mutable operator writes to."""
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """2 * B * H * S_q * S_k * (D_qk + D_v), the convention of torch.utils.flop_counter (no causal discount)."""
    batch, heads, queries, depth = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (depth + value.shape[-1])


def _attention_backward_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """The scores again, and a product each for the gradients of scores, queries, keys and values; same convention."""
    batch, heads, queries, depth = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * depth + 2 * value.shape[-1])


def _masked_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: torch.Tensor) -> int:
    """Of the pairs that see each other; of all where spans have no values (meta, fake)."""
    if type(spans) is not torch.Tensor or spans.device.type == "meta":
        return _attention_flops(query, key, value)
    visible = layout_of(spans, key.shape[2]).visible * len(query) // len(spans)
    return 2 * query.shape[1] * visible * (query.shape[3] + value.shape[3])


def operator_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of one dispatched call; 0 for operators that are not matrix products."""
    packet = getattr(func, "_overloadpacket", None)
    if packet is None:
        return 0
    name = full_name(packet)
    if name == MASKED_ATTENTION:
        return _masked_flops(*args[:4])
    formula = flop_registry.get(packet)
    # PyTorch's own formulas refuse grouped-query attention in some releases and lack the CPU's operator.
    if "scaled_dot_product" in name and "backward" not in name and len(args) >= 3:
        return _attention_flops(args[0], args[1], args[2])
    if "scaled_dot_product" in name and formula is not None:
        return _attention_backward_flops(args[1], args[2], args[3])
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if name == "aten._grouped_mm":
        return int(2 * args[0].shape[0] * args[0].shape[-1] * args[1].shape[-1])
    return 0
