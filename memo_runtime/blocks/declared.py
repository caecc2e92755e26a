"""Modules of which the user says that they treat tokens one by one (``memo.token_wise``).

The word is kept on the module itself, so copies and pickles carry it. It is no proof: whoever makes use of it tests the
module first (``capture/declaring.py``).
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

_MARK = "_memo_token_wise"


def declare_token_wise(module: nn.Module) -> None:
    """Mark ``module``."""
    module.__dict__[_MARK] = True


def is_declared(module: nn.Module) -> bool:
    """``module`` itself was marked."""
    return bool(module.__dict__.get(_MARK))


def declared_in(block: nn.Module) -> dict[str, nn.Module]:
    """Marked modules of ``block`` by name, itself (``""``) included; those inside another marked one are part of it."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        inside = any(other == "" or name.startswith(f"{other}.") for other in found)
        if is_declared(module) and not inside:
            found[name] = module
    return found


def with_experts(block: nn.Module) -> str:
    """The child of ``block`` that looks as if it had experts and is not marked; "" where there is none.

    Experts are stacked in a parameter of three dimensions, or a list of modules of one class.
    """
    marked = declared_in(block)
    for name, child in block.named_children():
        known = any(f"{other}.".startswith(f"{name}.") or other == "" for other in marked)
        if not known and _has_experts(child):
            return name
    return ""


def _has_experts(module: nn.Module) -> bool:
    for one in module.modules():
        if isinstance(one, (nn.ModuleList, nn.ModuleDict)):
            if len(one) > 1 and len({type(each) for each in one.children()}) == 1:
                return True
        elif not isinstance(one, _ConvNd) and any(each.dim() == 3 for each in one.parameters(recurse=False)):
            return True
    return False
