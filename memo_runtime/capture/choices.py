"""What a forward has chosen or drawn, and whatever runs again is given: choices of ``topk``, seeds of declared modules.

A segment *owns* the operators that are in none before it. In another one that computes the same value again, they are
*borrowed*: they run as the owner's did, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from memo_runtime.capture.declared import DECLARED
from memo_runtime.capture.split import Segment, Stages
from memo_runtime.records import TokenAxis

TOPK = torch.ops.aten.topk.default
TOKEN_WISE = torch.ops.memo_runtime.token_wise.default


def count_kept(node: fx.Node) -> int:
    """How many of the last results of ``node`` have to be given when it is run again."""
    if node.target is TOPK:
        return 1
    key: Any = node.args[1] if node.target is TOKEN_WISE else None
    return DECLARED[key].kept if key is not None else 0


def owned(stages: Stages, index: int) -> list[fx.Node]:
    """Operators of segment number ``index`` that choose there, in order."""
    before = {node for stage in stages.stages[:index] if isinstance(stage, Segment) for node in stage.nodes}
    return [node for node in _nodes(stages, index) if node not in before]


def borrowed(stages: Stages, index: int) -> list[tuple[fx.Node, int, int]]:
    """Operators of segment number ``index`` that another owns: (operator, that number, place among what it keeps)."""
    found = []
    for node in _nodes(stages, index):
        for other in range(index):
            before = owned(stages, other)
            if node in before:
                found.append((node, other, sum(count_kept(one) for one in before[: before.index(node)])))
    return found


def _nodes(stages: Stages, index: int) -> list[fx.Node]:
    stage = stages.stages[index]
    return [node for node in stage.nodes if count_kept(node)] if isinstance(stage, Segment) else []


def kept_values(stages: Stages, node: fx.Node) -> list[tuple[torch.Tensor, TokenAxis | None]]:
    """(traced value, where its tokens are) of what ``node`` leaves."""
    count = count_kept(node)
    axes: Any = stages.axes[node]
    return list(zip(node.meta["val"][-count:], axes[-count:], strict=True))


def run_again(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any], kept: Sequence[torch.Tensor]) -> list[Any]:
    """The results of ``node`` on ``args``, as ``kept`` says."""
    if node.target is TOPK:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        return [args[0].gather(dim, kept[0]), kept[0]]
    return [*torch.ops.memo_runtime.token_wise_again(args[0], list(kept), args[1]), *kept]
