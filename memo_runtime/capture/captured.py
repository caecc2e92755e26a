"""A captured block: its stages, and where their inputs come from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.utils import _pytree

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.capture.dims import Reading, may_be_front, may_be_square, token_dims
from memo_runtime.capture.functional import Draw, make_functional
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.capture.split import DROPOUT, MIXERS, PRODUCTS, Mixer, Segment, Stages, split
from memo_runtime.capture.trace import ARGUMENTS, FORWARD, Trace, trace
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.records import TokenAxis

T = TypeVar("T")
#: Held while graphs are traced or asked for symbolic sizes: what PyTorch's tracer writes to belongs to the process, and
#: two threads may train two models. Not while anything goes backward, which on a GPU is another thread's.
TRACING = threading.RLock()


@dataclass(frozen=True, slots=True)
class Captured:
    """One block under one key (``key.py``).

    Args:
        traced: the graph and what its placeholders are.
        stages: what runs when.
        draws: dropout masks that tiles are given.
        outputs: leaves of what the block yields: a node, or a constant.
        states: (placeholder, name) of each parameter and buffer that is used.
        arguments: (placeholder, leaf index) of each tensor argument that is used.
        signature: equal for blocks whose programs may be shared.
        input_leaf: leaf of the input hidden state.
        token_dim: dimension of its tokens.
        reading: how the tokens of arguments are found.
    """

    traced: Trace
    stages: Stages
    draws: tuple[Draw, ...]
    outputs: tuple[Any, ...]
    states: tuple[tuple[fx.Node, str], ...]
    arguments: tuple[tuple[fx.Node, int], ...]
    signature: str
    input_leaf: int
    token_dim: int
    reading: Reading
    _known: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def once(self, found: Callable[..., T], *arguments: Any) -> T:
        """``found(self, *arguments)``, asked for once: what calls want to know of a capture does not change."""
        key = (found, *arguments)
        if key not in self._known:
            self._known[key] = found(self, *arguments)
        known: T = self._known[key]
        return known

    @property
    def mixers(self) -> int:
        """How many operators that mix tokens it has."""
        return sum(isinstance(stage, Mixer) or stage.by_rows for stage in self.stages.stages)

    @property
    def random(self) -> bool:
        """It drops elements."""
        return self.once(_is_random)

    @property
    def goes_backward(self) -> bool:
        """What it yields needs a gradient, which nothing of a frozen block behind nothing that is trained does."""
        return self.once(_goes_backward)

    @property
    def attentions(self) -> tuple[fx.Node, ...]:
        """Attention as one operator."""
        return tuple(stage.node for stage in self.stages.stages if isinstance(stage, Mixer) and not stage.by_graph)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stages that run token by token."""
        return tuple(stage for stage in self.stages.stages if isinstance(stage, Segment) and not stage.by_rows)

    def segment(self, index: int) -> Segment:
        """Stage number ``index``, which is one."""
        stage = self.stages.stages[index]
        assert isinstance(stage, Segment), "only segments have programs"
        return stage

    def tokens(self, call: BlockCall) -> int:
        """The number of tokens of ``call``."""
        source: torch.Tensor = call.leaves[self.input_leaf]
        return int(source.shape[self.token_dim])

    def holds(self, call: BlockCall) -> bool:
        """It serves ``call``, whose key is its own: the length is allowed, and nothing outside has changed."""
        return self.traced.allows(self.tokens(call)) and not self.traced.outside.changed()

    def read_states(self, block: nn.Module) -> list[torch.Tensor]:
        """The live parameters and buffers, in the order of ``states``."""
        return [_read(block, _path(name)) for _, name in self.states]

    def size(self, value: Any, tokens: int) -> Any:
        """A traced size for a number of tokens."""
        return self.traced.token.at(value, tokens)


def _is_random(captured: Captured) -> bool:
    return bool(captured.draws) or any(arguments_of(node)["dropout_p"] for node in captured.attentions)


def _goes_backward(captured: Captured) -> bool:
    return any(isinstance(node, fx.Node) and node in captured.stages.differentiable for node in captured.outputs)


