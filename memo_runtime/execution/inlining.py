"""Values of a traced program that its compiled form never holds: whoever reads one makes it again.

    x --> float --> pow --> mean --> rsqrt --+
          float ------------------> mul <----+--> mul by weight --> product
          ^ not held                ^ not held    ^ held: a product reads memory

So does ``torch.compile`` on a GPU with what is element-wise and made of a few tensors (``realize_reads_threshold`` of
its configuration), however many read it. What products, other libraries' kernels and the caller read is always held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
#: Of more tensors than these a value is held where it is read more than once.
_FEW = 4
#: What reads like something element-wise, and is not tagged so.
_READERS = (
    aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.amax.default, aten.amin.default, aten.var.correction,
    aten.copy_.default, aten._to_copy.default, aten.clone.default,
)  # fmt: skip
_MAKERS = (aten._to_copy.default,)


def storages(value: Any) -> Iterator[tuple[int, int]]:
    """(key, bytes) of the memory of a node's value, of each tensor in it."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            yield storage._cdata, int(storage.nbytes())


def inlined(graph: fx.Graph) -> frozenset[int]:
    """Keys of the storages that the compiled program does not hold."""
    nodes = list(graph.nodes)
    readers: dict[int, list[fx.Node]] = {}
    written: set[int] = set()
    for node in nodes:
        own = {key for key, _ in storages(node.meta.get("val"))}
        for source in node.all_input_nodes:
            for key, _ in storages(source.meta.get("val")):
                if key not in own:
                    readers.setdefault(key, []).append(node)
                elif _writes(node):
                    written.add(key)
    found: set[int] = set()
    reads: dict[int, frozenset[int]] = {}
    for node in nodes:
        keys = [key for key, _ in storages(node.meta.get("val"))]
        if node.op != "call_function" or len(keys) != 1 or not _is(node, _MAKERS):
            continue
        (key,) = keys
        sources = {one for source in node.all_input_nodes for one, _ in storages(source.meta.get("val"))}
        if key in sources or key in written:
            continue  # a view, or something that is written to
        reads[key] = frozenset().union(*(reads[one] if one in found else {one} for one in sources))
        used = readers.get(key, [])
        if used and all(_is(one, _READERS) for one in used) and (len(used) == 1 or len(reads[key]) <= _FEW):
            found.add(key)
    return frozenset(found)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _is(node: fx.Node, others: tuple[Any, ...]) -> bool:
    """It is element-wise, or one of ``others``."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in others
