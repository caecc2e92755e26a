"""What a call by tiles does at its mixers: attention, all heads at once or group by group, and operators with a name.

By groups of heads (``tiled_heads.py``) only one group of what is marked * is there at full length:

    forward    for group: segment -> q*, k*, v* | attention -> o* -> its place in o
    backward   for group: segment -> q*, k*, v* | attention: o*, do* -> dq*, dk*, dv*
                          dq* over do, dk* and dv* over o, of whose heads these were read for the last time

so that the worst moment of a block with grouped heads has x, o, dx, do and one group's tensors, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.rules import arguments_of
from memo_runtime.capture.split import Mixer
from memo_runtime.execution.mixers.attention import (
    SPANS,
    Inputs,
    Kernel,
    Saved,
    Settings,
    Tensors,
    attention_backward,
    attention_forward,
    has_lse,
)
from memo_runtime.execution.mixers.by_graph import MixerGraph, run_with_graph
from memo_runtime.execution.mixers.registered import kernel_name, mixer_operator
from memo_runtime.execution.tiled_gradients import Gradients
from memo_runtime.execution.tiled_heads import HEADS, Grouping, Heads, all_heads
from memo_runtime.execution.tiled_random import mixed_seed
from memo_runtime.execution.tiled_rows import without_gaps

Values = dict[fx.Node, Any]
_NAMES = ("query", "key", "value", "attn_mask")


@dataclass(slots=True)
class Mixing:
    """The mixers of one call.

    Args:
        captured, tokens, seed, autocast, reproducible: as in ``tiled_run.Run``.
        kernels: of attention that were fastest when timed, by signature and mixer.
    """

    captured: Captured
    kernels: Mapping[tuple[str, str], Kernel]
    tokens: int
    seed: int
    autocast: AutocastState
    reproducible: bool
    saved: dict[fx.Node, Saved] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def attention_seed(self, number: int) -> int:
        """Seed of the dropout of attention number ``number``."""
        return mixed_seed(self.seed, number, -1)

    # ---- all heads at once

    def forward(self, mixer: Mixer, values: Values) -> None:
        """Results of ``mixer``, into ``values``."""
        if mixer.by_graph:
            self._forward_by_graph(mixer, values)
            return
        inputs, settings = self._attention(mixer, values)
        output, saved = self._attend(mixer, inputs, settings, self.attention_seed(len(self.saved)))
        values[mixer.node] = output
        self.saved[mixer.node] = saved
        self.names.append(saved.kernel.text())

    def backward(self, mixer: Mixer, values: Values, found: Gradients, *, retain: bool) -> None:
        """Gradients of what ``mixer`` was given, into ``found``."""
        if mixer.by_graph:
            self._backward_by_graph(mixer, values, found, retain=retain)
            return
        grad = found.take(mixer.node)
        if grad is None:
            return
        inputs, settings = self._attention(mixer, values)
        output = values[mixer.node]
        grads = attention_backward(grad.to(output.dtype), inputs, output, self.saved[mixer.node], settings)
        named = arguments_of(mixer.node)
        for name, one in zip(_NAMES, grads, strict=True):
            if named[name] is not None and one is not None:
                found.add(named[name], one.to(values[named[name]].dtype))

    def _attend(self, mixer: Mixer, inputs: Inputs, settings: Settings, seed: int) -> tuple[torch.Tensor, Saved]:
        if mixer.by_graph:
            return attention_forward(inputs, settings, seed=seed, kernel=Kernel(SPANS))
        biased = arguments_of(mixer.node)["attn_mask"] in self.captured.stages.differentiable
        by_rows = biased or (self.reproducible and settings.dropout > 0.0)
        kernel = self.kernels.get((self.captured.signature, mixer.node.name))
        return attention_forward(inputs, settings, seed=seed, by_rows=by_rows, kernel=kernel)

    def _attention(self, mixer: Mixer, values: Values) -> tuple[Inputs, Settings]:
        """What attention is given."""
        named = arguments_of(mixer.node)
        query, key, value = (self._cast(values[named[name]]) for name in _NAMES[:3])
        mask = values[named["attn_mask"]] if named["attn_mask"] is not None else None
        return Inputs(query, key, value, _alike(mask, query)), Settings.of(named, query.shape[-1])

    def _part(self, how: Grouping, values: Values, group: Heads) -> tuple[Inputs, Settings]:
        """What a group of heads is given; of values that are sliced there is no more."""
        named = arguments_of(how.mixer.node)
        tensors = []
        for name in _NAMES[:3]:
            one = values[named[name]]
            tensors.append(self._cast(one if named[name] in how.sliced else without_gaps(group.of(one))))
        query, key, value = tensors
        mask = _alike(values[how.mask] if how.mask is not None else None, query)
        return Inputs(query, key, value, group.of_mask(mask)), Settings.of(named, query.shape[-1])

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """What autocast makes of an argument of attention."""
        for kind, enabled, dtype in self.autocast.settings:
            if kind == tensor.device.type and enabled and tensor.dtype != torch.float64:
                return tensor.to(dtype)
        return tensor

    # ---- by groups of heads

    def forward_by_groups(
        self, how: Grouping, groups: int, values: Values, make: Callable[[Heads], None]
    ) -> None:
        """As ``forward``; ``make`` puts a group's queries, keys and values into ``values``."""
        node, seed = how.result, self.attention_seed(len(self.saved))
        parts: list[Saved] = []
        lse: torch.Tensor | None = None
        for group in how.groups(groups):
            make(group)
            inputs, settings = self._part(how, values, group)
            output, saved = self._attend(how.mixer, inputs, settings, mixed_seed(seed, group.number))
            if group.number == 0:
                values[node] = all_heads(output, groups, output.dtype)
            group.of(values[node]).copy_(output)
            if has_lse(saved):
                first = saved.tensors[0]
                assert first is not None, "a kernel that has one yields it first"
                if lse is None:
                    lse = first.new_empty(first.shape[0], first.shape[1] * groups, *first.shape[2:])
                group.of(lse).copy_(first)
                saved.tensors = saved.tensors[1:]
            parts.append(saved)
            del inputs, output, saved
            self._drop(how, values)
        rest = [one for part in parts for one in part.tensors]
        numbers = tuple(part.numbers for part in parts)
        self.saved[how.mixer.node] = Saved(parts[0].kernel, tuple(rest if lse is None else [lse, *rest]), numbers)
        self.names.append(parts[0].kernel.text(groups))

    def backward_by_groups(
        self, how: Grouping, groups: int, values: Values, found: Gradients, make: Callable[[Heads], None],
        *, retain: bool,
    ) -> None:  # fmt: skip
        """As ``backward``; with ``retain`` the result stays as it is for another one."""
        grad, owned = found.take_owned(how.result)
        if grad is None:
            return
        output = values[how.result]
        named = arguments_of(how.mixer.node)
        places = _places(how, output, grad if owned else None, retain=retain)
        for group in how.groups(groups):
            make(group)
            inputs, settings = self._part(how, values, group)
            parts = [without_gaps(group.of(one)) for one in (grad.to(output.dtype), output)]
            saved = _group_of(self.saved[how.mixer.node], group)
            grads = attention_backward(parts[0], inputs, parts[1], saved, settings)
            del inputs, parts, saved
            for name, one in zip(_NAMES[:3], grads, strict=False):
                assert one is not None, "attention has gradients of queries, keys and values"
                if name not in places:
                    places[name] = all_heads(one, groups, values[named[name]].dtype)
                group.of(places[name]).copy_(one)
            del grads, one
            self._drop(how, values)
        for name, place in places.items():
            found.add(named[name], place)

    def _drop(self, how: Grouping, values: Values) -> None:
        for node in how.sliced:
            del values[node]

    # ---- operators that the user has named

    def _forward_by_graph(self, mixer: Mixer, values: Values) -> None:
        wanted = [node in self.captured.stages.differentiable for node in mixer.inputs]
        operator = mixer_operator(self.captured, mixer, self.tokens, self.autocast)
        arguments, held = [values[node] for node in mixer.inputs], [at for _, at in mixer.results]
        results, stash, graph = run_with_graph(operator, arguments, wanted, held)
        for node, at in mixer.results:
            values[node] = results[at]
        self.saved[mixer.node] = Saved(Kernel(kernel_name(mixer)), tuple(stash), (graph,))
        self.names.append(kernel_name(mixer))

    def _backward_by_graph(self, mixer: Mixer, values: Values, found: Gradients, *, retain: bool) -> None:
        saved = self.saved[mixer.node]
        graph: MixerGraph = saved.numbers[0]
        grads: list[torch.Tensor | None] = [None] * len(graph.edges)
        for node, at in mixer.results:
            grad = found.take(node)
            grads[at] = grad.to(values[node].dtype) if grad is not None else None
        arguments, results = [values[node] for node in mixer.inputs], [values[node] for node, _ in mixer.results]
        stash: Any = saved.tensors
        given = graph.backward(grads, arguments, results, stash, retain=retain)
        for node, grad in zip(mixer.inputs, given, strict=True):
            if grad is not None:
                found.add(node, grad.to(values[node].dtype))


