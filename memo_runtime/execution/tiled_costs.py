"""What a traced program takes: FLOPs, and bytes that are alive at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from memo_runtime.capture.declared import DECLARED, Declared
from memo_runtime.execution.inlining import inlined, storages

DECLARED_FORWARD = torch.ops.memo_runtime.token_wise.default
DECLARED_AGAIN = torch.ops.memo_runtime.token_wise_again.default
DECLARED_BACKWARD = torch.ops.memo_runtime.token_wise_backward.default


def node_flops(node: fx.Node) -> int:
    """FLOPs of one traced operator, by PyTorch's own formulas; 0 where it has none.

    Of a declared module: as counted when it was tested; of its backward: of the forward that is run again for it.
    """
    if node.op == "call_function" and node.target in (DECLARED_FORWARD, DECLARED_BACKWARD):
        return round(_declared(node).flops * _declared_tokens(node))
    formula = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if node.op != "call_function" or formula is None:
        return 0

    def value(one: fx.Node) -> Any:
        return one.meta["val"]

    args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _declared(node: fx.Node) -> Declared:
    key: Any = node.args[-1]
    return DECLARED[key]


def _declared_tokens(node: fx.Node) -> int:
    tensors: Any = node.args[0]
    return int(_declared(node).tokens([one.meta["val"] for one in tensors]))


def _inside(node: fx.Node) -> int:
    """Bytes that a declared module takes while it runs, beside its results: what its backward needs."""
    if node.target not in (DECLARED_FORWARD, DECLARED_BACKWARD, DECLARED_AGAIN):
        return 0
    return round(_declared(node).saved_bytes * _declared_tokens(node))


def tensor_bytes(value: Any) -> int:
    """Bytes of the elements of a tensor; 0 of anything else."""
    return int(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


@dataclass(frozen=True, slots=True)
class ProgramBytes:
    """Bytes that a program of one tile takes beside what it is given, with nothing kept and with products kept.

    ``bare``, ``kept``: at most while it runs. ``bare_results``, ``kept_results``: when it is over.
    """

    bare: int
    kept: int
    bare_results: int
    kept_results: int

    @classmethod
    def of(cls, bare: fx.Graph, kept: fx.Graph, *, fused: bool) -> ProgramBytes:
        """Of the two programs, compiled where ``fused``, else run operator by operator."""
        most, most_kept = (bytes_alive(graph, inlined(graph) if fused else ()) for graph in (bare, kept))
        return cls(most, most_kept, bytes_yielded(bare), bytes_yielded(kept))

    def beside(self, more: int) -> ProgramBytes:
        """With ``more`` bytes that are there all the while."""
        return ProgramBytes(
            self.bare + more, self.kept + more, self.bare_results + more, self.kept_results + more
        )

    def adding(self, more: int) -> ProgramBytes:
        """With ``more`` bytes that are there beside its results when it is over."""
        bare, kept = self.bare_results + more, self.kept_results + more
        return ProgramBytes(max(self.bare, bare), max(self.kept, kept), bare, kept)


def bytes_yielded(graph: fx.Graph) -> int:
    """Bytes of the results that are no inputs."""
    given = {key for node in graph.nodes if node.op == "placeholder" for key, _ in storages(node.meta.get("val"))}
    (output,) = (node for node in graph.nodes if node.op == "output")
    made = {key: size for node in output.all_input_nodes for key, size in storages(node.meta.get("val"))}
    return sum(size for key, size in made.items() if key not in given)


def bytes_alive(graph: fx.Graph, unmade: Collection[int] = ()) -> int:
    """Most bytes that are there at once beside the inputs, where each value goes after its last use.

    Views are their base. ``unmade``: storages that never exist, since whoever reads them makes them of what they are
    made of (``inlined``), which stays until then.
    """
    nodes = list(graph.nodes)
    given = {key for node in nodes if node.op == "placeholder" for key, _ in storages(node.meta.get("val"))}
    last = _last_uses(nodes, unmade)
    alive = highest = 0
    there: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for key, count in storages(node.meta.get("val")):
            if key not in there and key not in given and key not in unmade:
                there[key] = count
                alive += count
        highest = max(highest, alive + _inside(node))
        for key in [key for key in there if last[key] == index]:
            alive -= there.pop(key)
    return highest


def _last_uses(nodes: Sequence[fx.Node], unmade: Collection[int]) -> dict[int, int]:
    """Where each storage is used for the last time; what an unmade one is made of is used where that is."""
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for key, _ in (*storages(node.meta.get("val")), *_read(node)):
            last[key] = index
    for node in reversed(nodes):
        made = [last[key] for key, _ in storages(node.meta.get("val")) if key in unmade]
        for key, _ in _read(node) if made else ():
            last[key] = max(last[key], *made)
    return last


def _read(node: fx.Node) -> Iterator[tuple[int, int]]:
    for source in node.all_input_nodes:
        yield from storages(source.meta.get("val"))