@lru_cache(maxsize=1 << 12)
def _path(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _read(block: nn.Module, path: Sequence[str]) -> torch.Tensor:
    """By the tables of modules: to ask modules themselves, and for paths, takes longer, at every call."""
    module: Any = block
    *owners, last = path
    for name in owners:
        module = module._modules[name]
    for table in (module._parameters, module._buffers):
        if last in table:
            tensor: torch.Tensor = table[last]
            return tensor
    found: torch.Tensor = getattr(module, last)
    return found


def capture(block: nn.Module, call: BlockCall, forward: Callable[..., Any] | None = None) -> Captured:
    """Capture ``block`` for calls like ``call``; see ``trace``.

    Raises:
        CaptureRefusedError: it cannot be executed by tiles; names the operator or object that stands against it.
    """
    try:
        found = _one_way(block, call, forward, front=False)
        if not (may_be_front(call) and _goes_across(found)):
            return found
    except CaptureRefusedError as error:
        if not may_be_front(call) or error.operator not in (ARGUMENTS, FORWARD, DROPOUT, *MIXERS):
            raise
        try:
            front = _one_way(block, call, forward, front=True)
        except CaptureRefusedError:
            raise error from None
        if not front.mixers:
            raise
        return front
    try:
        front = _one_way(block, call, forward, front=True)
    except CaptureRefusedError as error:
        raise CaptureRefusedError(error.operator, f"{error.reason}{_IN_FRONT}") from error
    return front if front.mixers else found


_IN_FRONT = (
    " (its attention goes along the first dimension of its input, so its tokens are taken to be there; with batches in "
    "front, batch_first=True, they are in the second)"
)


def _goes_across(captured: Captured) -> bool:
    """Attention is in it, and each one's tokens are no tokens of ours but sequences beside each other."""
    return not captured.mixers and any(
        _is_across(node, captured.stages.axes) for segment in captured.segments for node in segment.nodes
    )


def _is_across(node: fx.Node, axes: Mapping[fx.Node, Any]) -> bool:
    """``node`` makes products of queries and keys whose tokens are neither rows nor columns of them."""
    name = operator_name(node)
    if name not in (*MIXERS, *PRODUCTS):
        return False
    named = arguments_of(node)
    first, second = list(named)[:2] if name != "aten.baddbmm" else ("batch1", "batch2")
    pairs = ((axes.get(named[one]), named[one].meta["val"].dim()) for one in (first, second))
    return all(isinstance(axis, TokenAxis) and axis.dim < count - 2 for axis, count in pairs)


def _one_way(
    block: nn.Module, call: BlockCall, forward: Callable[..., Any] | None, *, front: bool
) -> Captured:
    """The capture with tokens where they usually are, or in ``front``."""
    try:
        return _one_reading(block, call, forward, Reading(front))
    except CaptureRefusedError as error:
        if not may_be_square(call, front):
            raise
        try:
            return _one_reading(block, call, forward, Reading(front, square=True))
        except CaptureRefusedError:
            raise error from None


def _one_reading(
    block: nn.Module, call: BlockCall, forward: Callable[..., Any] | None, reading: Reading
) -> Captured:
    try:
        return _capture(block, call, forward, reading)
    except Exception as error:  # a graph may hold anything that a block makes, such as wrappers of torch.vmap
        pass_on(error)
        raise CaptureRefusedError(FORWARD, f"it cannot be captured: {first_line(error)}") from error


def _capture(
    block: nn.Module, call: BlockCall, forward: Callable[..., Any] | None, reading: Reading
) -> Captured:
    traced = trace(block, call, forward, reading)
    draws = make_functional(traced)
    stages = split(traced.graph, traced.token, draws)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder" and node.name[:5] != "mask_"]
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    count = len(traced.states)
    return Captured(
        traced=traced,
        stages=stages,
        draws=draws,
        outputs=tuple(_pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: leaf is None)),
        states=_used(placeholders[:count], traced.states),
        arguments=_used(placeholders[count:], traced.leaves),
        signature=_signature(traced, stages),
        input_leaf=call.input_leaf or 0,
        token_dim=token_dims(call, reading)[1][call.input_leaf or 0][0],
        reading=reading,
    )


def _signature(traced: Trace, stages: Stages) -> str:
    lines = [str([stage.node.name for stage in stages.stages if isinstance(stage, Mixer)])]
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        shape: Any = ""
        if isinstance(value, torch.Tensor):
            shape = ([traced.token.text(size) for size in value.shape], value.dtype, value.device)
        lines.append(f"{node.format_node()} {shape} {node in stages.differentiable}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _used(nodes: Iterable[fx.Node], names: Iterable[Any]) -> tuple[tuple[fx.Node, Any], ...]:
    return tuple((node, name) for node, name in zip(nodes, names, strict=True) if node.users)
