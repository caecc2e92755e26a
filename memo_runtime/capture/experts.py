"""Which part of a refused block might be declared: routed experts, which no graph shows."""

from __future__ import annotations

from torch import nn

from memo_runtime.blocks.declared import declared_in


def with_experts(block: nn.Module) -> str:
    """The child of ``block`` that looks as if it had experts and is not declared; "" where there is none.

    Experts are stacked in several parameters of three dimensions, or a list of modules of one class that is called so.
    """
    declared = declared_in(block)
    for name, child in block.named_children():
        known = any(f"{other}.".startswith(f"{name}.") or other == "" for other in declared)
        if not known and any(_are_experts(*one) for one in child.named_modules(prefix=name)):
            return name
    return ""


def _are_experts(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "expert" in name and len(module) > 1 and len({type(each) for each in module.children()}) == 1
    stacked = [one.shape[0] for one in module.parameters(recurse=False) if one.dim() == 3 and min(one.shape) > 1]
    return len(stacked) > 1 and len(set(stacked)) == 1
