"""The contenders by name, one file each. A contender is made when its process starts and not before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.harness.contenders.axolotl import Axolotl
from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.compiled import (
    CompiledBlocks,
    CompiledCheckpoint,
    CompiledSelective,
    CompiledSelectiveMm,
)
from benchmarks.harness.contenders.deepspeed import DeepSpeed
from benchmarks.harness.contenders.deepspeed_zero import DeepSpeedZeroOffload
from benchmarks.harness.contenders.hf_offload import HfOffload
from benchmarks.harness.contenders.kernels import Kernels
from benchmarks.harness.contenders.liger import Liger
from benchmarks.harness.contenders.megatron import WAYS, Megatron
from benchmarks.harness.contenders.memo import Memo
from benchmarks.harness.contenders.memory_budget import MemoryBudget
from benchmarks.harness.contenders.save_on_cpu import SaveOnCpu
from benchmarks.harness.contenders.selective import Selective
from benchmarks.harness.contenders.selective_mm import SelectiveMm
from benchmarks.harness.contenders.trainstream import TrainStream
from benchmarks.harness.contenders.trl import TrlOffload
from benchmarks.harness.contenders.unwrapped import Unwrapped
from benchmarks.harness.job import Job
from benchmarks.harness.names import MEMO_WAYS

CONTENDERS: dict[str, Callable[[Job], Contender]] = {
    "kernels": Kernels,
    "unwrapped": Unwrapped,
    "selective": Selective,
    "selective-mm": SelectiveMm,
    "checkpoint": Checkpoint,
    "save_on_cpu": SaveOnCpu,
    "axolotl": Axolotl,
    "hf-offload": HfOffload,
    "trl-offload": partial(TrlOffload, True),
    "trl-offload-all": partial(TrlOffload, False),
    "liger": partial(Liger, offload=False),
    "liger-kernels": partial(Liger, offload=False, kernels=True),
    "hf-offload+liger": partial(Liger, offload=True),
    "hf-offload+liger-kernels": partial(Liger, offload=True, kernels=True),
    "deepspeed": DeepSpeed,
    "deepspeed-zero-offload": DeepSpeedZeroOffload,
    **{name: partial(Megatron, name) for name in WAYS},
    "unwrapped+compile": CompiledBlocks,
    "checkpoint+compile": CompiledCheckpoint,
    "selective+compile": CompiledSelective,
    "selective-mm+compile": CompiledSelectiveMm,
    "memory-budget": MemoryBudget,
    "trainstream": TrainStream,
    **{f"memo-{way}": partial(Memo, policy, alpha) for way, (policy, alpha) in MEMO_WAYS.items()},
}
