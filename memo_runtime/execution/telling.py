"""What a wrapped model says, once, in the log and in the report, and what of it becomes a block's reason."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.squares import about_squares
from memo_runtime.errors import BlockFallbackError
from memo_runtime.execution.caches import Caches
from memo_runtime.execution.counters import StepCounters
from memo_runtime.records import Executor

logger = logging.getLogger("memo_runtime")


class Telling(ABC):
    """The notes of a session. ``strict``: that a block is not managed is an error instead."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.caches = Caches()
        self._notes: dict[str, None] = {}
        self._told_of_squares = False
        self._told_of_length = False
        self._told_of_rows = False
        #: What the batch of this step is, where its plan is for another number of sequences.
        self.other_batch = ""
        #: Tiles have drawn dropout, under other masks than the blocks would have.
        self.draws_masks = False

    @property
    @abstractmethod
    def step(self) -> StepCounters:
        """What the step that runs has done so far."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was said, in order."""
        return tuple(self._notes)

    def note(self, text: str, *, level: int = logging.WARNING) -> None:
        """Say ``text`` once, in the log and in the report."""
        if text not in self._notes:
            self._notes[text] = None
            logger.log(level, text)

    def note_cache_off(self, block: nn.Module, call: BlockCall) -> None:
        """``block`` leaves the key/value cache of ``call`` empty."""
        self.caches.leave_empty(block, call)
        if self.caches.asked:
            self.note("use_cache=True is overruled in training: the key/value cache stays empty")
        self.note("the key/value cache is off in training forwards: it would keep every block's keys and values",
                  level=logging.INFO)  # fmt: skip

    def note_native(self, name: str, reason: str) -> None:
        """Block ``name``, whatever its plan says, runs as it is in this step.

        Raises:
            BlockFallbackError: ``strict``.
        """
        if self.strict:
            raise BlockFallbackError(f"strict=True and '{name}' is not managed in this step: {reason}")
        counters = self.step.block(name)
        counters.executor, counters.reason = Executor.NATIVE, reason
        self.note(f"blocks that are not managed in a step run as they do unwrapped, whatever the budget: {reason}")

    def note_idleness(self) -> None:
        """No block ran with gradients in a step."""
        self.note(
            "nothing was managed in a step: every block was called without gradients, as inside an autograd function "
            "that goes backward by itself (reversible layers), or under torch.no_grad()"
        )

    def note_masks(self) -> None:
        """Tiles draw dropout."""
        self.draws_masks = True
        self.note("blocks that run by tiles draw dropout from seeds of their own: a step is the model's under "
                  "other masks", level=logging.INFO)  # fmt: skip

    def note_squares(self, call: BlockCall) -> None:
        """Say once that blocks are given a mask of all pairs of tokens."""
        text = None if self._told_of_squares else about_squares(call)
        if text is not None:
            self._told_of_squares = True
            self.note(text)

    def note_in_place(self, name: str, what: str) -> None:
        """A block changed ``what`` it was run from in place, so it cannot be run again."""
        counters = self.step.block(name)
        counters.executor, counters.alpha = Executor.REPLAY, 1.0
        counters.reason = f"it modifies {what} in place, so it is not run again: what it saves is swapped whole"
        self.note(f"'{name}': {counters.reason}")

    def note_inner_autograd(self, name: str) -> None:
        """A block went backward in its own forward, which it did not when it was profiled."""
        counters = self.step.block(name)
        counters.executor, counters.alpha = Executor.REPLAY, 1.0
        counters.reason = (
            "its forward calls autograd itself, which it did not when it was profiled: what it saves is swapped whole"
        )
        self.note(f"'{name}': {counters.reason}")

    def note_length(self, name: str, tokens: int, planned: int) -> None:
        """Say once that block ``name`` is given other ``tokens`` than it was planned for."""
        if self._told_of_length:
            return
        self._told_of_length = True
        self.note(
            f"'{name}' was given {tokens:,} tokens where its plan is for {planned:,}, so plan, budget and forecast are "
            "those of another length: a given plan's, or one that the arguments of the model do not show (a model "
            "that cuts its batch itself). Would work: a plan for the longest (plan=, or the longest batch first)"
        )

    def note_rows(self, name: str, rows: int, planned: int) -> None:
        """Block ``name`` is given ``rows`` sequences in this step, of which its plan has ``planned``.

        Raises:
            BlockFallbackError: ``strict``, and they differ.
        """
        self.other_batch = ""
        if rows == planned:
            return
        given = f"{rows:,} sequence" if rows == 1 else f"{rows:,} sequences"
        self.other_batch = f"its batch has {given} where its plan is for {planned:,}"
        text = (
            f"'{name}' was given {given} where its plan is for {planned:,}, so plan, budget and forecast "
            f"are those of another batch size. Would work: batches of {planned:,} (drop_last=True where only the last "
            f"differs), a plan of a profile with {rows:,}, or no plan=, so that each batch size is planned for"
        )
        if self.strict:
            raise BlockFallbackError(f"strict=True and {text}")
        if not self._told_of_rows:
            self._told_of_rows = True
            self.note(text)

    def note_deviation(self, name: str) -> None:
        """A block saved something else than when it was profiled."""
        counters = self.step.block(name)
        counters.alpha = 1.0
        why = self.other_batch or "it saved other tensors than when it was profiled"
        counters.reason = f"{why}, and all that it saves is swapped whole"
        self.note(f"'{name}': {counters.reason}")
