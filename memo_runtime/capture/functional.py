"""A traced graph made into one of pure operators: no writes, no modes, no random draws, no views that may fail.

* An operator that writes to its argument becomes one that yields a new value (``writes.py``).
* A tensor that is made from Python data becomes an operator without arguments that makes it (``constants.py``).
* Dropout becomes a product with a mask that is an input of the graph: a tile that is rebuilt, in another segment or in
  backward, must drop the same elements.
* ``view`` becomes ``reshape``: a tile of a tensor has gaps in memory where the whole has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memo_runtime.blocks.operators import pin_kind
from memo_runtime.capture.constants import lift_constants
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.capture.trace import NEEDS_GRAD, Trace
from memo_runtime.capture.writes import without_writes
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import PinKind

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Draw:
    """A dropout mask that tiles are given.

    Args:
        mask: its placeholder.
        drop: probability of a zero.
        call: number of the dropout among those of the block, in the order of its own calls.
    """

    mask: fx.Node
    drop: float
    call: int


def make_functional(trace: Trace) -> tuple[Draw, ...]:
    """Rewrite ``trace.graph`` in place.

    Raises:
        CaptureRefusedError: it writes to an argument, a parameter or a buffer, draws random numbers otherwise than by
            dropout, or switches gradients or autocast in a way that tiles could not follow.
    """
    graph = trace.graph
    lift_constants(graph)
    # Before modes, so that what was written with a gradient is seen to have one where it is read without.
    without_writes(graph, trace.token)
    _drop_modes(graph)
    draws = _lift_dropout(trace)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if pin_kind(str(node.target)) is PinKind.RANDOM:
            raise CaptureRefusedError(operator_name(node), "it draws random numbers that a tile cannot draw again")
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return tuple(draw for draw in draws if draw.mask.users)


def _drop_modes(graph: fx.Graph) -> None:
    """Remove switches of grad mode around operators that need no gradient."""
    enabled = True
    differentiable: set[fx.Node] = set()
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name == "_set_grad_enabled":
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and name in ("_enter_autocast", "_exit_autocast"):
            if name == "_enter_autocast" and (node.args[2] or torch.is_autocast_enabled(str(node.args[0]))):
                raise CaptureRefusedError("torch.autocast", "it is switched inside the block")
            node.replace_all_uses_with(node)
            _erase_autocast(graph, node, name)
        elif node.op == "placeholder":
            if node.meta[NEEDS_GRAD]:
                differentiable.add(node)
        elif any(source in differentiable for source in node.all_input_nodes) and node.op == "call_function":
            if not enabled and _floating(node.meta.get("val")) and name != "detach":
                raise CaptureRefusedError(operator_name(node), "it runs without gradients inside the block")
            if node.target is not aten.detach.default and _floating(node.meta.get("val")):
                differentiable.add(node)


def _erase_autocast(graph: fx.Graph, node: fx.Node, name: str) -> None:
    for user in list(node.users) if name == "_enter_autocast" else []:
        graph.erase_node(user)
    if not node._erased:
        graph.erase_node(node)


def _floating(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(one, torch.Tensor) and (one.is_floating_point() or one.is_complex()) for one in values)


def _lift_dropout(trace: Trace) -> list[Draw]:
    """Replace dropouts by products with given masks; a dropout that is off goes away."""
    graph = trace.graph
    draws: list[Draw] = []
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if operator_name(node) not in ("aten.dropout", "aten.feature_dropout", "aten.native_dropout"):
            continue
        named = arguments_of(node)
        source, drop = named["input"], float(named["p"])
        if operator_name(node) != "aten.dropout":
            raise CaptureRefusedError(operator_name(node), "it draws random numbers that a tile cannot draw again")
        if not named["train"] or drop == 0.0:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            continue
        value = node.meta["val"]
        with graph.inserting_before(first):
            mask = graph.placeholder(f"mask_{len(draws)}")
        mask.meta[NEEDS_GRAD] = False
        with trace.fake_mode:
            mask.meta["val"] = torch.empty(value.shape, dtype=torch.bool, device=value.device)
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (mask, value.dtype))
            scaled = graph.call_function(aten.mul.Scalar, (cast, 0.0 if drop == 1.0 else 1.0 / (1.0 - drop)))
            product = graph.call_function(aten.mul.Tensor, (source, scaled))
        for made in (cast, scaled, product):
            made.meta["val"] = value
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        draws.append(Draw(mask, drop, len(draws)))
    return draws
