"""Programs that run one segment on one tile.

Forward and backward of a segment are traced together at the tile's own sizes, below autograd; then the joint graph is
cut in up to four programs:

    forward           sources                 -> outputs, written to where they are kept (``tiled_places.py``)
    forward and keep  sources                 -> outputs likewise, products
    backward          sources, gradients      -> gradients of sources     (what it needs of the forward is run again)
    backward of kept  sources, products, ...  -> gradients of sources     (only what is cheap is run again)

where products are the results of the matrix products that backward needs. Every forward also yields what it has chosen
(``capture/choices.py``), which whatever runs again is given: backward, and a fifth program, ``rebuild``, that makes
outputs anew. What backward does not need is not run again:
the last product of a segment never is. All of them take copies of weights in the precision of autocast behind their
sources, which one more program makes once for all tiles. A weight gradient that is one matrix product is not computed
in the program: its factors are yielded, so that the product is added to an accumulator of higher precision by the GEMM
itself. So are those of any other gradient that is one, which the GEMM then writes to its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.capture.captured import TRACING, Captured
from memo_runtime.capture.choices import TOKEN_WISE, TOPK, borrowed, count_kept, owned, run_again
from memo_runtime.capture.split import Segment
from memo_runtime.execution.compilers import Compiler, Eager, Program, run_eagerly
from memo_runtime.execution.tiled_costs import DECLARED_BACKWARD, ProgramBytes, node_flops, tensor_bytes
from memo_runtime.execution.tiled_places import Placed, placed, viewed_product
from memo_runtime.execution.tiled_reach import reaching
from memo_runtime.execution.tiled_rows import gapless_like

aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


@dataclass(frozen=True, slots=True)
class Factors:
    """A weight gradient as places of its factors among a program's results: ``(left @ right)``, transposed or not."""

    left: int
    right: int
    transposed: bool


@dataclass(frozen=True, slots=True)
class RowFactors:
    """The gradient of a value with tokens as ``left @ right``, likewise; ``layout``: the gradient's (a meta tensor)."""

    left: int
    right: int
    layout: torch.Tensor


#: Where the gradient of one source is: a place among the results, factors of it, or nowhere.
GradientPlace = int | Factors | RowFactors | None


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of one tile, and bytes beside its inputs while a program runs.

    Args:
        forward: FLOPs of forward. again: of these, what backward runs again. again_kept: what backward of kept does.
        forward_bytes, backward_bytes: of the programs, their results included.
        output_bytes: of the outputs, which are where the caller keeps them.
        product_bytes: of the products that are kept. choice_bytes: of the choices that all tiles keep. cast_bytes: of
            copies of weights in another precision.
    """

    forward: int
    again: int
    again_kept: int
    forward_bytes: ProgramBytes
    backward_bytes: ProgramBytes
    output_bytes: int
    product_bytes: int
    choice_bytes: int
    cast_bytes: int


@dataclass(slots=True)
class Programs:
    """The programs of one segment at one tile size.

    Args:
        casts: sources -> casts of weights; they come behind the sources of the other programs.
        choices: how many choices and seeds the forward programs yield before products.
        places: where the gradient of each source is. reached: by source, from which outputs' gradients one comes.
        layouts: sizes and strides of outputs (meta tensors); their gradients are given as ``gapless_like`` these.
        cost: what one run of each takes.
    """

    casts: Eager
    forward: Placed
    forward_keep: Placed
    rebuild: Placed
    backward: Program
    backward_kept: Program
    choices: int
    places: tuple[GradientPlace, ...]
    reached: tuple[frozenset[int], ...]
    layouts: tuple[torch.Tensor, ...]
    cost: Cost


def run_node(
    node: fx.Node, values: dict[fx.Node, Any], size: Callable[[Any], Any], kept: Sequence[torch.Tensor] | None = None
) -> Any:
    """Run one captured operator; sizes are asked of ``size``; ``kept``: what it chose before."""

    def value(one: fx.Node) -> Any:
        return values[one] if one in values else size(one.meta["val"])

    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    if kept is not None:
        return run_again(node, args, dict(kwargs), kept)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def segment_outputs(
    captured: Captured, stage: int, sources: Sequence[torch.Tensor], tokens: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run a segment operator by operator on tiles of ``tokens`` tokens: (outputs, what it has chosen)."""
    segment, stages = captured.segment(stage), captured.stages
    values: dict[fx.Node, Any] = dict(zip(segment.sources, sources, strict=False))
    rest = iter(sources[len(segment.sources) :])
    given = {node: [next(rest) for _ in range(count_kept(node))] for node, _, _ in borrowed(stages, stage)}
    chosen: list[torch.Tensor] = []
    own = owned(stages, stage)
    for node in segment.nodes:
        values[node] = run_node(node, values, lambda size: captured.size(size, tokens), given.get(node))
        if node in own:
            chosen.extend(values[node][-count_kept(node) :])
    return [values[node] for node in segment.outputs], chosen


