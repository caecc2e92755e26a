"""``torch.compile`` of every block with ``torch._functorch.config.activation_memory_budget``: what is recomputed is the
compiler's choice, within a share of what it would save.
"""

from __future__ import annotations

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.compiled import compile_blocks

#: Of what the default partition saves; 0 recomputes everything. PyTorch recommends no value: the middle of the range.
SHARE = 0.5


class MemoryBudget(Training):
    """Compiled blocks, some of it recomputed."""

    def install(self) -> None:
        """Every block compiled for each length of its own."""
        super().install()
        from torch._functorch import config

        config.activation_memory_budget = SHARE
        compile_blocks(self)
        self.settings["activation_memory_budget"] = SHARE

    def recomputed_flops(self, tokens: int) -> None:
        """The compiler does not say."""
        return
