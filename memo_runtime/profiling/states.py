"""Bytes of the model's states: those that exist, and those that will: gradients and the optimizer's."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Sequence

import torch
from torch import nn

from memo_runtime.profiling.stepping import state_bytes, stepping_of
from memo_runtime.records import ModelStates


def _bytes(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return int(local.numel() * local.element_size())


def gradient_bytes(parameter: torch.Tensor) -> int:
    """Bytes of the gradient that ``parameter`` will have; 0 for one that is frozen."""
    if not parameter.requires_grad:
        return 0
    local = getattr(parameter, "_local_tensor", parameter)
    dtype = (getattr(parameter, "grad_dtype", None) if parameter.is_leaf else None) or local.dtype
    return int(local.numel() * dtype.itemsize)


def gradients_of_blocks(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, int]:
    """Bytes of gradients by block name, each parameter's once.

    Args:
        blocks: (name, module) in call order. What two of them share counts for the one that goes backward first, what
            is also used outside them for none: such gradients are there from the head on.
    """
    inside = tuple(f"{name}." for name, _ in blocks)
    named = model.named_parameters(remove_duplicate=False)
    counted = {id(parameter) for name, parameter in named if not name.startswith(inside)}
    found = {}
    for name, block in reversed(blocks):
        own = {id(parameter): parameter for parameter in block.parameters() if id(parameter) not in counted}
        counted |= set(own)
        found[name] = sum(gradient_bytes(parameter) for parameter in own.values())
    return found


def gradients_of_embeddings(model: nn.Module, inside: Container[int]) -> int:
    """Bytes of gradients of embeddings that are no head as well, and none of the parameters ``inside`` blocks (ids)."""
    return sum(gradient_bytes(one) for one, embeds in _owned(model) if embeds == {True} and id(one) not in inside)


def _owned(model: nn.Module) -> Iterable[tuple[nn.Parameter, set[bool]]]:
    """Each parameter, and whether what has it is an embedding (of a tied one both)."""
    owned: dict[int, tuple[nn.Parameter, set[bool]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owned.setdefault(id(parameter), (parameter, set()))[1].add(isinstance(module, nn.Embedding))
    return owned.values()


def measure_states(model: nn.Module, optimizer: torch.optim.Optimizer | None, device_type: str) -> ModelStates:
    """States of ``model`` on its device.

    With ``optimizer`` given, its state is counted where it exists and computed from its class where it does not, as are
    the temporaries of its step; without one, or where the class cannot be asked, AdamW in the parameters' dtype with a
    fused step is assumed and the result says so.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    gradients = sum(gradient_bytes(p) for p in trainable)
    assumed, name, total, present, stepping = True, "AdamW", 2 * sum(_bytes(p) for p in trainable), 0, 0
    if optimizer is not None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimizers
        present = sum(state_bytes(state, device_type) for state in inner.state.values())
        found = stepping_of(inner, device_type)
        if present or found is not None:
            assumed, name, total = False, type(inner).__name__, present or (found.states if found else 0)
        stepping = found.temporaries if found else 0
    return ModelStates(
        parameters=sum(_bytes(p) for p in parameters),
        buffers=sum(_bytes(b) for b in itertools.chain(model.buffers())),
        gradients=gradients,
        gradients_tied=sum(gradient_bytes(one) for one, embeds in _owned(model) if embeds == {True, False}),
        optimizer=total,
        # Under functional_call a parameter may be no leaf, and then it has no gradient of its own.
        gradients_present=sum(_bytes(p.grad) for p in trainable if p.is_leaf and p.grad is not None),
        optimizer_present=present,
        optimizer_name=name,
        stepping=stepping,
        assumed=assumed,
    )
