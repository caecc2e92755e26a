"""One call of a block as a graph of operators, with the number of tokens as a symbol.

The trace runs on a structural copy of the block whose parameters and buffers are fake tensors, so the live module is
never called, nothing is allocated, and hooks of the live module (FSDP's, a profiler's) do not see it. Parameters are
inputs of the graph: at each call they are read from the live module.

The trace is the one that ``torch.export`` makes in its non-strict mode, before autograd, so composite operators
(``linear``) stay whole, and attention is never run (``attention.py``): no kernel's conditions are part of it.
``export`` itself is not used: it wants real tensors to make fake ones of, and turns a length that a block only compares
with a constant into an error.

A module that was declared token-wise is one operator of the trace (``declared.py``), and not looked into.

Note [What a trace cannot see]
Custom backwards and tensor hooks leave no operator, and a hook of an inner module runs at trace time only. All three
are refused here, by name. Python state is frozen into the graph: where it changes, inside the block (``key.py``) or
outside (``blocks/outside.py``), the block is captured again. What the block itself changes of it (a counter, an
auxiliary loss that it stores, a random generator) would be lost: that is refused too.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.blocks.cache import is_cache
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import flatten
from memo_runtime.blocks.declared import declared_in
from memo_runtime.blocks.outside import Outside
from memo_runtime.blocks.reach import reach
from memo_runtime.blocks.state import argument_roots
from memo_runtime.blocks.undo import Undo
from memo_runtime.capture.assigned import Watched
from memo_runtime.capture.at_length import same_operators
from memo_runtime.capture.attention import STAND_INS, named_again
from memo_runtime.capture.axes import TokenSymbol
from memo_runtime.capture.composites import composites
from memo_runtime.capture.copying import HOOK_TABLES, structural_copy
from memo_runtime.capture.declaring import DeclaredCalls
from memo_runtime.capture.dims import USUAL, Reading, token_dims
from memo_runtime.capture.flash import flash_stands_in
from memo_runtime.capture.key import changed, hooks_of_all_modules, kinds_inside, state_key
from memo_runtime.capture.recorders import is_idle
from memo_runtime.errors import CaptureRefusedError

#: What is named where a call, or a block as a whole, cannot be traced.
ARGUMENTS, FORWARD = "arguments", "forward"
#: Meta entry of placeholders; traced values are detached.
NEEDS_GRAD = "needs_grad"
#: Backwards that belong to operators of libraries (``torch.library.register_autograd``): they go with the operator.
_OF_OPERATORS = "GeneratedBackwardFor_"
_CHANGES = "it changes when the block runs, which tiles would not do"
#: What PyTorch says of a tensor that the trace was not told of, and of the operator that meets it.
_FOREIGN = re.compile(r"convert all Tensors to FakeTensors first.* Found in ([\w.]+)\(", re.DOTALL)
_NOT_TOLD = (
    "one of its arguments is a tensor that is neither a parameter nor a buffer of the block, nor given to it: "
    "a plain attribute, or one from outside"
)
_FAKE_TENSORS = logging.getLogger("torch._subclasses.fake_tensor")
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


@dataclass(slots=True)
class Trace:
    """A graph whose placeholders are states (parameters, then buffers), then tensor leaves of the call.

    Args:
        graph: what the block does.
        states: qualified names of the parameters and buffers, in the order of the placeholders.
        leaves: indices of the tensor leaves of the call, in the order of the placeholders.
        output: structure of what the block yields; its leaves are the graph's outputs.
        token: the symbolic number of tokens.
        guards: conditions on it that the block's own Python code has asked for.
        fake_mode: what the traced values belong to.
        declared: modules that were declared token-wise, and their calls.
        outside: what the block reads beside itself and its arguments.
        besides: a length that it holds for though ``guards`` exclude it (``at_length.py``).
    """

    graph: fx.Graph
    states: tuple[str, ...]
    leaves: tuple[int, ...]
    output: Any
    token: TokenSymbol
    guards: tuple[Any, ...]
    fake_mode: FakeTensorMode
    declared: DeclaredCalls
    outside: Outside
    besides: int | None = None

    def allows(self, tokens: int) -> bool:
        """The trace holds for this number of tokens; also where somebody has asked a traced size for its number."""
        fixed = self.fake_mode.shape_env.replacements.get(self.token.symbol)  # type: ignore[union-attr]
        if fixed is not None and fixed != tokens:
            return False
        return tokens == self.besides or all(bool(guard.subs(self.token.symbol, tokens)) for guard in self.guards)


def trace(
    block: nn.Module, call: BlockCall, forward: Callable[..., Any] | None = None, reading: Reading = USUAL
) -> Trace:
    """Trace ``block`` for calls like ``call``.

    Args:
        block: the module; it is not run and not changed.
        call: arguments of one call; only their shapes, dtypes and non-tensor values matter.
        forward: the block's own forward where another is installed over it; it must be its class's.
        reading: where the tokens of its arguments are.

    Raises:
        CaptureRefusedError: something in it cannot be traced; names it.
    """
    refuse_by_sight(block, forward)
    tokens, dims = token_dims(call, reading)
    if tokens < 2:
        raise CaptureRefusedError(ARGUMENTS, f"{tokens} token is not enough to tell what grows with tokens")
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    # Results by symbolic sizes are kept for one trace alone, and hardly anything in a block is done twice: making them
    # to be kept took half of a capture.
    mode.cache_enabled = False
    states = _state_names(block)
    copied, fakes = _fake_copy(block, mode, states)
    leaves = [index for index, _ in call.tensors()]
    hint = _hint(block, call, dims, tokens)
    arguments = [_fake_leaf(call.leaves[index], dims.get(index, ()), mode, hint) for index in leaves]
    symbol = _symbol_of(arguments[leaves.index(call.input_leaf)], dims[call.input_leaf][0])  # type: ignore[index, arg-type]
    declared = DeclaredCalls(declared_in(block))
    declared.put_into(copied, TokenSymbol(symbol))
    runner = _Runner(copied, states, leaves, call)
    autocast = AutocastState.current(arguments[0].device.type).uncached()
    look = partial(_look, block, call, states, {leaf: dims.get(leaf, ()) for leaf in leaves}, hint, declared=declared)
    # First, so that what it finds to be written is undone before anything else runs. Declared modules are known later.
    with _quiet():
        outside = None if declared.live else look()
        with mode, _NoTensorHooks(), torch.enable_grad(), autocast.restored(), flash_stands_in():
            module = _run_trace(runner, fakes, arguments)
        outside = outside or look()
    if shape_env.replacements.get(symbol) is not None or runner.output is None:
        raise CaptureRefusedError(FORWARD, _only_length(shape_env, symbol))
    token, guards = TokenSymbol(symbol), tuple(guard.expr for guard in shape_env.guards)
    found = Trace(
        module.graph, states, tuple(leaves), runner.output, token, guards, mode, declared=declared, outside=outside
    )
    if not declared.live and not found.allows(tokens):
        plain, output = _plainly(block, call, states, {leaf: dims.get(leaf, ()) for leaf in leaves}, tokens)
        alike = plain is not None and same_operators(module.graph, lambda size: token.at(size, tokens), plain)
        found.besides = tokens if alike and output == runner.output else None
    named_again(module.graph)
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    for node, fake in zip(inputs, [*fakes, *arguments], strict=True):
        node.meta[NEEDS_GRAD] = fake.requires_grad
    for node in module.graph.nodes:
        _refuse_sizes_from_data(node, symbol)
    return found


def refuse_by_sight(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Refuse what can be seen without running anything; see Note [What a trace cannot see]."""
    own = forward if forward is not None else block.forward
    if getattr(own, "__func__", None) is not type(block).forward:
        raise CaptureRefusedError(FORWARD, "it was replaced on the instance")
    for hook in hooks_of_all_modules():
        raise CaptureRefusedError(f"hook '{_called(hook)}' of all modules", "it would not run on tiles")
    for name, module in block.named_modules():
        if module is block:
            continue
        for table in HOOK_TABLES:
            for hook in getattr(module, table).values():
                if is_idle(hook):
                    continue
                what = f"hook '{_called(hook)}' of '{name}'"
                raise CaptureRefusedError(what, "hooks of inner modules would not run on tiles")
        if "forward" in module.__dict__:
            raise CaptureRefusedError(f"forward of '{name}'", "it was replaced on the instance")
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if type(tensor) not in (nn.Parameter, torch.Tensor, nn.Buffer):
            raise CaptureRefusedError(f"'{name}'", f"a {type(tensor).__name__} cannot be traced as a plain tensor")