def _alike(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A mask that is added, in the dtype of the queries; any other as it is."""
    return mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask


def _places(
    how: Grouping, output: torch.Tensor, grad: torch.Tensor | None, *, retain: bool
) -> dict[str, torch.Tensor]:
    """Memory for gradients, by argument, where some is there: over the result, and over its gradient ``grad``.

    Of each group both are read before they are written. Of the heads of queries that share one of keys the first two
    have places in the result that take the gradients of that head's keys and values.
    """
    places: dict[str, torch.Tensor] = {}
    if how.over_gradient and grad is not None and grad.dtype == output.dtype:
        places["query"] = grad
    if not retain:
        shares = output.unflatten(HEADS, (how.heads, how.shared))
        places |= {name: shares.select(HEADS + 1, place) for place, name in enumerate(how.over_result)}
    return places


def _group_of(saved: Saved, group: Heads) -> Saved:
    """What the forward of one group left."""
    tensors, lse = list(saved.tensors), list[torch.Tensor | None]()
    if has_lse(saved):
        first = tensors.pop(0)
        assert first is not None, "a kernel that has one yields it first"
        lse.append(without_gaps(group.of(first)))
    each = len(tensors) // group.count
    own: Tensors = (*lse, *tensors[group.number * each : (group.number + 1) * each])
    return Saved(saved.kernel, own, saved.numbers[group.number])
