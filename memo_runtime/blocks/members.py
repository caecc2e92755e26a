"""Modules and parameters of a model without their names.

What ``modules()`` and ``parameters()`` yield, in their order, sooner: a step asks at each forward, when the device has
nothing to do yet, and names take most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``model`` and all modules in it, each once."""
    found, seen = [], set()
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        if module._modules:
            pending.extend(reversed(module._modules.values()))
    return found


def parameters_of(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The own parameters of each of ``modules``, each once."""
    named = (parameter for module in modules for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in named if parameter is not None}.values())


def have_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """Gradients are there before this step's backward makes them; sharded ones (fully_shard) come another way."""
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if type(parameter) is not nn.Parameter and hasattr(parameter, "_local_tensor"):
            return True
        if parameter.is_leaf and parameter.grad is not None:
            return True
    return False
