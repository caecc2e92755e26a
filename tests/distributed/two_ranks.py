"""What each of two gloo processes does; ``python -m tests.distributed.two_ranks FOLDER RANK GROUP...`` is one of them.

Every case trains a wrapped tower on another batch in each process and compares its gradients with those of an
ordinary tower on both batches. The outcomes go to ``FOLDER/RANK.json``: the largest relative error of a gradient
over the steps of a case, and whether the last step moved and rebuilt what its plan says; or the error.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
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
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling import timing
from tests.api.towers import POLICIES, Tower, signal, tower

RANKS = 2

#: (rows, tokens) of each rank's batch, step by step.
Shapes = list[tuple[tuple[int, int], tuple[int, int]]]
_SAME: Shapes = [((2, 24), (2, 24))] * 2
_LENGTHS: Shapes = [((2, 24), (2, 40)), ((2, 31), (2, 24)), ((2, 24), (2, 24))]
_ROWS: Shapes = [((2, 24), (2, 24)), ((2, 24), (3, 24)), ((1, 24), (3, 24)), ((2, 24), (2, 24))]


@dataclass(frozen=True)
class Case:
    """One way to train: ``parallel`` is "ddp", "fsdp", or "parts" (the modules inside blocks are sharded one by one),
    ``order`` what comes first, "wrap" or "parallel".
    """

    name: str
    parallel: str
    order: str
    policy: str
    shapes: tuple[Any, ...] = tuple(_SAME)
    options: tuple[tuple[str, Any], ...] = ()
    micro_batches: int = 1
    #: (step, rank) in which a model is in evaluation mode: another kind of batch.
    evaluates: tuple[tuple[int, int], ...] = ()


#: Beside those of every other test: blocks are captured under DDP's and FSDP's hooks, once on each rank.
_POLICIES = POLICIES | {"tiled": {"policy": "tiled", "tile": 7, "alpha": 0.5, "keep_last": 0}}

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

#: Shapes that are new to one rank and known to the other, or new to both in another way, from the first step on.
_UNEVEN_SHAPES: dict[str, Shapes] = {
    "batch sizes": _ROWS,
    "one batch grows": [((2, 24), (2, 24)), ((3, 24), (2, 24))],
    "lengths in every step": [((2, 24), (2, 40)), ((2, 31), (2, 17)), ((2, 63), (2, 24)), ((2, 5), (2, 90))],
    "other in the first step": [((1, 24), (4, 33)), ((1, 24), (4, 33)), ((4, 33), (1, 24))],
    "both in every step": [((3, 24), (1, 40)), ((2, 31), (5, 17)), ((1, 63), (2, 24))],
}
_UNEVEN = [
    Case(f"{parallel}-{order} first-{name}-{policy}", parallel, order, policy, tuple(shapes), options)
    for name, shapes in _UNEVEN_SHAPES.items()
    for parallel, order, policy, options in (
        ("fsdp", "wrap", "memo", ()),
        ("fsdp", "parallel", "recompute", ()),
        ("ddp", "wrap", "memo", ()),
        ("ddp", "parallel", "memo", (("find_unused_parameters", True),)),
    )
] + [
    Case("fsdp-new kind", "fsdp", "wrap", "recompute", tuple(_SAME * 2), evaluates=((1, 0), (2, 0), (3, 1))),
    *(
        Case(f"parts-{name}", "parts", "wrap", "memo", tuple(_UNEVEN_SHAPES[name]))
        for name in ("batch sizes", "other in the first step")
    ),
]

#: Both orders of both are in tiled_ranks.py: each capture takes a second or more.
_TILED = [
    Case(f"{parallel}-{order} first-tiled", parallel, order, "tiled")
    for parallel, order in (("ddp", "wrap"), ("fsdp", "parallel"))
]

#: What says most: each engine in one order, and shapes that start or go on apart, each with both engines and orders.
_FIRST = [case for case in _EVERY if case.policy == "memo" and (case.order == "wrap") == (case.parallel == "ddp")]
_APART_NAMES = (
    "fsdp-wrap first-batch sizes", "ddp-parallel first-batch sizes", "fsdp-parallel first-other in the first step",
    "ddp-wrap first-other in the first step", "fsdp-new kind", "parts-other in the first step",
)  # fmt: skip
_APART = [case for case in _UNEVEN if case.name.startswith(_APART_NAMES)]

GROUPS = {
    "first": _FIRST,
    "apart": _APART,
    "every": [case for case in _EVERY if case not in _FIRST],
    "uneven": [case for case in _UNEVEN if case not in _APART],
    "tiled": _TILED,
}
#: Seconds after which a process that waits for the other one has lost it.
_PATIENCE = dict.fromkeys(GROUPS, 60) | {"tiled": 120}


def _made(parallel: Callable[[Tower], nn.Module], case: Case) -> nn.Module:
    model = tower(2)
    model.register_buffer("counts", torch.zeros(3))  # DDP sends buffers around in every forward
    if case.order == "wrap":
        memo.wrap(model, **_POLICIES[case.policy])
    made = parallel(model)
    if case.order != "wrap":
        memo.wrap(made, **_POLICIES[case.policy])
    return made


def _sharded(model: Tower, *, parts: bool) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        if parts:
            fully_shard(layer.qkv, mesh=mesh)
            fully_shard(layer.mlp, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def _without_sync(model: nn.Module, case: Case, last: bool) -> Iterator[None]:
    if case.parallel == "ddp" and not last:
        with model.no_sync():  # type: ignore[operator]
            yield
    else:
        if case.parallel != "ddp":
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
        model.train((number, rank) not in case.evaluates)
        with _without_sync(model, case, last=micro == case.micro_batches - 1):
            model(batches[rank]).square().mean().backward()
        for batch in batches:
            (plain(batch).square().mean() / RANKS).backward()
    return _error(model, plain)


def _run(case: Case, rank: int) -> dict[str, Any]:
    def parallel(model: Tower) -> nn.Module:
        if case.parallel != "ddp":
            return _sharded(model, parts=case.parallel == "parts")
        return DistributedDataParallel(model, **dict(case.options))

    model, plain = _made(parallel, case), tower(2)
    error = max(_step(model, plain, case, number, rank) for number in range(len(case.shapes)))
    report = memo.report(model)
    totals = report.totals
    acted = (
        totals.bytes_to_host == totals.forecast.bytes_to_host > 0
        and totals.bytes_to_device == totals.forecast.bytes_to_device
        and totals.recomputed_flops == totals.forecast.recomputed_flops
    )
    held = totals.host_bytes_in_use + totals.stash_bytes + totals.open_copies
    wrapped = find_wrapped(model)
    assert wrapped is not None, "it is wrapped until here"
    profiled = wrapped.profiled
    memo.unwrap(model)
    error = max(error, _step(model, plain, case, 0, rank))
    return {
        "native": sorted({block.reason for block in report.blocks if block.executor == "native"}),
        "error": error,
        "acted": acted,
        "held": held,
        "rebuilt": totals.recomputed_flops,
        "profiled": profiled,
    }


def main(folder: Path, rank: int, *groups: str) -> None:
    """Run every case of ``groups`` and write down what came of it."""
    torch.set_num_threads(1)
    timing._MOST_SAMPLES = 1  # several ranks take all that they may
    store = dist.FileStore(str(folder / "store"), RANKS)
    patience = datetime.timedelta(seconds=max(_PATIENCE[group] for group in groups))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=patience)
    outcomes: dict[str, Any] = {}
    for case in (case for group in groups for case in GROUPS[group]):
        try:
            outcomes[case.name] = _run(case, rank)
        except Exception as error:
            outcomes[case.name] = {"failed": f"{type(error).__name__}: {error}"}
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    _leave(store, rank)


def _leave(store: dist.FileStore, rank: int) -> None:
    """End this process when the other one is done too.

    Gloo aborts a process that still waits for one that has left, and a barrier of its own ends on one rank first: they
    meet in the store, whose file stays. What the interpreter would tear down is left to the system.
    """
    store.set(f"done {rank}", "")
    with contextlib.suppress(RuntimeError):  # the other one died: its outcomes are missing, which says so
        store.wait([f"done {other}" for other in range(RANKS)], datetime.timedelta(seconds=60))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
