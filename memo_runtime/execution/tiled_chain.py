"""The input of a block that is not stashed, but made again from what the block below has stashed.

    stash       x0, o0 | o1 | o2 | o3 | x4, o4 | o5 ...              runs of four blocks
    backward    of block 3: x1, x2, x3 from (x0, o0), (x1, o1), (x2, o2) by the last segment of the block below each
                of block 2: x2 and all below it are there             of block 0: the fetch of the next run starts

The last segment of a block makes its result of its input and of what its attention yields, and these are stashed, so
attention is not run again. All that a run has in host memory is fetched when its top block goes backward, and every
input that is made again stays until its own block has gone backward: of a run of two blocks that is one tensor, in the
place of the one that would have been fetched.

Where blocks are late, nothing is there ahead: an input is made when its block goes backward, from the first of its run
on, and of every step of that way one input and what one block has stashed are there.

That an input is the result of the block below is seen at every call: autograd says whose result a tensor is, and a
change in place gives it another origin or version. What it is made again is compared with it in a few rows.
"""

from __future__ import annotations

import re
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from memo_runtime.capture.captured import Captured
from memo_runtime.capture.split import Segment
from memo_runtime.errors import ReplayMismatchError, StateChangedError
from memo_runtime.execution.ledger import Share
from memo_runtime.execution.witness import Witness
from memo_runtime.records import TokenAxis


def result_stage(captured: Captured) -> int | None:
    """The number of the stage that makes the result of a block again, from its stash; None: there is none.

    The block has one result, made by its last segment alone, and one argument with a gradient: its input.
    """
    stages, index = captured.stages, len(captured.stages.stages) - 1
    results = [one for one in captured.outputs if hasattr(one, "meta")]
    given = [(node, leaf) for node, leaf in captured.arguments if node in stages.differentiable]
    last = stages.stages[index]
    if not isinstance(last, Segment) or last.by_rows or len(results) != 1 or list(last.outputs) != results:
        return None
    if len(given) != 1 or given[0][1] != captured.input_leaf or results[0] not in stages.differentiable:
        return None
    return index if isinstance(stages.axes[given[0][0]], TokenAxis) else None


def input_axis(captured: Captured) -> TokenAxis | None:
    """Where the tokens of the input are."""
    node = next(node for node, leaf in captured.arguments if leaf == captured.input_leaf)
    axis = captured.stages.axes[node]
    return axis if isinstance(axis, TokenAxis) else None


@dataclass(frozen=True, slots=True)
class Yielded:
    """What the result of a call was when it was yielded: the same memory, never written to, has the same values."""

    address: int
    version: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Yielded:
        """Of ``tensor`` as it is now."""
        return cls(tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride())


def origin_of(source: torch.Tensor) -> Any:
    """The call by tiles (its node in autograd's graph) whose result ``source`` is, untouched; None: there is none."""
    node = source.grad_fn
    run = getattr(node, "run", None)
    yielded = getattr(run, "yielded", None)
    return node if yielded is not None and yielded == Yielded.of(source) else None


@dataclass(slots=True, weakref_slot=True)
class Input:
    """The input of one call, which the call ``node`` below has yielded.

    Args:
        node: of the call below. place: of the input among what the call has saved.
        share: what it takes on the device, while it is there. witness: some of its rows, to compare.
        late: neither it nor what it is made of is there before its block goes backward.
    """

    node: Any
    place: int
    size_bytes: int
    share: Share | None = None
    witness: Witness | None = None
    late: bool = False
    _made: torch.Tensor | None = field(init=False, default=None)

    def fetch(self) -> None:
        """Start the copies back of what it is made of."""
        if self._made is None and self.node is not None and self.node.entry is not None:
            self.node.entry.fetch()

    @property
    def landing_bytes(self) -> int:
        """Device bytes that a fetch takes."""
        if self._made is not None or self.node is None or self.node.entry is None:
            return 0
        return int(self.node.entry.landing_bytes)

    def made(self) -> torch.Tensor:
        """The input, made again if it is not there.

        Raises:
            ReplayMismatchError: what was made is not what the block was given.
            StepGivenUpError: host memory that it is made of was needed for another step.
        """
        if self._made is None:
            assert self.node is not None, "its block has not gone backward yet"
            made = self._made_late() if self.late else self.node.run.result_again(values_of(self.node))
            if self.witness is not None:
                try:
                    self.witness.compare(0, made)
                except ReplayMismatchError as error:
                    raise ReplayMismatchError(
                        f"the input of '{self.witness.name}', made again from what the block below has stashed, is not "
                        "what it was given: something has written to it without autograd's knowledge (x.data), or "
                        "weights of the block below are others. No gradient of it was computed"
                    ) from error
            self.there(made)
        assert self._made is not None
        return self._made

    def there(self, made: torch.Tensor) -> None:
        """It is on the device until ``done``."""
        self._made = made
        if self.share is not None:
            self.share.hold(self.size_bytes)

    def _made_late(self) -> torch.Tensor:
        """Made by way of the inputs below it in its run, each of which goes when the next is there."""
        way = [self]
        while (lower := way[-1].node.input) is not None and lower._made is None:
            way.append(lower)
        for lower, one in zip([*way[1:], None][::-1], way[::-1], strict=True):
            made: torch.Tensor = one.node.run.result_again(values_of(one.node))
            if one is not self:
                one.there(made)
            if one.node.entry is not None:
                one.node.entry.leave()
            if lower is not None:
                lower.done(retain=True)
        return made

    def done(self, *, retain: bool) -> None:
        """Its block has gone backward; ``retain``: it will once more."""
        self._made = None
        if self.share is not None:
            self.share.clear()
        if not retain:
            self.node = None


def stored_of(node: Any) -> list[Any]:
    """What the call ``node`` stashed on the device.

    Raises:
        StateChangedError: some of it was written to since, a parameter that autograd alone would not read for one.
    """
    try:
        return list(node.saved_tensors)
    except RuntimeError as error:
        found = re.search(r"modified by an inplace operation: \[\S* (\[.*?\])\]", str(error))
        if found is None:
            raise
        raise StateChangedError(
            f"'{node.run.owner}' is computed again by tiles for its backward, and a tensor of shape {found[1]} that it "
            "reads (a parameter, buffer or argument) has been modified by an inplace operation since its forward. Do "
            "so after backward; policy='swap' computes nothing again"
        ) from error


def values_of(node: Any) -> dict[Any, Any]:
    """Arguments and stash of the call ``node``, on the device. Its input is made again where that is not stashed.

    Nothing that they hold is held by anything else but ``node``, its entry and its input.
    """
    stored = stored_of(node)
    if node.entry is not None:
        for place, tensor in node.entry.landed().items():
            stored[place] = tensor
    if node.input is not None:
        stored[node.input.place] = node.input.made()
    count, extra = node.counts
    run = node.run
    values = dict(zip(run.placeholders(), stored[:count], strict=True))
    values.update(zip(run.stash(), stored[count : count + extra], strict=True))
    return values


def hand_over(node: Any) -> None:
    """The call ``node`` goes backward, and then has nothing any more: inputs that are still to be made of it are made.

    In the usual order there are none: the block above has gone backward first.
    """
    for found in node.run.above:
        above = found()
        if above is not None and above.node is not None:
            above.made()


def linked(node: Any, made: Input) -> Input:
    """``made`` is made of what the call ``node`` has: that call hears of it."""
    node.run.above.append(weakref.ref(made))
    return made
