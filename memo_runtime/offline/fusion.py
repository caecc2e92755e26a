"""What a compiled program would cost a GPU: FLOPs of its products, and bytes that its fused kernels read and write.

Between two products everything element-wise is one kernel: a value is read once, wherever in it it is used, and written
only if something behind the kernel needs it.

    x --> [norm] --> product --> [rotary, ...] --> product
    level    0          1             1               2

An operator is of the level of its latest product; operators of one level are one kernel. Products read and write at
their own rate, which is measured with them, but for those so thin that they wait for memory. Views cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from memo_runtime.execution.compilers import run_eagerly
from memo_runtime.execution.tiled_costs import node_flops
from memo_runtime.offline.work import Work, is_thin


@dataclass(slots=True)
class FusedWork:
    """A program of TorchInductor that is counted and not compiled: it runs as ``graph`` says."""

    graph: fx.Graph
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        self.work = fused_work(self.graph)

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run it, operator by operator."""
        return run_eagerly(self.graph)(*tensors)


@dataclass(slots=True)
class _Memory:
    """Storages by key: level of the kernel that makes each; None: it is there before, or a product makes it."""

    level: dict[int, int] = field(default_factory=dict)
    maker: dict[int, int | None] = field(default_factory=dict)
    size: dict[int, int] = field(default_factory=dict)
    reads: set[tuple[int, int]] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    def made(self, key: int, size: int, level: int, maker: int | None) -> None:
        """A storage of ``size`` bytes is there from ``level`` on."""
        self.level[key], self.maker[key], self.size[key] = level, maker, size

    def read(self, key: int, size: int, kernel: int | None) -> None:
        """``kernel`` uses it (None: a product, whose reading is in its rate)."""
        if self.maker[key] is not None and self.maker[key] != kernel:
            self.written.add(key)
        if kernel is not None and self.maker[key] != kernel:
            self.reads.add((kernel, key))
            self.size[key] = max(self.size[key], size)


def fused_work(graph: fx.Graph) -> Work:
    """The work of ``graph`` where each run of element-wise operators is one kernel."""
    memory, flops = _Memory(), 0
    for node in graph.nodes:
        if node.op == "placeholder":
            for key, size in _storages(node.meta.get("val")):
                memory.made(key, size, 0, None)
        elif node.op == "call_function":
            flops += _one(node, memory)
        elif node.op == "output":
            for key, size in _of_all(node.all_input_nodes):
                memory.read(key, size, None)
    read = sum(memory.size[key] for _, key in memory.reads)
    return Work(matmul=flops, traffic=read + sum(memory.size[key] for key in memory.written))


def _one(node: fx.Node, memory: _Memory) -> int:
    """Count one operator, and give its FLOPs."""
    given = {key: size for key, size in _of_all(node.all_input_nodes) if key in memory.maker}
    made = {key: size for key, size in _storages(node.meta.get("val")) if key not in memory.maker}
    level = max((memory.level[key] for key in given), default=0)
    flops = node_flops(node)
    thin = bool(flops) and is_thin(node.target, fx.node.map_arg(node.args, lambda one: one.meta["val"]))
    if node.target is torch.ops.aten.copy_.default:
        return _stored(node, memory)
    if not made:
        return flops
    # A thin product is a kernel of its own, which reads and writes at the rate of memory.
    kernel = -1 - len(memory.maker) if thin else None if flops else level
    for key, size in given.items():
        memory.read(key, size, kernel)
    for key, size in made.items():
        memory.made(key, size, level + 1 if flops else level, kernel)
    return flops


def _stored(node: fx.Node, memory: _Memory) -> int:
    """Count what is written to memory that the program was given: by the kernel that makes it, if that is none."""
    (target, _), (source, size) = _of_all([one for one in node.args if isinstance(one, fx.Node)])
    memory.read(source, size, memory.level[source])
    memory.written.add(target)
    return 0


def _of_all(nodes: list[fx.Node]) -> list[tuple[int, int]]:
    return [pair for node in nodes for pair in _storages(node.meta.get("val"))]


def _storages(value: Any) -> list[tuple[int, int]]:
    """(key, bytes that are read of it) of each tensor of ``value``; what is expanded is read once."""
    found = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found.append((storage._cdata, min(one.numel() * one.element_size(), int(storage.nbytes()))))
    return found
