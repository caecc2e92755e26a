"""What each of two gloo processes does with tiled blocks; ``python -m tests.distributed.tiled_ranks FOLDER RANK``.

A stack of blocks by tiles trains on another batch in each process; its gradients are compared with those of the plain
stack on both batches.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.install import install_forward, original_forward
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_swap import TiledSwap
from tests.exactness.hand_written import WIDTH, Attention, Stack

RANKS = 2
CASES = [(parallel, first) for parallel in ("ddp", "fsdp") for first in ("tiles", "parallel")]


def _stack() -> Stack:
    torch.manual_seed(0)
    return Stack(Attention(), Attention()).double()


def _batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 29, WIDTH, generator=generator, dtype=torch.float64)


def _install(model: Stack) -> None:
    cpu = torch.device("cpu")
    programs = ProgramCache(run_eagerly)
    tools = Tools(cpu, 1 << 24)
    swap = TiledSwap(cpu, tools.pool, tools.engine)
    for block in model.blocks:
        tiled = TiledBlock(block, tile=6, programs=programs, forward=original_forward(block), swap=swap)
        install_forward(block, tiled)


def _made(parallel: str, first: str) -> tuple[Stack, nn.Module]:
    model = _stack()
    if first == "tiles":
        _install(model)
    made: nn.Module = model
    if parallel == "ddp":
        made = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (RANKS,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        made = fully_shard(model, mesh=mesh)
    if first != "tiles":
        _install(model)
    return model, made


def _error(parallel: str, first: str, rank: int) -> float:
    model, made = _made(parallel, first)
    plain, worst = _stack(), 0.0
    for step in range(2):
        model.zero_grad()
        made(_batch(rank, step))[0].square().mean().backward()
        plain.zero_grad()
        sum(plain(_batch(one, step))[0].square().mean() / RANKS for one in range(RANKS)).backward()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            grad: Any = mine.grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            worst = max(worst, float((grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-9)))
    return worst


def main(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    found = {f"{parallel}, {first} first": _error(parallel, first, rank) for parallel, first in CASES}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
