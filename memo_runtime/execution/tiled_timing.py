"""Seconds of a block by tiles, for a plan: a few tiles of it, and its attention at the length of the call.

    run of some tiles  -  attention at its length         =  the segments, on a line
    the same with their products kept                     =  what a kept token saves
    attention at the full length: few groups of heads, times the groups, and beyond half a million tokens continued

Attention is timed in rounds with as much of the rest as a step has (``blocks/stopwatch.py`` says why). Gradients are
random numbers: over ones, kernels draw less power and run faster than in a step (cuDNN's backward of attention over
65,536 tokens on an H100 by a tenth).
The programs are those that the step will use, so what they take to compile is not lost. What the weights take that is
the same at every length (casts, sums in float32) is in the line: it is small beside two long tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from memo_runtime.blocks.ambient import RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.failures import first_line
from memo_runtime.blocks.operators import MASKED_ATTENTION
from memo_runtime.blocks.stopwatch import LONGEST_ATTENTION, Beside, typical
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.dims import shortened
from memo_runtime.capture.rules import arguments_of, operator_name
from memo_runtime.capture.split import Mixer
from memo_runtime.config import longest_tile
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.compilers import NotCompiledError
from memo_runtime.execution.mixers.attention import (
    Inputs,
    Kernel,
    Settings,
    attention_backward,
    attention_forward,
    by_queries_allowed,
    kernels_for,
)
from memo_runtime.execution.tiled import TiledBlock, Way
from memo_runtime.records import Growth
from memo_runtime.units import format_seconds

logger = logging.getLogger("memo_runtime")

#: Tiles that are run: a step of as many is timed as it is.
_TIMED_TILES = {"cuda": 4, "cpu": 2}
#: Kernels are compared at this many tokens first, and those that take this much more than the fastest are left out.
_COMPARED_TOKENS, _HOPELESS = 2**16, 1.5
#: Queries of a chunk, and the share of the forward that chunks must save; less is no difference between two of them.
_CHUNKS, _WORTH = (2**16, 2**15, 2**14), 0.01
#: Chunks and the whole are compared at this many tokens at most: what is faster there is so beyond.
_CHUNKED_TOKENS = 2**18
#: Query rows (heads times tokens) that keep a device busy: fewer groups of heads are not timed.
_BUSY_ROWS = {"cuda": 2**20, "cpu": 2**8}


@dataclass(frozen=True, slots=True)
class TileTimes:
    """Seconds of a block by tiles with nothing kept, by tokens.

    ``segment``: of its segments' forward, by token. ``saved``: less in forward and backward, by kept token.
    """

    forward: Growth
    backward: Growth
    segment: float
    saved: float


def time_tiles(tiles: TiledBlock, captured: Captured, call: BlockCall, tile: int | None = None) -> TileTimes | None:
    """Time ``captured`` for calls like ``call``; ``tile``: tokens of a tile, where the user has fixed it.

    None: it mixes tokens in a way that cannot be timed at full length beside the model (a mask of all pairs of
    tokens, attention in chunks of queries, an operator that the user has named), or there is no room for it. Attention
    under spans is timed under those of ``call``, and taken to grow with tokens: with windows and documents it does.

    Raises:
        CaptureRefusedError: its programs do not compile.
    """
    mixers, masked = captured.attentions, _masked_in(captured)
    others = captured.mixers - len(mixers) - len(masked)
    if others or any(arguments_of(node)["attn_mask"] is not None for node in mixers):
        return None
    tokens = captured.tokens(call)
    hidden: torch.Tensor = call.leaves[captured.input_leaf]
    rows = max(1, hidden.numel() // hidden.shape[-1] // tokens)
    tile = min(tokens, longest_tile(rows) if tile is None else tile)
    device = hidden.device
    count = min(_TIMED_TILES.get(device.type, _TIMED_TILES["cpu"]), -(-tokens // tile))
    length, longest = min(tokens, count * tile), min(tokens, LONGEST_ATTENTION)
    if not captured.traced.allows(length):
        return None
    try:
        with RandomState.current(device).restored(), torch.enable_grad():
            attentions, kernels = [_Attention(captured, node) for node in mixers], tiles.programs.kernels
            for one in attentions:
                one.choose(kernels, longest)
            some = shortened(call, length, captured.reading)
            runs = _runs(tiles, captured, some, Way(tile=tile))
            block = _forward_and_backward(runs, device)
            saved = _saved(tiles, captured, some, tile, sum(block))
            # On a CPU nothing sets a clock by what runs beside.
            beside = Beside(length, partial(_run_all, runs)) if device.type == "cuda" else None
            full = [one.seconds(one.inputs(longest), kernels.get(one.key), beside) for one in attentions]
            under_spans = [one.seconds(call, beside) for one in masked]
            short = [*full, *under_spans] if length == tokens == longest else [
                *(one.seconds(one.inputs(length), kernels.get(one.key), beside) for one in attentions),
                *(one.seconds(some, beside) for one in masked),
            ]  # fmt: skip
    except torch.OutOfMemoryError as error:
        logger.info("memo: tiles are not timed, there is no room for it: %s", error)
        return None
    except NotCompiledError as error:
        raise CaptureRefusedError("TorchInductor", first_line(error)) from error
    rest = [max(0.0, block[way] - sum(one[way] for one in short)) / length for way in (0, 1)]
    squared = [sum(one[way] for one in full) / longest**2 for way in (0, 1)]
    linear = [rest[way] + sum(one[way] for one in under_spans) / tokens for way in (0, 1)]
    forward, backward = (Growth(linear=linear[way], quadratic=squared[way]) for way in (0, 1))
    return TileTimes(forward, backward, rest[0], saved)


def _saved(tiles: TiledBlock, captured: Captured, call: BlockCall, tile: int, bare: float) -> float:
    """Seconds by token that kept products save of ``bare``: with all kept, or half where there is no room for all."""
    tokens = captured.tokens(call)
    count = -(-tokens // tile)
    kept, way, device = tokens, Way(tile=tile, alpha=1.0), call.leaves[captured.input_leaf].device
    try:
        took = _forward_and_backward(_runs(tiles, captured, call, way), device)
    except torch.OutOfMemoryError:
        if count == 1:
            raise
        kept, way = count // 2 * tile, Way(tile=tile, alpha=count // 2 / count)
        took = _forward_and_backward(_runs(tiles, captured, call, way), device)
    return max(0.0, bare - sum(took)) / kept


def _forward_and_backward(runs: Sequence[Callable[[], None]], device: torch.device) -> tuple[float, float]:
    """Seconds of ``_runs``."""
    forward, backward = typical(runs, device, (0, 2))
    return forward, backward


def _run_all(runs: Sequence[Callable[[], None]]) -> None:
    with torch.enable_grad():
        for run in runs:
            run()


def _runs(tiles: TiledBlock, captured: Captured, call: BlockCall, way: Way) -> list[Callable[[], None]]:
    """Forward, what makes random gradients of its results, and backward; no ``.grad`` is touched."""
    inputs = [leaf for _, leaf in call.tensors() if leaf.requires_grad]
    inputs += [one for one in tiles.block.parameters() if one.requires_grad]
    outputs: list[Any] = []
    results: list[torch.Tensor] = []

    def forward() -> None:
        outputs.append(tiles.run(captured, call, way))

    def between() -> None:
        leaves = leaves_of(outputs.pop())
        results.extend(one for one in leaves if isinstance(one, torch.Tensor) and one.requires_grad)
        outputs.extend(torch.randn_like(one) for one in results)

    def backward() -> None:
        _gradients(results, inputs, outputs)
        results.clear()
        outputs.clear()

    return [forward, between, backward]


def _gradients(results: list[torch.Tensor], inputs: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    if results and inputs:
        torch.autograd.grad(results, inputs, given, allow_unused=True)


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention of a block, timed by as many groups of heads as keep the device busy, and scaled to all."""

    captured: Captured
    node: fx.Node

    @property
    def key(self) -> tuple[str, str]:
        """What its kernel is remembered by."""
        return self.captured.signature, self.node.name

    def inputs(self, tokens: int) -> Inputs:
        """Random queries, keys and values of some groups of heads of one sequence."""
        shapes = self._shapes(tokens)
        groups, timed = shapes["key"][1], self._timed(tokens)
        query, key, value = (
            _random([1, shape[1] * timed // groups, *shape[2:]], self.node.meta["val"]) for shape in shapes.values()
        )
        return Inputs(query, key, value, None)

    def _shapes(self, tokens: int) -> dict[str, list[int]]:
        named = arguments_of(self.node)
        return {name: [int(self.captured.size(size, tokens)) for size in named[name].meta["val"].shape]
                for name in ("query", "key", "value")}  # fmt: skip

    def _timed(self, tokens: int) -> int:
        shapes = self._shapes(tokens)
        groups = shapes["key"][1]
        busy = _BUSY_ROWS.get(self.node.meta["val"].device.type, _BUSY_ROWS["cpu"])
        return min(groups, -(-busy * groups // (tokens * shapes["query"][1])))

    def choose(self, kernels: dict[tuple[str, str], Kernel], tokens: int) -> None:
        """Tell ``kernels`` the fastest one at ``tokens`` tokens."""
        inputs = self.inputs(tokens)
        names = self._promising(tokens, list(kernels_for(inputs, self._settings(inputs))))
        found = {Kernel(name): self.seconds(inputs, Kernel(name)) for name in names} if len(names) > 1 else {}
        chosen = min(found, key=lambda kernel: sum(found[kernel])) if found else Kernel(names[0])
        chunked = self._by_chunks(chosen, tokens, found)
        for kernel, forward in chunked.items():
            if forward < (1.0 - _WORTH) * chunked[chosen]:
                chosen = kernel
        kernels[self.key] = chosen
        listed = ", ".join(f"{kernel.text()} {format_seconds(sum(one))}" for kernel, one in found.items())
        forwards = ", ".join(f"{kernel.text()} {format_seconds(one)}" for kernel, one in chunked.items())
        if found:
            logger.info("memo: attention over %d tokens, forward and backward: %s", tokens, listed)
        if chunked:
            logger.info("memo: attention over %d tokens, forward: %s", min(tokens, _CHUNKED_TOKENS), forwards)

    def _promising(self, tokens: int, names: list[str]) -> list[str]:
        """Those of ``names`` that may be the fastest at ``tokens`` tokens, by their times at fewer."""
        if tokens <= _COMPARED_TOKENS or len(names) == 1:
            return names
        inputs = self.inputs(_COMPARED_TOKENS)
        allowed = [name for name in kernels_for(inputs, self._settings(inputs)) if name in names]
        times = {name: sum(self.seconds(inputs, Kernel(name))) for name in allowed}
        return [name for name in names if name in times and times[name] <= _HOPELESS * min(times.values())] or names

    def _by_chunks(
        self, kernel: Kernel, tokens: int, found: Mapping[Kernel, tuple[float, float]]
    ) -> dict[Kernel, float]:
        """Seconds of the forward whole and with queries in chunks; empty: it does not go in chunks.

        Each is timed as a whole and with its backward, like kernels: alone and after a pause a chunk has a clock that
        the whole never has, and looks faster by a tenth than it is in a step. ``found``: what was timed at ``tokens``.
        """
        inputs = self.inputs(min(tokens, _CHUNKED_TOKENS))
        sizes = self._chunk_sizes(inputs, kernel.name)
        candidates = [kernel, *(Kernel(kernel.name, size) for size in sizes)] if sizes else []
        known = found if tokens <= _CHUNKED_TOKENS else {}
        return {one: (known.get(one) or self.seconds(inputs, one))[0] for one in candidates}

    def _chunk_sizes(self, inputs: Inputs, name: str) -> list[int]:
        """Those that are tried with kernel ``name``: of which there are three at least."""
        allowed = by_queries_allowed(name, inputs, self._settings(inputs))
        return [size for size in _CHUNKS if allowed and inputs.query.shape[2] >= 3 * size]

    def _settings(self, inputs: Inputs) -> Settings:
        return Settings.of(arguments_of(self.node), inputs.query.shape[-1])

    def seconds(self, inputs: Inputs, kernel: Kernel | None, beside: Beside | None = None) -> tuple[float, float]:
        """(forward, backward) of all heads of all sequences."""
        settings, device, times = self._settings(inputs), inputs.query.device, self._times(inputs)

        found: list[Any] = []

        def run() -> None:
            found.extend(attention_forward(inputs, settings, seed=0, kernel=kernel))

        def back() -> None:
            output, saved, grad = found
            attention_backward(grad, inputs, output, saved, settings)
            found.clear()

        with torch.no_grad():
            rest = beside.runs(inputs.query.shape[2] / times) if beside is not None else []
            round_ = [*rest, run, lambda: found.append(torch.randn_like(found[0])), back]
            forward, backward = typical(round_, device, (-3, -1))
        return forward * times, backward * times

    def _times(self, inputs: Inputs) -> float:
        """How often ``inputs`` go into all heads of all sequences."""
        shapes = self._shapes(inputs.query.shape[2])
        return shapes["query"][0] * shapes["key"][1] / inputs.key.shape[1]


@dataclass(frozen=True, slots=True)
class _Masked:
    """One attention under spans, timed under those of a call by as many groups of heads as keep the device busy."""

    captured: Captured
    node: fx.Node
    spans_leaf: int

    def seconds(self, call: BlockCall, beside: Beside | None = None) -> tuple[float, float]:
        """(forward, backward) of all heads, in a call like ``call``."""
        operator = torch.ops.memo_runtime.masked_attention
        spans, scale, tokens = call.leaves[self.spans_leaf], self.node.args[4], self.captured.tokens(call)
        like = [one.meta["val"] for one in self.node.args[:3]]  # type: ignore[union-attr]
        shapes = [[int(self.captured.size(size, tokens)) for size in one.shape] for one in like]
        rows, groups = shapes[1][:2]
        busy = _BUSY_ROWS.get(like[0].device.type, _BUSY_ROWS["cpu"])
        timed = min(groups, -(-busy * groups // (rows * tokens * shapes[0][1])))
        some = [[rows, shape[1] * timed // groups, *shape[2:]] for shape in shapes]
        given = [_random(shape, one) for shape, one in zip(some, like, strict=True)]
        found: list[Any] = []

        def run() -> None:
            found.extend(operator(*given, spans, scale))

        def back() -> None:
            output, lse, grad = found
            torch.ops.memo_runtime.masked_attention_backward(grad, *given, spans, output, lse, scale)
            found.clear()

        with torch.no_grad():
            rest = beside.runs(tokens * timed / groups) if beside is not None else []
            round_ = [*rest, run, lambda: found.append(torch.randn_like(found[0])), back]
            forward, backward = typical(round_, given[0].device, (-3, -1))
        return forward * groups / timed, backward * groups / timed


def _masked_in(captured: Captured) -> list[_Masked]:
    """Attention under spans that are arguments of the block as they are."""
    leaves = dict(captured.arguments)
    nodes = [stage.node for stage in captured.stages.stages if isinstance(stage, Mixer)]
    return [
        _Masked(captured, node, leaves[node.args[3]]) for node in nodes  # type: ignore[index]
        if operator_name(node) == MASKED_ATTENTION and node.args[3] in leaves
    ]  # fmt: skip


def _random(shape: list[int], like: torch.Tensor) -> torch.Tensor:
    """Heads in front of tokens, in the memory order of a projection."""
    batch, heads, length, depth = shape
    made = torch.randn(batch, length, heads, depth, dtype=like.dtype, device=like.device)
    return made.transpose(1, 2)
