"""Running a block again in backward, to rebuild what was not stashed of its forward.

``Replay`` runs it on the tokens [prefix, tokens) with mixers, random numbers and routing replaced by the values of
the forward; ``Recompute`` runs all of it as it was, under the random state of its forward.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import nn

from memo_runtime.blocks.ambient import AttentionState, AutocastState, BufferState, RandomState
from memo_runtime.blocks.aside import Aside
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.pins import PinKey, ReplayMode, Value
from memo_runtime.blocks.region import tail
from memo_runtime.blocks.rerun import Forward, run_again, stops_early
from memo_runtime.blocks.state import CallState
from memo_runtime.errors import ReplayMismatchError
from memo_runtime.execution.forms import Forms
from memo_runtime.execution.piece import Piece
from memo_runtime.execution.stash import Stash
from memo_runtime.execution.witness import Witness
from memo_runtime.records import Action, ArgumentAxes, TokenAxis


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value that the rerun needs comes from: a view of a piece, or a tensor or number kept as it is."""

    piece: Piece | None = None
    position: int = 0
    kept: Value = None
    axis: TokenAxis | None = None
    dims: tuple[int, ...] = ()

    def rows(self, prefix: int, tokens: int) -> Value:
        """The value on tokens [prefix, tokens), in memory as the forward had it: what a rerun saves depends on that."""
        if self.piece is None:
            if isinstance(self.kept, torch.Tensor):
                return tail(self.kept, self.axis, self.dims, tokens=tokens, start=prefix)
            return self.kept
        if self.piece.action == Action.TAIL:
            return self.piece.as_it_was(self.position)
        if prefix and self.axis is not None:
            stride = self.piece.original_stride(self.position)
            return tail(self.piece.view(self.position), self.axis, (), tokens=tokens, start=prefix, strides=stride)
        return tail(self.piece.as_it_was(self.position), None, self.dims, tokens=tokens, start=prefix)


def _nothing() -> None:
    """The rerun goes backward itself, as its forward did."""


@dataclass(slots=True)
class Rerun:
    """One block call to be run again.

    Attributes:
        call: its arguments, detached, without the input. input_source: where that comes from, None: it was kept.
        count: how many tensors the forward saved. prefix, tokens: rows to rebuild; 0 for all.
        autocast, attention: what was in force around the forward.
        pins: what is replaced. written: of these, what the block writes to afterwards.
        random, buffers: state to start from, None where nothing is drawn or written.
        state: everything else that the forward started from.
        forms, witness: what the tensors that it saves have to look like, and some of their values.
        inner_autograd: the forward went backward itself, and so will the rerun.
    """

    block: nn.Module
    forward: Forward
    name: str
    call: BlockCall
    input_leaf: int
    input_source: Source
    input_needs_grad: bool
    count: int
    autocast: AutocastState
    attention: AttentionState
    arguments: tuple[ArgumentAxes, ...] = ()
    tokens: int = 0
    prefix: int = 0
    pins: dict[PinKey, dict[int, Source]] = field(default_factory=dict)
    written: frozenset[PinKey] = frozenset()
    random: RandomState | None = None
    buffers: BufferState | None = None
    state: CallState | None = None
    forms: Forms | None = None
    witness: Witness | None = None
    inner_autograd: bool = False

    def begin_from(self, state: CallState | None) -> None:
        """Run from ``state``, and from arguments that nobody writes to from now on."""
        self.state = state
        if state is None:
            return
        for leaf, tensor in self.call.tensors():
            state.watch(f"its argument {leaf}", tensor)
        if isinstance(self.input_source.kept, torch.Tensor):
            state.watch("its input", self.input_source.kept)

    def run(self, stash: Stash) -> int:
        """Rebuild into the pieces of ``stash``; returns the FLOPs spent.

        Raises:
            ReplayMismatchError: the block saves other tensors than in its forward. The graph is as before and no
                gradient of this block was computed.
            StateChangedError: a tensor that it reads has been written to since.
        """
        state = self.state.restored(self.name) if self.state is not None else contextlib.nullcontext()
        with state:
            saved, flops = self._run(stash)
        if saved != self.count:
            raise ReplayMismatchError(
                f"'{self.name}' saved {self.count} tensors in its forward and {saved} when it was run again: its "
                "forward depends on something that changed in between and that memo does not see (a global variable, a "
                "closure, data). No gradient of it was computed; use policy='swap', or leave it out with blocks="
            )
        return flops

    def _run(self, stash: Stash) -> tuple[int, int]:
        """(tensors saved, FLOPs)."""
        if self.forms is not None:
            self.forms.begin(stash)
        call = self._call()
        values = {
            key: {output: source.rows(self.prefix, self.tokens) for output, source in outputs.items()}
            for key, outputs in self.pins.items()
        }
        mode = ReplayMode(values, written=self.written)
        random = self.random.restored() if self.random is not None else contextlib.nullcontext()
        buffers = self.buffers.restored() if self.buffers is not None else contextlib.nullcontext()
        with self.autocast.restored(), self.attention.restored(), random, buffers:
            saved = run_again(
                self.forward,
                call,
                lambda index, tensor: self._put(stash, index, tensor),
                mode=mode,
                last=self.count - 1 if stops_early(self.block) and not self.inner_autograd else None,
                on_walk=_nothing if self.inner_autograd else None,
            )
        return saved, mode.flops

    def _call(self) -> BlockCall:
        call = self.call
        if self.prefix:
            others = tuple(axes for axes in self.arguments if axes.leaf != self.input_leaf)
            call = call.cut(others, self.prefix, self.tokens)
        hidden = self.input_source.rows(self.prefix, self.tokens)
        if isinstance(hidden, torch.Tensor):
            call = call.replaced({self.input_leaf: hidden})
        call = call.detached()
        if isinstance(hidden, torch.Tensor):
            call.leaves[self.input_leaf].requires_grad_(self.input_needs_grad)
        return call

    def _put(self, stash: Stash, index: int, tensor: torch.Tensor) -> None:
        holder = stash.holder(index) if index < self.count else None
        if holder is None:
            return
        # Looking at it and writing a piece are no operators of the block: the mode that counts and replaces these must
        # not see them.
        with Aside():
            if self.forms is not None:
                self.forms.check(holder, tensor)
            if holder.piece is None:
                return
            if self.witness is not None:
                self.witness.compare(index, tensor)
            if holder.piece.action == Action.PREFIX:
                holder.piece.write_tail(holder.position, tensor, self.tokens)
            elif holder.piece.action == Action.REBUILD:
                holder.piece.rebuild(index, tensor)
