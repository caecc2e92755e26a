"""The check that a capture must pass before it is used: random input, all outputs, all gradients.

Block and tiles run on a copy whose parameters are moved a little at random, so that a factor that starts as zero does
not hide what it multiplies. The check is short (tens of tokens, several tiles and a remainder) and needs the memory of
one more copy of the block's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from memo_runtime.blocks.ambient import AutocastState, RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.capture.axes import packed_rows
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.copying import structural_copy
from memo_runtime.capture.declared import DECLARED, OPERATOR, DrawLog, logged_draws, run_seeded
from memo_runtime.capture.dims import shortened
from memo_runtime.capture.rules import operator_name
from memo_runtime.errors import CaptureRefusedError
from memo_runtime.execution.mixers.by_rows import RowsAttention
from memo_runtime.execution.tiled_run import Run

_TILE = 8
#: Lengths to try: several tiles and a remainder where the trace allows it.
_LENGTHS = (29, 32, 64, 128, 256, 1024)
#: Most relative difference (L2). Rounding stays far below, what the check is for (a lost gradient, a frozen branch)
#: far above.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
#: A tensor is judged against at least this share of the largest of its kind: some gradients are zero but for rounding.
_FLOOR = 1e-2

Execute = Callable[[nn.Module, BlockCall, int], tuple[Any, Run]]


def check(captured: Captured, block: nn.Module, call: BlockCall, execute: Execute) -> None:
    """Compare ``captured`` with the forward of ``block``'s class.

    Args:
        captured: what is to be used.
        block: the live module; it is copied, not run.
        call: a call that ``captured`` serves.
        execute: runs ``captured`` on (a module, a call, a tile size).

    Raises:
        CaptureRefusedError: an output or a gradient differs; names it and says by how much. Or it does not run.
    """
    with RandomState.current(call.leaves[captured.input_leaf].device).restored(), torch.enable_grad():
        copied = _moved_copy(block)
        short = _short_call(captured, call)
        inputs = {f"argument {index}": leaf for index, leaf in short.tensors() if leaf.requires_grad}
        states = (*copied.named_parameters(), *copied.named_buffers())
        inputs |= {name: one for name, one in states if one.requires_grad}
        try:
            with logged_draws() as log:
                result, run = execute(copied, short, _TILE)
        except RuntimeError as error:
            pass_on(error)
            raise CaptureRefusedError("check", f"its forward fails: {first_line(error)}") from error
        try:
            mine = _outputs_and_gradients(result, inputs)
        except RuntimeError as error:
            raise CaptureRefusedError("check", f"its backward fails: {first_line(error)}") from error
        _give_seeds(captured, copied, log)
        args, kwargs = short.arguments()
        with _GivenDropout(run):
            result = copied.forward(*args, **kwargs)
        theirs = _outputs_and_gradients(result, inputs)
    _compare(mine, theirs, _tolerance([*inputs.values()], call, captured))


def _moved_copy(block: nn.Module) -> nn.Module:
    memo: dict[int, torch.Tensor] = {
        id(one): one.detach().clone().requires_grad_(one.requires_grad) for one in block.buffers()
    }
    for one in block.parameters():
        moved = one.detach().clone()
        if moved.is_floating_point():
            moved.add_(torch.randn_like(moved), alpha=0.02)
        memo[id(one)] = nn.Parameter(moved, requires_grad=one.requires_grad)
    return structural_copy(block, memo)


def _short_call(captured: Captured, call: BlockCall) -> BlockCall:
    """The first tokens of ``call``, with random numbers for what needs a gradient."""
    tokens = captured.tokens(call)
    allowed = [n for n in _LENGTHS if n <= tokens and captured.traced.allows(n)]
    short = shortened(call, allowed[0] if allowed else tokens, captured.reading)
    fresh = {}
    for index, leaf in short.tensors():
        if index == captured.input_leaf or leaf.requires_grad:
            fresh[index] = torch.randn_like(leaf).requires_grad_(leaf.requires_grad)
    return short.replaced(fresh)


def _outputs_and_gradients(result: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    found: dict[str, torch.Tensor | None] = {}
    pairs = []
    for index, leaf in enumerate(leaves_of(result)):
        if not isinstance(leaf, torch.Tensor):
            continue
        found[f"output {index}"] = leaf.detach()
        if leaf.requires_grad:
            generator = torch.Generator(leaf.device).manual_seed(index)
            pairs.append((leaf, torch.randn(leaf.shape, generator=generator, device=leaf.device).to(leaf.dtype)))
    if pairs and inputs:
        leaves, weights = zip(*pairs, strict=True)
        grads = torch.autograd.grad(leaves, list(inputs.values()), weights, allow_unused=True)
        found |= {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return found


def _tolerance(inputs: Sequence[torch.Tensor], call: BlockCall, captured: Captured) -> float:
    kind = call.leaves[captured.input_leaf].device.type
    dtypes = [one.dtype for one in inputs]
    dtypes += [dtype for name, enabled, dtype in AutocastState.current(kind).settings if enabled and name == kind]
    return max((_TOLERANCES.get(dtype, 0.1) for dtype in dtypes), default=_TOLERANCES[torch.float32])


def _compare(
    mine: Mapping[str, torch.Tensor | None], theirs: Mapping[str, torch.Tensor | None], tolerance: float
) -> None:
    if mine.keys() != theirs.keys():
        raise CaptureRefusedError("check", "tiles yield other outputs than the block")
    scale: dict[str, float] = {}
    for name, value in theirs.items():
        if value is not None:
            kind = name.split()[0]
            scale[kind] = max(scale.get(kind, 0.0), float(value.double().norm()) / max(value.numel(), 1) ** 0.5)
    for name, value in theirs.items():
        other = mine[name]
        if value is None and other is None:
            continue
        reference = value if value is not None else torch.zeros_like(other)  # type: ignore[arg-type]
        other = other if other is not None else torch.zeros_like(reference)
        if other.shape != reference.shape or other.dtype != reference.dtype:
            raise CaptureRefusedError("check", f"{name} has another shape or dtype by tiles than in the block")
        size = max(float(reference.double().norm()), _FLOOR * scale.get(name.split()[0], 0.0) * other.numel() ** 0.5)
        nans = _where_nan(bool(other.isnan().any()), bool(reference.isnan().any()))
        if nans:
            raise CaptureRefusedError("check", f"{name} has NaN {nans}, so the two cannot be compared")
        error = float((other.double() - reference.double()).norm())
        if not error <= tolerance * size:
            share = error / size if size else float("inf")
            raise CaptureRefusedError("check", f"{name} differs by {share:.2g} (relative) between tiles and the block")


def _where_nan(mine: bool, theirs: bool) -> str:
    """Words for who has NaN; empty: nobody."""
    if mine and theirs:
        return "by tiles and in the block alike"
    return "by tiles and not in the block" if mine else "in the block and not by tiles" if theirs else ""


class _GivenSeeds:
    """The forward of a declared module that draws, for the whole sequence: in tiles, by the seeds that theirs had."""

    def __init__(self, nodes: Sequence[fx.Node], captured: Captured, module: nn.Module, log: DrawLog) -> None:
        self._nodes, self._captured, self._module, self._log = nodes, captured, module, log
        self._calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        node: Any = self._nodes[self._calls]
        declared, seeds = DECLARED[node.args[1]], self._log.seeds[node.args[1]][self._calls :: len(self._nodes)]
        self._calls += 1
        axes = [self._captured.stages.axes[one] for one in node.args[0]]
        outputs = declared.axes(axes)
        call = BlockCall.of(args, kwargs)
        named = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        tensors = [*(named[name] for name in declared.states), *(call.leaves[leaf] for leaf in declared.leaves)]
        tokens, parts = declared.tokens(tensors), []
        for start, seed in zip(range(0, tokens, _TILE), seeds, strict=True):
            tile = [packed_rows(one, axis, tokens, start, min(start + _TILE, tokens))
                    for one, axis in zip(tensors, axes, strict=True)]  # fmt: skip
            with torch._C.DisableTorchFunction():  # its dropouts are none of the block's
                parts.append(run_seeded(declared, seed, tile))
        joined = [_joined(group, axis) for group, axis in zip(zip(*parts, strict=True), outputs, strict=False)]
        return declared.yielded(joined)


def _joined(tiles: Sequence[torch.Tensor], axis: Any) -> torch.Tensor:
    split = [one.unflatten(axis.dim, (axis.outer, -1, axis.inner)) for one in tiles]
    return torch.cat(split, dim=axis.dim + 1).flatten(axis.dim, axis.dim + 2)


def _give_seeds(captured: Captured, copied: nn.Module, log: DrawLog) -> None:
    """Make declared modules of ``copied`` that draw do so as their tiles did."""
    for name, calls in captured.traced.declared.calls.items():
        if any(declared.random for _, declared in calls):
            keys = [key for key, _ in calls]
            nodes = [node for node in captured.traced.graph.nodes
                     if operator_name(node) == OPERATOR and node.args[1] in keys]  # fmt: skip
            module = copied.get_submodule(name)
            module.__dict__["forward"] = _GivenSeeds(nodes, captured, module, log)


class _GivenDropout(TorchFunctionMode):
    """Runs a block with the masks that its tiles drew."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._calls = 0
        self._attentions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.dropout, torch.dropout):
            return self._dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(func, *args, **kwargs)
        if isinstance(func, FunctionType) and func.__globals__ is vars(functional):
            # One that asks modes first, as that of nn.MultiheadAttention: its own calls would not come by here.
            func = self._inside(func)
        return func(*args, **kwargs)

    def _inside(self, func: FunctionType) -> FunctionType:
        """``func`` of ``torch.nn.functional``, whose own calls of dropout and attention come here."""
        ours = {
            "dropout": self._dropout,
            "scaled_dot_product_attention": partial(self._attention, functional.scaled_dot_product_attention),
        }
        names = vars(functional) | ours
        inside = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        inside.__kwdefaults__ = func.__kwdefaults__
        return inside

    def _dropout(self, source: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p == 0.0:
            return source
        mask = self._run.whole_mask(self._calls)
        self._calls += 1
        scaled = mask.to(source.dtype) * (0.0 if p == 1.0 else 1.0 / (1.0 - p))
        return source.mul_(scaled) if inplace else source * scaled

    def _attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        self._attentions += 1
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, drop = named["query"], float(named.get("dropout_p") or 0.0)
        if drop == 0.0:
            return func(*args, **kwargs)
        scale = named.get("scale")
        seed = self._run.attention_seed(self._attentions - 1)
        rows = RowsAttention(
            scale if scale is not None else query.shape[-1] ** -0.5, bool(named.get("is_causal")), drop, seed
        )
        return rows.whole(query, named["key"], named["value"], named.get("attn_mask"))
