"""Passes that look at what a profile left for later, when a batch brings it.

Most runs see one number of sequences, and most models one length: how others change a profile (profiling/rows.py,
profiling/pairs.py) is looked at with the first batch that has others, in one block of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.measured import Measured
from memo_runtime.profiling.model import model_device
from memo_runtime.profiling.pairs import PairLaw, measure_pairs
from memo_runtime.profiling.rows import RowLaw, measure_beside
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.walk import Batch, NamedBlock, Run, Walk, roots_of, unprofiled
from memo_runtime.records import BlockProfile

_NOT_CALLED = "it was not called when the model was profiled"
#: (block, its own forward, call, known profile, start) to a law.
_Measure = Callable[[NamedBlock, Forward, BlockCall, BlockProfile, Start], Any]


@dataclass(slots=True)
class _Look(Walk):
    """Looks at one block of each kind whose law was left for later: ``wanted``, by block name."""

    measured: Measured = field(kw_only=True)
    wanted: Mapping[str, Any] = field(kw_only=True)
    measure: _Measure = field(kw_only=True)
    #: By the law that is replaced, which is one object for all blocks of a kind.
    found: dict[int, Any] = field(default_factory=dict)

    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """Measure the law of the block's kind, unless that is done."""
        profile, law = self.measured.block(block.name), self.wanted.get(block.name)
        if profile is None:
            return unprofiled(block, _NOT_CALLED)
        if law is not None and id(law) not in self.found and not call.is_empty:
            start = Start(roots_of(block, call), self.device)
            self.found[id(law)] = self.measure(block, forward, call, profile, start)
        return profile

    def is_done(self) -> bool:
        """One block of every kind was looked at."""
        return all(id(law) in self.found for law in self.wanted.values())

    def finish(self) -> None:
        """Kinds that this batch does not call stay as they are: they are looked at when a batch calls them."""


@dataclass(slots=True)
class _Calls(Walk):
    """Has every block called that the profile knows, for whoever else sees the calls; nothing is measured."""

    measured: Measured = field(kw_only=True)
    called: set[str] = field(default_factory=set)

    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """What is known of the block."""
        self.called.add(block.name)
        return self.measured.block(block.name) or unprofiled(block, _NOT_CALLED)

    def is_done(self) -> bool:
        """Every block was called."""
        return len(self.called) == len(self.blocks)

    def finish(self) -> None:
        """Blocks that this batch does not call are not seen."""


@dataclass(slots=True)
class _Ways(Walk):
    """Sees how the batch calls blocks, until nothing that is ``known`` is called so.

    No block is run by what was measured in another way: its arguments would be cut along other tokens.
    """

    known: list[Measured] = field(kw_only=True)
    ways: dict[str, str] = field(default_factory=dict)

    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """What is known of the block when it is called so."""
        way = self.ways.setdefault(block.name, call.way())
        found = [(measured, measured.block(block.name)) for measured in self.known]
        self.known = [measured for measured, profile in found if profile is None or profile.way == way]
        so = (profile for _, profile in found if profile is not None and profile.way == way)
        return next(so, None) or unprofiled(block, _NOT_CALLED)

    def is_done(self) -> bool:
        """Every block was called, or it is a kind of calls that is not known."""
        return not self.known or len(self.ways) == len(self.blocks)

    def finish(self) -> None:
        """Blocks that this batch does not call are not seen."""


@dataclass(frozen=True, slots=True)
class Later:
    """What it takes to look: the model, its blocks, and ``run``, which runs its forward on ``batch``."""

    model: nn.Module
    blocks: Sequence[NamedBlock]
    run: Run
    batch: Batch

    def with_rows(self, measured: Measured) -> Measured:
        """``measured`` with its laws of rows, where the batch has another number of sequences."""

        def measure(
            block: NamedBlock, forward: Forward, call: BlockCall, profile: BlockProfile, start: Start
        ) -> RowLaw:
            law = measured.laws[block.name]
            return measure_beside(block.module, forward, call, start, known=profile, law=law)

        found = self._look(measured, {name: law for name, law in measured.laws.items() if not law.seen}, measure)
        return replace(measured, laws={name: found.get(id(law), law) for name, law in measured.laws.items()})

    def with_pairs(self, measured: Measured, tokens: Mapping[int, int]) -> Measured:
        """``measured`` with its laws of pairs, where stacks have other lengths, ``tokens``, in the batch."""

        def measure(
            block: NamedBlock, forward: Forward, call: BlockCall, profile: BlockProfile, start: Start
        ) -> PairLaw:
            law = measured.pairs[block.name]
            length = tokens[law.stack] if law.stack is not None else 0
            return measure_pairs(block.module, forward, call, start, known=profile, law=law, length=length)

        wanted = {name: law for name, law in measured.pairs.items() if not law.seen and law.stack in tokens}
        found = self._look(measured, wanted, measure)
        return replace(measured, pairs={name: found.get(id(law), law) for name, law in measured.pairs.items()})

    def ways(self, known: Sequence[Measured]) -> dict[str, str] | None:
        """How the batch calls blocks (``BlockCall.way``), by name, as far as that tells which ``known`` calls it makes.

        None where the forward fails, which the step itself will show.
        """
        blocks = {block.name: block for block in self.blocks}
        each_time = {name for measured in known for name in measured.each_time}
        ways = _Ways(blocks, model_device(self.model), each_time=each_time, known=[*known])
        try:
            ways.over(self.model, self.batch, self.run)
        except Exception as error:
            pass_on(error)
            return None
        return ways.ways

    def call_blocks(self, measured: Measured) -> None:
        """Run the forward such that ``run`` sees a call of every block, and compute as little as that takes."""
        blocks = {block.name: block for block in self.blocks}
        calls = _Calls(blocks, model_device(self.model), each_time={*measured.each_time}, measured=measured)
        calls.over(self.model, self.batch, self.run)

    def _look(self, measured: Measured, wanted: Mapping[str, Any], measure: _Measure) -> dict[int, Any]:
        blocks = {block.name: block for block in self.blocks}
        device, each_time = model_device(self.model), {*measured.each_time}
        look = _Look(blocks, device, each_time=each_time, measured=measured, wanted=wanted, measure=measure)
        look.over(self.model, self.batch, self.run)
        return look.found
