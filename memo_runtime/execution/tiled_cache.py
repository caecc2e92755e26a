"""Programs of tiles, for all blocks of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.capture.captured import Captured
from memo_runtime.execution.any_length import AnyLength
from memo_runtime.execution.compilers import Compiler, run_eagerly
from memo_runtime.execution.mixers.attention import Kernel
from memo_runtime.execution.tiled_programs import Programs, make_programs
from memo_runtime.recent import Recent

#: Sizes of tiles whose programs are kept, of one segment: a step has two, and every step may have a new length.
_MOST_SIZES = 16


class ProgramCache:
    """Programs by segment and tile size, those used last; blocks with the same graph share one."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._programs: dict[tuple[Any, ...], Recent[Programs]] = {}
        self._lengths: dict[tuple[Any, ...], AnyLength] = {}
        #: Signatures of captures that were compared with their modules.
        self.checked: set[str] = set()
        #: Kernels of attention that were fastest when timed, by signature and mixer.
        self.kernels: dict[tuple[str, str], Kernel] = {}

    def get(
        self, captured: Captured, stage: int, sources: Sequence[torch.Tensor], tokens: int, autocast: AutocastState
    ) -> Programs:
        """The programs of stage number ``stage`` for tiles like ``sources``, borrowed choices behind them."""
        layout = (tokens, tuple([(one.shape, one.stride(), one.dtype, one.device) for one in sources]))
        segment = (captured.signature, stage, autocast)
        known = self._programs.get(segment)
        if known is None:
            known = self._programs[segment] = Recent(_MOST_SIZES)
            if self._compiler is not run_eagerly:
                self._lengths[segment] = AnyLength(self._compiler)
        found = known.get(layout)
        if found is None:
            lengths = self._lengths.get(segment)
            found = None if lengths is None else lengths.record(tokens, layout)
            if found is None:
                compiler = self._compiler if lengths is None else lengths.compiler(tokens, layout)
                found = make_programs(captured, stage, sources, tokens, autocast, compiler=compiler)
                if lengths is not None:
                    lengths.note(layout, found, found.casts)
            known.put(layout, found)
        return found

    def __len__(self) -> int:
        return sum(len(known) for known in self._programs.values())

    def eager(self) -> ProgramCache:
        """This one if its programs are not compiled, which a check would wait minutes for; else an empty one."""
        return self if self._compiler is run_eagerly else ProgramCache(run_eagerly)