def _called(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _state_names(block: nn.Module) -> tuple[str, ...]:
    names = [name for name, _ in block.named_parameters()] + [name for name, _ in block.named_buffers()]
    return tuple(names)


def _fake_copy(
    block: nn.Module, mode: FakeTensorMode, names: Sequence[str]
) -> tuple[nn.Module, list[torch.Tensor]]:
    """A copy of ``block`` over fake parameters and buffers; its own hooks are left out."""
    memo: dict[int, torch.Tensor] = {}
    fakes = []
    for name in names:
        live = _state(block, name)
        with mode:
            fake: torch.Tensor = torch.empty_strided(live.shape, live.stride(), dtype=live.dtype, device=live.device)
            if isinstance(live, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=live.requires_grad)
            else:  # a buffer that somebody has computed, or what functional_call has put in a parameter's place
                fake.requires_grad_(live.requires_grad)
        memo[id(live)] = fake
        fakes.append(fake)
    return structural_copy(block, memo), fakes


def _state(block: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(block.get_submodule(owner), last)
    return found


def _hint(block: nn.Module, call: BlockCall, dims: Mapping[int, tuple[int, ...]], tokens: int) -> int:
    """The number of tokens to trace with: that of the call, or the next smaller one that is no other size.

    A comparison of the symbol with a size is decided by this number, and holds as a condition from then on.
    """
    sizes = {size for one in (*block.parameters(), *block.buffers()) for size in one.shape}
    for index, leaf in call.tensors():
        sizes |= {size for dim, size in enumerate(leaf.shape) if dim not in dims.get(index, ())}
    smaller = [size for size in range(tokens, 1, -1) if size not in sizes]
    return smaller[0] if smaller else tokens


def _fake_leaf(leaf: torch.Tensor, dims: tuple[int, ...], mode: FakeTensorMode, hint: int) -> torch.Tensor:
    shape = [hint if dim in dims else int(size) for dim, size in enumerate(leaf.shape)]
    symbolic = mode.shape_env is not None
    sizes = [DimDynamic.DUCK if dim in dims else DimDynamic.STATIC for dim in range(leaf.dim())]
    order = sorted(range(leaf.dim()), key=lambda dim: (-int(leaf.stride()[dim]), dim))
    meta = torch.empty([shape[dim] for dim in order], dtype=leaf.dtype, device="meta")
    meta = meta.permute([order.index(dim) for dim in range(leaf.dim())])
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes) if symbolic else None
    fake: Any = mode.from_tensor(meta, static_shapes=not symbolic, symbolic_context=context)
    fake.fake_device = leaf.device
    if leaf.requires_grad:
        with mode, torch.enable_grad():
            # No leaf of autograd's: the block below yielded it, so that writing to it is no error as such.
            fake = fake.requires_grad_().clone()
    found: torch.Tensor = fake
    return found


def _symbol_of(fake: torch.Tensor, dim: int) -> Any:
    return fake.shape[dim].node.expr  # type: ignore[attr-defined]


class _NoTensorHooks(TorchFunctionMode):
    """Refuses hooks on tensors: no operator records them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            raise CaptureRefusedError(f"Tensor.{name}", "a hook on a tensor would not run on tiles")
        return func(*args, **(kwargs or {}))


class _Runner:
    """The copied block as a function of flat lists of tensors."""

    def __init__(self, block: nn.Module, states: Sequence[str], leaves: Sequence[int], call: BlockCall) -> None:
        self._block = Watched(block)
        self._states = states
        self._leaves = leaves
        # A cache is empty, and what a call appends to it is thrown away: without one the block computes the same.
        caches = {index: None for index, leaf in enumerate(call.leaves) if is_cache(leaf)}
        self._call = call.replaced(caches)
        self.output: Any = None

    @property
    def assigned(self) -> str:
        """The parameter, buffer or module that the last run put another in the place of, in words; "": none."""
        return self._block.assigned

    def __call__(self, states: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[Any]:
        call = self._call.replaced(dict(zip(self._leaves, tensors, strict=True)))
        args, kwargs = call.arguments()
        named = dict(zip(self._states, states, strict=True))
        given, how = flatten((args, kwargs))
        # Containers are copies here. Objects are the caller's, where other blocks would find what a trace leaves.
        found = reach(argument_roots(call))

        def put_back() -> None:
            for index in found.changed():
                found.cells[index].write(found.contents[index])

        undo = Undo(put_back)
        try:
            out = self._block.over(named, args, kwargs)
            writes = bool(found.changed())
        finally:
            undo()
        there, as_it_is = flatten((args, kwargs))
        if writes or how != as_it_is or any(one is not other for one, other in zip(given, there, strict=True)):
            raise CaptureRefusedError("arguments", "the block writes to a list, a dict or an object that it is given")
        leaves, self.output = flatten(out)
        return leaves


def _look(
    block: nn.Module,
    call: BlockCall,
    states: Sequence[str],
    dims: Mapping[int, tuple[int, ...]],
    hint: int,
    *,
    declared: DeclaredCalls,
) -> Outside:
    """Run with autograd, at one length, and look at the nodes of its graph and at what it reads and writes.

    In a fake mode of its own: conditions that operators set on the length there are none of the trace's. Once more
    where something was written, which may be a cache that the first run has filled.
    """
    kinds, runs = kinds_inside(block, call), []
    for _ in range(2):
        mode = FakeTensorMode()
        copied, fakes = _fake_copy(block, mode, states)
        declared.put_into(copied, None)
        arguments = [_fake_leaf(call.leaves[index], where, mode, hint) for index, where in dims.items()]
        before, outside = state_key(copied), Outside(copied, kinds)
        runner = _Runner(copied, states, tuple(dims), call)
        runs.append(outside)
        # Around what puts back too, which would have a Function keep the stand-in that it had while it was read.
        with flash_stands_in():
            try:
                with mode, _NoTensorHooks(), torch.enable_grad():
                    with outside:
                        outputs = runner(fakes, arguments)
                    written = outside.written()
                if runner.assigned:
                    raise CaptureRefusedError(runner.assigned, _CHANGES)
                if before != (after := state_key(copied)):
                    raise CaptureRefusedError(changed(before, after), _CHANGES)
                _refuse_functions(outputs)
                if written and (outside is not runs[0] or outside.holds_fakes()):
                    raise CaptureRefusedError(written, _CHANGES)
            except BaseException as error:
                for run in reversed(runs):
                    run.put_back()
                if isinstance(error, CaptureRefusedError) or not isinstance(error, Exception):
                    raise
                raise _refusal(error) from error
        if not written:
            break
    return outside.settle()


def _plainly(
    block: nn.Module, call: BlockCall, states: Sequence[str], dims: Mapping[int, tuple[int, ...]], tokens: int
) -> tuple[fx.Graph | None, Any]:
    """(graph, structure of what it yields) of ``block`` at ``tokens`` tokens, a number there; None: it does not run."""
    mode = FakeTensorMode()
    copied, fakes = _fake_copy(block, mode, states)
    arguments = [_fake_leaf(call.leaves[index], where, mode, tokens) for index, where in dims.items()]
    autocast = AutocastState.current(arguments[0].device.type).uncached()
    runner = _Runner(copied, states, tuple(dims), call)
    with _quiet(), mode, _NoTensorHooks(), torch.enable_grad(), autocast.restored(), flash_stands_in():
        try:
            return _run_trace(runner, fakes, arguments).graph, runner.output
        except CaptureRefusedError:
            return None, None


def _refuse_functions(outputs: Sequence[Any]) -> None:
    pending: list[Any] = [out.grad_fn for out in outputs if isinstance(out, torch.Tensor)]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward = isinstance(node, torch.autograd.function.BackwardCFunction)
        if backward and not type(node).__name__.startswith(_OF_OPERATORS):
            what = type(node).__name__.removesuffix("Backward")
            raise CaptureRefusedError(f"autograd.Function '{what}'", "its own backward would be lost")
        pending.extend(parent for parent, _ in node.next_functions)


def _only_length(shape_env: ShapeEnv, symbol: Any) -> str:
    """Why a trace holds for one length: the condition that says so, and who asked."""
    asked = [guard for guard in shape_env.guards if symbol in guard.expr.free_symbols]
    where = f": {asked[-1].expr} was asked by {asked[-1].sloc}" if asked else ""
    return f"it holds for one number of tokens only{where}"


def _run_trace(runner: _Runner, states: list[torch.Tensor], tensors: list[torch.Tensor]) -> fx.GraphModule:
    try:
        module: fx.GraphModule = make_fx(
            runner, decomposition_table=composites() | STAND_INS, tracing_mode="real", pre_dispatch=True
        )(states, tensors)
    except CaptureRefusedError:
        raise
    except Exception as error:
        raise _refusal(error) from error
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's log of operators that have no shapes here, a traceback each: the refusal has its message."""
    level = _FAKE_TENSORS.level
    _FAKE_TENSORS.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _FAKE_TENSORS.setLevel(level)


def _refusal(error: Exception) -> CaptureRefusedError:
    lines = str(error).strip().splitlines()
    text = lines[0][:200].removesuffix(".") if lines else type(error).__name__
    if isinstance(error, _DATA_DEPENDENT):
        return CaptureRefusedError(str(getattr(error, "func", "a size")), f"it depends on data: {text}")
    foreign = _FOREIGN.search(str(error))
    if foreign:
        return CaptureRefusedError(foreign[1], _NOT_TOLD)
    if isinstance(error, UnsupportedOperatorException):
        return CaptureRefusedError(str(error.func), "it has no rule for shapes")
    return CaptureRefusedError(FORWARD, f"it cannot be traced: {type(error).__name__}: {text}")


def _refuse_sizes_from_data(node: fx.Node, symbol: Any) -> None:
    values = node.meta.get("val")
    for value in values if isinstance(values, (list, tuple)) else [values]:
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            inner = getattr(size, "node", None)
            if inner is not None and inner.expr.free_symbols - {symbol}:
                raise CaptureRefusedError(str(node.target), "the size of its result depends on data")
