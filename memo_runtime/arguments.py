"""What the front door is given: models, optimizers and plans that are none are refused before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from memo_runtime.config import Policy, Settings
from memo_runtime.errors import ArgumentError, ArgumentTypeError, NotBuiltError, ProfileError
from memo_runtime.records import Plan, Profile
from memo_runtime.units import format_bytes, show_value

_SHOWN = 6


def check_model(model: object, call: str) -> None:
    """Refuse what is no module.

    Args:
        model: what was given. call: the function's name for the message.

    Raises:
        ArgumentTypeError: no ``nn.Module``.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentTypeError(f"memo.{call} takes a model and got the class {model.__name__}: make one of it first")
    raise ArgumentTypeError(
        f"memo.{call} takes an nn.Module and got {show_value(model)} ({type(model).__name__}): give the model, or what "
        "is around it (DDP, PEFT, torch.compile)"
    )


def check_shapes(model: nn.Module) -> None:
    """Refuse a model with lazy parameters, whose shapes the first forward decides.

    Raises:
        ProfileError: names the first one.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ProfileError(
            f"{len(lazy)} parameters of {type(model).__name__} have no shape yet (first: '{lazy[0]}'): run one "
            "forward, which gives lazy modules their shapes, before memo sees the model"
        )


def check_weights(model: nn.Module) -> None:
    """Refuse a model that has no weights yet: nothing can be measured without them.

    Raises:
        NotBuiltError: parameters on the meta device.
    """
    named = list(model.named_parameters())
    meta = [name for name, parameter in named if parameter.device.type == "meta"]
    if meta:
        raise NotBuiltError(
            f"{len(meta)} of {len(named)} parameters of {type(model).__name__} are on the meta device (first: "
            f"'{meta[0]}'), and planning without weights is not built yet: make them real first, with "
            "model.to_empty(device=...) and load_state_dict, or by building the model outside torch.device('meta')"
        )


def check_optimizer(optimizer: object) -> None:
    """Refuse what is neither an optimizer nor around one.

    Raises:
        ArgumentTypeError: no optimizer.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps optimizers, and so do others
    if optimizer is None or (
        isinstance(getattr(inner, "param_groups", None), list) and isinstance(getattr(inner, "state", None), Mapping)
    ):
        return
    what = "the class " + optimizer.__name__ if isinstance(optimizer, type) else show_value(optimizer)
    raise ArgumentTypeError(
        f"optimizer={what} ({type(optimizer).__name__}) is not a torch.optim.Optimizer: give the one you train with, "
        "or leave it out to reserve memory for AdamW"
    )


def check_budgets(settings: Settings) -> None:
    """Refuse budgets that nothing would keep to: without a policy a model is neither measured nor planned.

    Raises:
        ArgumentError: names them.
    """
    sizes = {name: getattr(settings, name) for name in ("budget", "host_budget")}
    given = {name: format_bytes(size) for name, size in sizes.items() if size is not None}
    if settings.policy is Policy.NONE and given:
        asked = " and ".join(f"{name}={size}" for name, size in given.items())
        raise ArgumentError(
            f"policy='none' runs the model as it is and measures nothing, so {asked} would not be kept to: leave "
            f"{' and '.join(given)} out, or give policy='auto', which keeps everything where that fits"
        )


def check_plan(plan: object) -> None:
    """Refuse what is neither a plan nor the name of a file.

    Raises:
        ArgumentTypeError: neither.
    """
    if plan is None or isinstance(plan, (Plan, str, os.PathLike)):
        return
    made = "; memo.plan(profile) makes a plan of it" if isinstance(plan, Profile) else ""
    what = "a Profile" if isinstance(plan, Profile) else f"{show_value(plan)} ({type(plan).__name__})"
    raise ArgumentTypeError(
        f"plan= is {what}, neither a plan nor a file: give what memo.plan returned, or the path of a saved plan{made}"
    )


def check_profile(profile: object) -> None:
    """Refuse what is no profile.

    Raises:
        ArgumentTypeError: none.
    """
    if isinstance(profile, Profile):
        return
    hint = ""
    if isinstance(profile, nn.Module):
        hint = ": memo.profile(model, batch) makes one"
    elif isinstance(profile, (str, os.PathLike)):
        hint = ": memo_runtime.persist.load_profile(path) reads one"
    raise ArgumentTypeError(
        f"memo.plan takes what memo.profile returned and got {show_value(profile)} ({type(profile).__name__}){hint}"
    )


def describe_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """``args`` and ``kwargs`` of a model call in words: names, dtypes and shapes."""
    named = [(f"[{index}]", value) for index, value in enumerate(args)] + list(kwargs.items())
    parts = [f"{name}: {_describe(value)}" for name, value in named[:_SHOWN]]
    return ", ".join(parts) + (", ..." if len(named) > _SHOWN else "") or "no arguments"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device.type}"
    if any(isinstance(leaf, torch.Tensor) for leaf in _pytree.tree_leaves(value)):
        return f"{type(value).__name__} with tensors"
    return show_value(value)
