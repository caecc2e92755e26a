"""Modules of which the user says that they treat tokens one by one (``memo.token_wise``).

The word is kept on the module itself, so copies and pickles carry it. It is no proof: whoever makes use of it tests the
module first (``capture/declaring.py``).
"""

from __future__ import annotations

from torch import nn

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
