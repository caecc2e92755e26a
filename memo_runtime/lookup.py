"""Wrapped models inside a module, and the one around it."""

from __future__ import annotations

from torch import nn

from memo_runtime.errors import ArgumentError, NotWrappedError
from memo_runtime.execution.block import BlockForward
from memo_runtime.wrapping import ATTRIBUTE, Wrapped


def all_wrapped(model: nn.Module) -> dict[str, Wrapped]:
    """What ``wrap`` put into ``model`` or into models inside it, by module name ("" is ``model`` itself)."""
    found = {name: module.__dict__.get(ATTRIBUTE) for name, module in model.named_modules()}
    return {name: wrapped for name, wrapped in found.items() if isinstance(wrapped, Wrapped)}


def find_wrapped(model: nn.Module) -> Wrapped | None:
    """What ``wrap`` put into ``model`` or into the one model inside it (DDP, FSDP, PEFT, torch.compile wrappers).

    Raises:
        ArgumentError: there are several wrapped models inside.
    """
    found = all_wrapped(model)
    if len(found) > 1:
        names = list(found)
        raise ArgumentError(
            f"{type(model).__name__} holds {len(found)} wrapped models ({', '.join(names)}), each with a plan and a "
            f"report of its own: give one of them, such as model.{names[0]}"
        )
    return next(iter(found.values()), None)


def refuse_part(model: nn.Module, asked: str) -> None:
    """Whoever gives a part of a wrapped model, or a model that was wrapped by way of what is around it.

    Raises:
        NotWrappedError: that is so; ``asked``: the function that it was given to.
    """
    policy = policy_from_outside(model)
    if policy is not None:
        raise NotWrappedError(
            f"blocks of this {type(model).__name__} are managed (policy '{policy}'), and it is not what memo.wrap was "
            f"given: it is a part of that, or inside of it (torch.compile, DDP). Give memo.{asked} the same object"
        )


def policy_from_outside(model: nn.Module) -> str | None:
    """Policy of a wrapped model that ``model`` is a part of; None if no block in ``model`` is managed."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, BlockForward):
            return forward.session.policy
    return None