def make_programs(
    captured: Captured,
    stage: int,
    sources: Sequence[torch.Tensor],
    tokens: int,
    autocast: AutocastState,
    *,
    compiler: Compiler,
    fused: bool = False,
) -> Programs:
    """Trace segment number ``stage`` for tiles like ``sources``, with the choices that it borrows behind them.

    The graphs hold casts of autocast, so they run without it. ``fused``: costs are those of programs that are compiled.
    """
    segment = captured.segment(stage)
    joint, layouts, reached = _trace(captured, stage, sources, tokens, autocast)
    graph = joint.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = list(output.args[0])
    ends = len(segment.outputs), len(results) - len(segment.sources)
    outputs, choices, grads = results[: ends[0]], results[ends[0] : ends[1]], results[ends[1] :]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    given = inputs[: len(sources)]
    wanted, places = _gradient_results(segment, grads)
    products = _products(graph, given, wanted)
    casts = _casts(graph, [node for node, source in zip(given, segment.sources, strict=False)
                           if segment.axes[source] is None])  # fmt: skip
    tangents = inputs[len(given) :]
    given += casts
    again = [*given, *tangents, *choices]
    again_kept = [*again, *products]
    forward = _part(graph, given, [*outputs, *choices])
    forward_keep = _part(graph, given, [*outputs, *choices, *products])
    rebuild = _part(graph, [*given, *choices], outputs) if choices else None
    backward, backward_kept = _part(graph, again, wanted), _part(graph, again_kept, wanted)
    rerun = forward_nodes(graph, given)
    cost = Cost(
        forward=sum(node_flops(node) for node in forward.nodes),
        again=_flops_between(graph, again, wanted, rerun),
        again_kept=_flops_between(graph, again_kept, wanted, rerun),
        forward_bytes=ProgramBytes.of(forward, forward_keep, fused=fused),
        backward_bytes=ProgramBytes.of(backward, backward_kept, fused=fused),
        output_bytes=sum(tensor_bytes(node.meta["val"]) for node in outputs),
        product_bytes=sum(tensor_bytes(node.meta["val"]) for node in products),
        choice_bytes=sum(tensor_bytes(node.meta["val"]) for node in choices if node.meta["val"].dim()),
        cast_bytes=sum(tensor_bytes(node.meta["val"]) for node in casts),
    )
    run_forward = placed(forward, len(outputs), compiler)
    return Programs(
        casts=run_eagerly(_part(graph, inputs[: len(sources)], casts)),
        forward=run_forward,
        forward_keep=placed(forward_keep, len(outputs), compiler),
        rebuild=placed(rebuild, len(outputs), compiler) if rebuild is not None else run_forward,
        backward=compiler(backward),
        backward_kept=compiler(backward_kept),
        choices=len(choices),
        places=places,
        reached=reached,
        layouts=layouts,
        cost=cost,
    )


