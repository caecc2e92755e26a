"""Attention as one operator of a trace, with a shape and nothing else.

``scaled_dot_product_attention`` chooses a kernel when it runs, by looking at sizes, strides and the device; each look
at a symbolic size is a condition, and some hold for one length only. So a trace never runs it: it runs an operator of
our own, which yields a result of the right shape, and the graph then says ``aten.scaled_dot_product_attention`` again.
What is captured is the same on every device, and the kernel is chosen when a block runs (``execution/mixers``).

Kernels take [batch, heads, tokens, features]. Attention of three dimensions (one head without a dimension of its own,
heads merged with sequences) is traced with a fourth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.library import Library

aten = torch.ops.aten
_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa, ScalarType dtype) -> Tensor"
)
#: Arguments of attention beside its tensors, in the order of the schema.
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip
_LIBRARY = Library("memo_runtime", "DEF")
_LIBRARY.define(_SCHEMA)


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *settings: Any) -> torch.Tensor:
    """The result, token-major in memory as projections leave queries, and fused kernels their results."""
    dtype = settings[-1]
    if query.dim() < 3:
        return query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=dtype)
    *batch, heads, tokens, _ = query.shape
    return query.new_empty((*batch, tokens, heads, value.shape[-1]), dtype=dtype).transpose(-3, -2)


torch.library.register_fake("memo_runtime::attention", _shape, lib=_LIBRARY)


def _standing_in(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """What a trace calls where the block calls attention."""
    given = _DEFAULTS | dict(zip(_DEFAULTS, rest, strict=False)) | named
    dtype, kind = query.dtype, query.device.type
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    tensors: list[torch.Tensor | None] = [query, key, value, given.pop("attn_mask")]
    back: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    if {one.dim() for one in (query, key, value)} == {3}:
        # Shared heads are counted in the last dimension but two.
        tensors, back = _with_another(tensors, 0 if given["enable_gqa"] else 1)
    rest = tuple(given[name] for name in _DEFAULTS if name in given)
    return back(torch.ops.memo_runtime.attention(*tensors, *rest, dtype))


def _as_it_is(result: torch.Tensor) -> torch.Tensor:
    return result


def _with_another(
    tensors: list[torch.Tensor | None], dim: int
) -> tuple[list[torch.Tensor | None], Callable[[torch.Tensor], torch.Tensor]]:
    """(tensors of attention with another dimension ``dim``, what takes it out of the result)."""

    def wide(one: torch.Tensor | None) -> torch.Tensor | None:
        return one.unsqueeze(dim) if one is not None and one.dim() == 3 else one

    return [wide(one) for one in tensors], lambda result: result.squeeze(dim)


#: For ``make_fx``: what to run in place of attention.
STAND_INS: dict[Any, Callable[..., Any]] = {aten.scaled_dot_product_attention.default: _standing_in}


def named_again(graph: fx.Graph) -> None:
    """Make ``aten.scaled_dot_product_attention`` of its stand-ins in ``graph``."""
    for node in graph.nodes:
        if node.target is torch.ops.memo_runtime.attention.default:
            query, key, value, mask, dropout, causal, scale, grouped, _ = node.args
            node.target = aten.scaled_dot_product_attention.default
            node.args = (query, key, value, mask, dropout, causal)
            node.kwargs = {"scale": scale, "enable_gqa": grouped}
