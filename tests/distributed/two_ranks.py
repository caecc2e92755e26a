"""What each of two gloo processes does; ``python -m tests.distributed.two_ranks FOLDER RANK GROUP`` is one of them.

Every case trains a wrapped tower on another batch in each process and compares its gradients with those of an
ordinary tower on both batches. The outcomes go to ``FOLDER/RANK.json``: the largest relative error of a gradient
over the steps of a case, and whether the last step moved and rebuilt what its plan says; or the error.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import memo_runtime as memo
from tests.api.towers import POLICIES, Tower, signal, tower

RANKS = 2

#: (rows, tokens) of each rank's batch, step by step.
Shapes = list[tuple[tuple[int, int], tuple[int, int]]]
_SAME: Shapes = [((2, 24), (2, 24))] * 2
_LENGTHS: Shapes = [((2, 24), (2, 40)), ((2, 31), (2, 24)), ((2, 24), (2, 24))]
_ROWS: Shapes = [((2, 24), (2, 24)), ((2, 24), (3, 24)), ((1, 24), (3, 24)), ((2, 24), (2, 24))]


@dataclass(frozen=True)
class Case:
    """One way to train: ``parallel`` is "ddp" or "fsdp", ``order`` what comes first, "wrap" or "parallel"."""

    name: str
    parallel: str
    order: str
    policy: str
    shapes: tuple[Any, ...] = tuple(_SAME)
    options: tuple[tuple[str, Any], ...] = ()
    micro_batches: int = 1


_EVERY = [
    Case(f"{parallel}-{order} first-{policy}", parallel, order, policy)
    for parallel in ("ddp", "fsdp")
    for order in ("wrap", "parallel")
    for policy in POLICIES
] + [
    *(
        Case(f"{parallel}-{order} first-lengths", parallel, order, "memo", tuple(_LENGTHS))
        for parallel in ("ddp", "fsdp")
        for order in ("wrap", "parallel")
    ),
    *(
        Case(f"{parallel}-{order} first-accumulation", parallel, order, "memo", micro_batches=2)
        for parallel in ("ddp", "fsdp")
        for order in ("wrap", "parallel")
    ),
    *(Case(f"ddp-{order} first-batch sizes", "ddp", order, "memo", tuple(_ROWS)) for order in ("wrap", "parallel")),
    *(
        Case(f"ddp-{order} first-{option}", "ddp", order, "memo", options=((option, True),))
        for option in ("static_graph", "find_unused_parameters", "gradient_as_bucket_view")
        for order in ("wrap", "parallel")
    ),
]

#: Batch sizes that are new to one rank and known to the other: only one of them profiles.
_UNEVEN = Case("fsdp-batch sizes", "fsdp", "wrap", "memo", tuple(_ROWS))

GROUPS = {"every": _EVERY, "uneven": [_UNEVEN]}
#: Seconds after which a process that waits for the other one has lost it.
_PATIENCE = {"every": 20, "uneven": 5}


def _made(parallel: Callable[[Tower], nn.Module], case: Case) -> nn.Module:
    model = tower()
    model.register_buffer("counts", torch.zeros(3))  # DDP sends buffers around in every forward
    if case.order == "wrap":
        memo.wrap(model, **POLICIES[case.policy])
    made = parallel(model)
    if case.order != "wrap":
        memo.wrap(made, **POLICIES[case.policy])
    return made


def _sharded(model: Tower) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def _without_sync(model: nn.Module, case: Case, last: bool) -> Iterator[None]:
    if case.parallel == "ddp" and not last:
        with model.no_sync():  # type: ignore[operator]
            yield
    else:
        if case.parallel == "fsdp":
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _error(model: nn.Module, plain: nn.Module) -> float:
    worst = 0.0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert q.grad is not None
        worst = max(worst, float((_whole(p.grad) - q.grad).norm() / q.grad.norm()))
    return worst


def _step(model: nn.Module, plain: nn.Module, case: Case, number: int, rank: int) -> float:
    """One step of both; the largest relative error of a gradient."""
    for m in (model, plain):
        m.zero_grad(set_to_none=True)
    for micro in range(case.micro_batches):
        batches = [
            signal(rows=rows, tokens=tokens, seed=100 * number + 10 * micro + other)
            for other, (rows, tokens) in enumerate(case.shapes[number])
        ]
        with _without_sync(model, case, last=micro == case.micro_batches - 1):
            model(batches[rank]).square().mean().backward()
        for batch in batches:
            (plain(batch).square().mean() / RANKS).backward()
    return _error(model, plain)


def _run(case: Case, rank: int) -> dict[str, Any]:
    def parallel(model: Tower) -> nn.Module:
        if case.parallel == "fsdp":
            return _sharded(model)
        return DistributedDataParallel(model, **dict(case.options))

    model, plain = _made(parallel, case), tower()
    error = max(_step(model, plain, case, number, rank) for number in range(len(case.shapes)))
    totals = memo.report(model).totals
    acted = (
        totals.bytes_to_host == totals.forecast.bytes_to_host > 0
        and totals.bytes_to_device == totals.forecast.bytes_to_device
        and totals.recomputed_flops == totals.forecast.recomputed_flops
    )
    held = totals.host_bytes_in_use + totals.stash_bytes + totals.open_copies
    memo.unwrap(model)
    error = max(error, _step(model, plain, case, 0, rank))
    return {"error": error, "acted": acted, "held": held, "rebuilt": totals.recomputed_flops}


def main(folder: Path, rank: int, group: str) -> None:
    """Run every case of ``group`` and write down what came of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    patience = datetime.timedelta(seconds=_PATIENCE[group])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=patience)
    outcomes: dict[str, Any] = {}
    for case in GROUPS[group]:
        try:
            outcomes[case.name] = _run(case, rank)
        except Exception as error:
            outcomes[case.name] = {"failed": f"{type(error).__name__}: {error}"}
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
