"""A module that was declared token-wise, as one operator of a trace.

    token_wise            tensors                -> outputs, kept
    token_wise_again      tensors, kept          -> outputs
    token_wise_backward   tensors, kept, grads   -> gradients

where tensors are parameters and buffers, then those of the call.

The module runs by its own code, on a tile, on a copy of its structure that takes parameters and buffers as arguments;
autograd sees one operator. What decides its way is ``kept`` and given again whenever a tile is run again, so that the
gradient is that of what the forward did: the choices of ``topk`` (routing), and the seed of what it draws.

The shapes of results, and where tokens are in them, were found and tested before (``declaring.py``).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.library import Library
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.blocks.ambient import AutocastState, RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.capture.axes import Axis, NotTokenWiseError, at
from memo_runtime.records import TokenAxis

OPERATOR = "memo_runtime.token_wise"
_AUTOGRAD_KEYS = [
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")
    if hasattr(torch._C.DispatchKey, name)
]
_LIBRARY = Library("memo_runtime", "FRAGMENT")
_LIBRARY.define("token_wise(Tensor[] tensors, str key) -> Tensor[]")
_LIBRARY.define("token_wise_again(Tensor[] tensors, Tensor[] kept, str key) -> Tensor[]")
_LIBRARY.define(
    "token_wise_backward(Tensor[] tensors, Tensor[] kept, Tensor?[] grads, bool[] wanted, str key) -> Tensor[]"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor by number of tokens: ``factors[d]`` times the tokens where that is not 0, else ``sizes[d]``."""

    sizes: tuple[int, ...]
    factors: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, tokens: Any, device: torch.device) -> torch.Tensor:
        """Such a tensor without gaps."""
        pairs = zip(self.sizes, self.factors, strict=True)
        sizes = [factor * tokens if factor > 1 else tokens if factor else size for size, factor in pairs]
        return torch.empty(sizes, dtype=self.dtype, device=device)

    def axis(self, layout: str) -> Axis:
        """Where the tokens are, if other dimensions merged with them lie before (``outer``) or behind (``inner``)."""
        dims = [dim for dim, factor in enumerate(self.factors) if factor]
        if not dims:
            return None
        factor = self.factors[dims[0]]
        return at(dims[0], factor, 1) if layout == "outer" else at(dims[0], 1, factor)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Declared:
    """One declared module under one kind of call.

    Args:
        name: of the module, for messages.
        skeleton: its structure; parameters and buffers are given.
        states: their names.
        template: the call, tensors left out. leaves: their indices.
        inputs: shapes of the tensors. outputs: of what it yields; ``constants`` where a leaf is no tensor.
        spec: structure of what it yields.
        layouts: in which it was tested to be token-wise.
        choices: shapes of the ``topk`` choices. random: it draws.
        autocast: of the call.
        flops, saved_bytes: of its forward and of what its backward needs, by token.
    """

    name: str
    skeleton: nn.Module
    states: tuple[str, ...]
    template: BlockCall
    leaves: tuple[int, ...]
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    constants: tuple[Any, ...]
    spec: Any
    layouts: tuple[str, ...]
    choices: tuple[Shape, ...]
    random: bool
    autocast: AutocastState
    flops: float
    saved_bytes: float

    @property
    def kept(self) -> int:
        """How many tensors a forward leaves beside its outputs."""
        return len(self.choices) + self.random

    def tokens(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The number of tokens of a call with ``tensors``."""
        for shape, value in zip(self.inputs, tensors[len(self.states) :], strict=True):
            for dim, factor in enumerate(shape.factors):
                if factor:
                    return value.shape[dim] if factor == 1 else value.shape[dim] // factor
        raise AssertionError("one input has tokens")

    def axes(self, tensors: Sequence[Any]) -> tuple[Axis, ...]:
        """Axes of all results where those of the tensors are ``tensors``.

        Raises:
            NotTokenWiseError: tokens lie in another way than it was tested with.
        """
        states, inputs = tensors[: len(self.states)], tensors[len(self.states) :]
        if any(axis is not None for axis in states):
            raise NotTokenWiseError(f"a parameter of '{self.name}' has tokens")
        for layout in self.layouts:
            if all(_same_place(shape.axis(layout), axis) for shape, axis in zip(self.inputs, inputs, strict=True)):
                found = [shape.axis(layout) for shape in (*self.outputs, *self.choices)]
                return (*found, *([None] if self.random else []))
        raise NotTokenWiseError(f"'{self.name}' was not tested with tokens where its arguments have them here")

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the module yields, by its own code under the autocast of its call."""
        count = len(self.states)
        given = self.template.replaced(dict(zip(self.leaves, tensors[count:], strict=True)))
        args, kwargs = given.arguments()
        named = dict(zip(self.states, tensors[:count], strict=True))
        with self.autocast.uncached().restored():
            found = torch.func.functional_call(self.skeleton, named, args, kwargs)
        return [one for one in _pytree.tree_leaves(found) if isinstance(one, torch.Tensor)]

    def yielded(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the module yields, put together from its tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if one is TENSOR else one for one in self.constants]
        return _pytree.tree_unflatten(leaves, self.spec)


#: Stands in ``constants`` for a tensor.
TENSOR = object()


def _same_place(mine: Axis, given: Axis) -> bool:
    if isinstance(mine, TokenAxis) and isinstance(given, TokenAxis):
        return (mine.dim, mine.outer, mine.inner) == (given.dim, given.outer, given.inner)
    return mine is None and given is None


class Registry:
    """Declared modules by the key that operators carry; modules alike have one, and share programs."""

    def __init__(self) -> None:
        self._by_key: weakref.WeakValueDictionary[str, Declared] = weakref.WeakValueDictionary()
        self._keys: dict[Any, str] = {}

    def __getitem__(self, key: str) -> Declared:
        return self._by_key[key]

    def key(self, content: Any, name: str) -> str:
        """The key for all that is ``content``."""
        return self._keys.setdefault(content, f"{name}:{len(self._keys)}")

    def known(self, key: str) -> Declared | None:
        """What was put under ``key``, as long as somebody uses it."""
        return self._by_key.get(key)

    def put(self, key: str, declared: Declared) -> None:
        """Remember ``declared``."""
        self._by_key[key] = declared


DECLARED = Registry()


# ---- what a forward chose and drew


class Choices(TorchDispatchMode):
    """Takes note of the choices of ``topk``, or gives those of an earlier run."""

    def __init__(self, given: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[torch.Tensor] = []
        self._given = None if given is None else list(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        if self._given is None:
            values, indices = func(*args, **(kwargs or {}))
            self.seen.append(indices)
            return values, indices
        indices = self._given.pop(0)
        named = dict(zip(("self", "k", "dim"), args, strict=False)) | (kwargs or {})
        return named["self"].gather(named.get("dim", -1), indices), indices


@contextlib.contextmanager
def _seeded(seed: torch.Tensor, device: torch.device) -> Iterator[None]:
    with RandomState.current(device).restored():
        torch.default_generator.manual_seed(int(seed))
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield


@dataclass(slots=True)
class DrawLog:
    """Seeds that forwards drew, in order, by key; the check of a capture gives them to the block as well."""

    seeds: dict[str, list[torch.Tensor]] = field(default_factory=dict)


_LOGS: list[DrawLog] = []


@contextlib.contextmanager
def logged_draws() -> Iterator[DrawLog]:
    """Take note of the seeds that are drawn meanwhile."""
    _LOGS.append(DrawLog())
    try:
        yield _LOGS[-1]
    finally:
        _LOGS.pop()


@contextlib.contextmanager
def _way(declared: Declared, kept: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Choose and draw as ``kept`` says."""
    count = len(declared.choices)
    with contextlib.ExitStack() as stack:
        if declared.random:
            stack.enter_context(_seeded(kept[count], device))
        if count:
            stack.enter_context(Choices(kept[:count]))
        yield


@contextlib.contextmanager
def _gradients_on() -> Iterator[None]:
    """Autograd records, as in training; a compiled program runs with its dispatch keys left out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def run_seeded(declared: Declared, seed: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One run that draws by ``seed``."""
    with _seeded(seed, tensors[-1].device):
        return declared.run(tensors)


# ---- the operators


def _own(tensors: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``tensors`` without gaps and in memory of their own, as results of operators are."""
    used = {one.untyped_storage()._cdata for one in given}
    found = []
    for one in tensors:
        one = one.detach().contiguous()
        if one.untyped_storage()._cdata in used:
            one = one.clone()
        used.add(one.untyped_storage()._cdata)
        found.append(one)
    return found


def _forward(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    declared = DECLARED[key]
    seeds = [torch.randint(0, 1 << 62, ())] if declared.random else []
    for log in _LOGS if seeds else []:
        log.seeds.setdefault(key, []).append(seeds[0])
    # With gradients switched on and none wanted: no graph, on the path that the module takes in training.
    detached = [one.detach() for one in tensors]
    choices = Choices()
    with _gradients_on(), contextlib.ExitStack() as stack:
        if seeds:
            stack.enter_context(_seeded(seeds[0], tensors[-1].device))
        if declared.choices:
            stack.enter_context(choices)
        outputs = declared.run(detached)
    return [*_own(outputs, tensors), *(one.contiguous() for one in choices.seen), *seeds]


def _again(tensors: list[torch.Tensor], kept: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    declared = DECLARED[key]
    with _gradients_on(), _way(declared, kept, tensors[-1].device):
        outputs = declared.run([one.detach() for one in tensors])
    return _own(outputs, tensors)


def _backward(
    tensors: list[torch.Tensor],
    kept: list[torch.Tensor],
    grads: list[torch.Tensor | None],
    wanted: list[bool],
    key: str,
) -> list[torch.Tensor]:
    declared = DECLARED[key]
    leaves = [one.detach().requires_grad_(need) for one, need in zip(tensors, wanted, strict=True)]
    sought = [one for one in leaves if one.requires_grad]
    with _gradients_on():
        assert not sought or sought[0].view_as(sought[0]).requires_grad, "autograd records in here"
        with _way(declared, kept, tensors[-1].device):
            outputs = declared.run(leaves)
        pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True)
                 if grad is not None and out.requires_grad]  # fmt: skip
        found: Sequence[torch.Tensor | None] = [None] * len(sought)
        if pairs:
            results, tangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(results, sought, tangents, allow_unused=True)
    filled = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(sought, found, strict=True)]
    return _own(filled, [*tensors, *(grad for grad in grads if grad is not None)])


def _shapes(tensors: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    declared = DECLARED[key]
    found = _shapes_of(declared, (*declared.outputs, *declared.choices), tensors)
    return [*found, *([torch.empty((), dtype=torch.int64)] if declared.random else [])]


def _again_shapes(tensors: list[torch.Tensor], kept: list[torch.Tensor], key: str) -> list[torch.Tensor]:
    return _shapes_of(DECLARED[key], DECLARED[key].outputs, tensors)


def _shapes_of(
    declared: Declared, shapes: Sequence[Shape], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    tokens = declared.tokens(tensors)
    return [shape.empty(tokens, tensors[-1].device) for shape in shapes]


def _backward_shapes(
    tensors: list[torch.Tensor], kept: Any, grads: Any, wanted: list[bool], key: str
) -> list[torch.Tensor]:
    pairs = zip(tensors, wanted, strict=True)
    return [torch.empty(tuple(one.shape), dtype=one.dtype, device=one.device) for one, need in pairs if need]


def _keep(ctx: Any, inputs: Any, output: list[torch.Tensor]) -> None:
    tensors, key = inputs
    ctx.key, ctx.count = key, len(tensors)
    ctx.save_for_backward(*tensors, *output[len(DECLARED[key].outputs) :])


def _keep_again(ctx: Any, inputs: Any, output: list[torch.Tensor]) -> None:
    tensors, kept, key = inputs
    ctx.key, ctx.count = key, len(tensors)
    ctx.save_for_backward(*tensors, *kept)


def _gradients(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    tensors, kept = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    needs = list(ctx.needs_input_grad[0])
    outputs = list(grads[: len(DECLARED[ctx.key].outputs)])
    operator = torch.ops.memo_runtime.token_wise_backward
    found = iter(operator(list(tensors), list(kept), outputs, needs, ctx.key))
    return [next(found) if need else None for need in needs], None


def _gradients_again(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    found, _ = _gradients(ctx, grads)
    return found, [None] * (len(ctx.saved_tensors) - ctx.count), None


_LIBRARY.impl("token_wise", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("token_wise_again", _again, "CompositeExplicitAutograd")
_LIBRARY.impl("token_wise_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("memo_runtime::token_wise", _shapes, lib=_LIBRARY)
torch.library.register_fake("memo_runtime::token_wise_again", _again_shapes, lib=_LIBRARY)
torch.library.register_fake("memo_runtime::token_wise_backward", _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd("memo_runtime::token_wise", _gradients, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd(
    "memo_runtime::token_wise_again", _gradients_again, setup_context=_keep_again, lib=_LIBRARY
)
