"""Blocks compiled one by one (``torch.compile``): as they are, or with selective checkpointing inside, as torchtitan
compiles blocks; by its policy that is ``selective-mm+compile``.

memo's own tiles are compiled; these say what compilation alone is worth.
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness.contenders.base import Training
from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.selective import Selective
from benchmarks.harness.contenders.selective_mm import SelectiveMm

_OPTIONS: dict[str, Any] = {"dynamic": False}


class CompiledBlocks(Training):
    """The blocks and nothing else."""

    def install(self) -> None:
        """Every block compiled, for each length of its own."""
        super().install()
        compile_blocks(self)


class CompiledCheckpoint(Checkpoint):
    """All runs again, attention too, in a backward that the compiler makes."""

    def install(self) -> None:
        """Every block compiled with its checkpoint."""
        super().install()
        compile_blocks(self)


class CompiledSelective(Selective):
    """All but attention runs again, in a backward that the compiler makes."""

    def install(self) -> None:
        """Every block compiled with its checkpoint."""
        super().install()
        compile_blocks(self)


class CompiledSelectiveMm(SelectiveMm):
    """All but attention and every second product runs again, in a backward that the compiler makes."""

    def install(self) -> None:
        """Every block compiled with its checkpoint."""
        super().install()
        compile_blocks(self)


def compile_blocks(contender: Training) -> None:
    """Compile every block of ``contender``, and say so in its settings."""
    for layer in contender.subject.layers:
        layer.compile(**_OPTIONS)
    contender.settings |= {"torch.compile": _OPTIONS}
