"""Modules that were declared token-wise, in a trace: a call is tested (``token_wise.py``) and becomes one operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from memo_runtime.blocks.ambient import AutocastState, RandomState
from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import text_of
from memo_runtime.capture.axes import NotTokenWiseError, TokenSymbol
from memo_runtime.capture.copying import structural_copy
from memo_runtime.capture.declared import DECLARED, Declared, Shape
from memo_runtime.capture.key import state_key, value_key
from memo_runtime.capture.subject import Facts, Subject, look, moved_copy, refused
from memo_runtime.capture.token_wise import tested_layouts


def declare(name: str, live: nn.Module, call: BlockCall, token: TokenSymbol) -> tuple[str, Declared]:
    """(key, what is known) of ``live`` for calls like ``call``, whose tensors are traced; tested if it is new.

    Raises:
        CaptureRefusedError: it is not token-wise, or cannot be told to be.
    """
    leaves = tuple(index for index, _ in call.tensors())
    traced = [call.leaves[index] for index in leaves]
    try:
        inputs = tuple(_shape_of(one, token) for one in traced)
    except NotTokenWiseError as error:
        raise refused(name, str(error)) from error
    if not any(any(shape.factors) for shape in inputs):
        raise refused(name, "none of its arguments has tokens")
    device = traced[0].device
    template = call.replaced(dict.fromkeys(leaves))
    autocast = AutocastState.current(device.type)
    others = tuple(value_key(one) for one in template.leaves)
    content = (name, type(live), state_key(live), text_of(call.spec), inputs, others, autocast, device)
    key = DECLARED.key(content, type(live).__name__)
    found = DECLARED.known(key)
    if found is None:
        with _outside_of_the_trace(), RandomState.current(device).restored():
            found = _tested(name, live, Facts(template, leaves, inputs, autocast, device))
        DECLARED.put(key, found)
    return key, found


def _shape_of(traced: torch.Tensor, token: TokenSymbol) -> Shape:
    factors = tuple(token.factor(size) if token.grows(size) else 0 for size in traced.shape)
    if sum(factor > 0 for factor in factors) > 1:
        raise NotTokenWiseError("an argument has two token dimensions")
    sizes = tuple(0 if factor else int(size) for size, factor in zip(traced.shape, factors, strict=True))
    return Shape(sizes, factors, traced.dtype)


@contextlib.contextmanager
def _outside_of_the_trace() -> Iterator[None]:
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.enable_grad():
        yield


def _tested(name: str, live: nn.Module, facts: Facts) -> Declared:
    subject = Subject(moved_copy(live, None), facts.template, facts.leaves, facts.autocast)
    seen = look(name, subject, facts)
    layouts = tested_layouts(name, live, subject, facts, seen)
    memo = {id(one): _on_meta(one) for one in (*live.parameters(), *live.buffers())}
    return Declared(
        name=name,
        skeleton=structural_copy(live, memo),
        states=state_names(live),
        template=facts.template,
        leaves=facts.leaves,
        inputs=facts.inputs,
        outputs=seen.outputs,
        constants=seen.constants,
        spec=seen.spec,
        layouts=layouts,
        choices=seen.choices,
        random=seen.random,
        autocast=facts.autocast,
        flops=seen.flops,
        saved_bytes=seen.saved_bytes,
    )


def state_names(module: nn.Module) -> tuple[str, ...]:
    """Parameters, then buffers."""
    return tuple(name for named in (module.named_parameters(), module.named_buffers()) for name, _ in named)


def _on_meta(one: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
    return nn.Parameter(made, requires_grad=one.requires_grad) if isinstance(one, nn.Parameter) else made


# ---- in a trace


class DeclaredCalls:
    """The calls of declared modules in one trace, in order; a second run of the block takes them from here."""

    def __init__(self, live: Mapping[str, nn.Module]) -> None:
        self.live = live
        #: (key, what is known) of each call, by module.
        self.calls: dict[str, list[tuple[str, Declared]]] = {name: [] for name in live}

    def put_into(self, block: nn.Module, token: TokenSymbol | None) -> None:
        """Make the modules of a copied ``block`` run as one operator each; ``token``: None where they are known."""
        for name in self.live:
            module = block.get_submodule(name)
            module.__dict__["forward"] = _StandIn(self, name, module, token)


class _StandIn:
    """The forward of a declared module in a copied block."""

    def __init__(self, calls: DeclaredCalls, name: str, module: nn.Module, token: TokenSymbol | None) -> None:
        self._calls, self._name, self._module, self._token = calls, name, module, token
        self._known = iter(calls.calls[name]) if token is None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = BlockCall.of(args, kwargs)
        if self._known is not None:
            key, declared = next(self._known)
        else:
            assert self._token is not None, "a trace knows its symbol"
            key, declared = declare(self._name, self._calls.live[self._name], call, self._token)
            self._calls.calls[self._name].append((key, declared))
        tensors = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        given = [*(tensors[name] for name in declared.states), *(call.leaves[leaf] for leaf in declared.leaves)]
        results = torch.ops.memo_runtime.token_wise(given, key)
        return declared.yielded(results[: len(declared.outputs)])