def _trace(
    captured: Captured, stage: int, sources: Sequence[torch.Tensor], tokens: int, autocast: AutocastState
) -> tuple[fx.GraphModule, tuple[torch.Tensor, ...], tuple[frozenset[int], ...]]:
    """(the graph of outputs, choices, and a gradient or None of each source; what outputs look like; ``reaching``)."""
    segment, wanted = captured.segment(stage), captured.stages.differentiable
    needs = [node in wanted for node in segment.sources]
    tangents: list[torch.Tensor] = []
    layouts: list[torch.Tensor] = []
    reached: list[frozenset[int]] = []
    mode = FakeTensorMode()
    mode.cache_enabled = False  # hardly anything in a tile is done twice

    def joint(inputs: list[torch.Tensor]) -> list[Any]:
        outputs, chosen = segment_outputs(captured, stage, inputs, tokens)
        # What they look like is known once outputs are there; they become inputs of the graph afterwards. They lie as
        # in a run: strides of dimensions of size one may be any, and operators order what they yield by them.
        tangents.extend(gapless_like(out, out.device) for out in outputs)
        layouts.extend(_on_meta(out) for out in outputs)
        reached.extend(reaching(outputs, inputs[: len(needs)]))
        pairs = [(out, tangent) for out, tangent in zip(outputs, tangents, strict=True) if out.requires_grad]
        sought = [one for one, need in zip(inputs, needs, strict=False) if need]
        found: tuple[Any, ...] = (None,) * len(sought)
        if pairs and sought:
            results, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(results, sought, grads, allow_unused=True)
        each = iter(found)
        return [*tangents, *outputs, *chosen, *(next(each) if need else None for need in needs)]

    one_thread = torch.autograd.set_multithreading_enabled(False)
    # Anomaly mode asks gradients whether they are NaN, and these have no values.
    no_questions = torch.autograd.set_detect_anomaly(False)
    with TRACING, mode, torch.enable_grad(), autocast.uncached().restored(), one_thread, no_questions:
        fakes = [_alike(one) for one in sources]
        for one, need in zip(fakes, needs, strict=False):
            one.requires_grad_(need)
        module: fx.GraphModule = make_fx(joint, tracing_mode="real")(fakes)
    for node in list(module.graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    _results_to_inputs(module.graph, len(tangents))
    return module, tuple(layouts), tuple(reached)


def _results_to_inputs(graph: fx.Graph, count: int) -> None:
    """Make the first ``count`` results of ``graph`` inputs, behind those that it has."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = list(output.args[0])
    output.args = (results[count:],)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        given = [graph.placeholder(f"result_{number}") for number in range(count)]
    for node, one in zip(results, given, strict=False):
        one.meta = dict(node.meta)
        node.replace_all_uses_with(one)
        graph.erase_node(node)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _gradient_results(segment: Segment, grads: Sequence[Any]) -> tuple[list[fx.Node], tuple[GradientPlace, ...]]:
    """(results of the backward programs, where each source's gradient is among them)."""
    results: list[fx.Node] = []
    places: list[GradientPlace] = []
    for source, grad in zip(segment.sources, grads, strict=True):
        if grad is None:
            places.append(None)
            continue
        product = viewed_product(grad) if segment.axes[source] is not None else None
        factors = _factors(grad) if segment.axes[source] is None else None
        if product is not None and product.target is aten.mm.default and grads.count(grad) == 1:
            places.append(RowFactors(len(results), len(results) + 1, _on_meta(grad.meta["val"])))
            results.extend(product.args)  # type: ignore[arg-type]
        elif factors is not None:
            left, right, transposed = factors
            places.append(Factors(len(results), len(results) + 1, transposed))
            results.extend([left, right])
        else:
            places.append(len(results))
            results.append(grad)
    return results, tuple(places)


def _factors(grad: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(left, right, transposed) where ``grad`` is one matrix product."""
    transposed = False
    while isinstance(grad, fx.Node) and grad.op == "call_function":
        if grad.target is aten.mm.default:
            left, right = grad.args
            return left, right, transposed  # type: ignore[return-value]
        if grad.target in (aten.t.default, aten.transpose.int) and grad.meta["val"].dim() == 2:
            transposed = not transposed
        elif grad.target is aten._to_copy.default:
            if grad.meta["val"].dtype not in (torch.float32, torch.float64):
                return None  # rounded on purpose
        elif grad.target is not aten.detach.default:
            return None
        grad = grad.args[0]  # type: ignore[assignment]
    return None


def _casts(graph: fx.Graph, weights: Sequence[fx.Node]) -> list[fx.Node]:
    """Copies of weights in another precision."""
    return [
        node for node in graph.nodes
        if node.target is aten._to_copy.default and node.args[0] in weights
    ]  # fmt: skip


def forward_nodes(graph: fx.Graph, given: Sequence[fx.Node]) -> set[fx.Node]:
    """``given``, and what can be made of it alone: the forward."""
    forward = set(given)
    for node in graph.nodes:
        if node.op == "call_function" and all(one in forward for one in node.all_input_nodes):
            forward.add(node)
    return forward


def _products(graph: fx.Graph, given: Sequence[fx.Node], wanted: Sequence[fx.Node]) -> list[fx.Node]:
    """Results of matrix products of the forward that backward needs."""
    forward = forward_nodes(graph, given)
    needed: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in forward and node.target in _PRODUCTS:
            needed.append(node)
        else:
            pending.extend(node.all_input_nodes)
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(needed, key=order.__getitem__)


@dataclass(slots=True)
class _Copying:
    """Operators copied into ``part``; those of which choices are given run as they say."""

    part: fx.Graph
    copies: dict[fx.Node, fx.Node]
    chosen: dict[Any, list[fx.Node]]

    def copy(self, node: fx.Node) -> None:
        """Copy ``node``, whose arguments have been."""
        source = node.args[0] if node.target is operator.getitem else None
        if node.target is TOPK and node in self.chosen:
            return
        if source in self.chosen and source.target is TOPK:  # type: ignore[union-attr]
            (indices,) = self.chosen[source]
            dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", -1)  # type: ignore[union-attr]
            given = self.copies[source.args[0]]  # type: ignore[union-attr, index]
            self.copies[node] = self.part.call_function(aten.gather.default, (given, dim, indices))
            self.copies[node].meta = dict(node.meta)
            return
        self.copies[node] = self.part.node_copy(node, self.copies.__getitem__)
        if node.target is TOKEN_WISE and node in self.chosen:
            tensors, key = self.copies[node].args
            self.part.erase_node(self.copies[node])
            again = torch.ops.memo_runtime.token_wise_again.default
            self.copies[node] = self.part.call_function(again, (tensors, self.chosen[node], key))
            self.copies[node].meta = dict(node.meta)


def _part(graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.Graph:
    """The part of ``graph`` that makes ``results`` out of ``inputs``, which may be inside it."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = part.placeholder(f"input_{index}")
        copies[node].meta = dict(node.meta)
    needed = _between(inputs, results)
    chosen: dict[Any, list[fx.Node]] = {}
    for node in inputs:
        # Inputs inside the graph are products, or choices: members of what their operators yield.
        if node.target is operator.getitem:
            chosen.setdefault(node.args[0], []).append(copies[node])
    copying = _Copying(part, copies, chosen)
    for node in graph.nodes:
        if node in needed:
            copying.copy(node)
    part.output(tuple(copies[node] for node in results))
    return part


def _between(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> set[fx.Node]:
    """The operators that make ``results`` out of ``inputs``."""
    ends, needed = set(inputs), set()
    pending = [node for node in results if node not in ends]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(one for one in node.all_input_nodes if one not in ends)
    return needed


def _flops_between(
    graph: fx.Graph, inputs: Sequence[fx.Node], results: Sequence[fx.Node], counted: set[fx.Node]
) -> int:
    needed = _between(inputs, results)
    again = (node for node in graph.nodes if node in needed and (node in counted or node.target is DECLARED_BACKWARD))
    return sum(node_flops(node) for node in again)


def accumulate(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, transposed: bool, first: bool = False
) -> None:
    """``total += left @ right`` (or its transpose) in the precision of ``total``, which may be above the factors'.

    ``first``: nothing is there yet, so the product is written and not added.
    """
    if transposed:
        left, right = right.t(), left.t()
    if total.device.type == "cuda" and total.dtype == torch.float32 and left.dtype in _HALVES:
        # One GEMM that reads 16-bit factors and writes, or adds to, the 32-bit total.
        if first:
            aten.mm.dtype_out(left, right, total.dtype, out=total)
        else:
            aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
        return
    wide = torch.promote_types(left.dtype, total.dtype)
    left, right = left.to(wide), right.to(wide)
    if wide != total.dtype:
        # The factors are of a weight that was cast up: what is rounded is their product.
        product = left @ right
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)
