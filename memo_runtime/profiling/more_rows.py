"""The pass that looks at other numbers of sequences, when a batch brings one (profiling/rows.py says why)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.measured import Measured
from memo_runtime.profiling.model import model_device
from memo_runtime.profiling.rows import RowLaw, measure_beside
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.walk import Batch, NamedBlock, Run, Walk, roots_of, unprofiled
from memo_runtime.records import BlockProfile


@dataclass(slots=True)
class _Look(Walk):
    """Looks at one block of each kind whose law was left for later."""

    measured: Measured = field(kw_only=True)
    #: By the law that is replaced, which is one object for all blocks of a kind.
    found: dict[int, RowLaw] = field(default_factory=dict)

    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """Measure the law of the block's kind, unless that is done."""
        profile = self.measured.block(block.name)
        if profile is None:
            return unprofiled(block, "it was not called when the model was profiled")
        law = self.measured.laws[block.name]
        if not law.seen and id(law) not in self.found and not call.is_empty:
            start = Start(roots_of(block, call), self.device)
            self.found[id(law)] = measure_beside(block.module, forward, call, start, known=profile, law=law)
        return profile

    def is_done(self) -> bool:
        """One block of every kind was looked at."""
        return all(law.seen or id(law) in self.found for law in self.measured.laws.values())

    def finish(self) -> None:
        """Kinds that this batch does not call stay as they are: they are looked at when a batch calls them."""


def look_at_rows(
    model: nn.Module, blocks: Sequence[NamedBlock], run: Run, *, batch: Batch, measured: Measured
) -> Measured:
    """``measured`` with its laws of rows, measured with a ``batch`` that has another number of sequences."""
    look = _Look({block.name: block for block in blocks}, model_device(model), measured=measured)
    look.over(model, batch, run)
    return replace(measured, laws={name: look.found.get(id(law), law) for name, law in measured.laws.items()})
