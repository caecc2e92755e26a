"""``blocks=``: the blocks that a user names, as modules, containers of modules, or their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from torch import nn

from memo_runtime.blocks.stack import SCRIPTED, BlockRef, describe_children, is_callable, is_scripted, opened, repeated
from memo_runtime.errors import BlockListError
from memo_runtime.units import show_value

_WHAT = "give modules of the model, a ModuleList, or their names"


def _entries(blocks: object) -> list[object]:
    if isinstance(blocks, (str, nn.Module)):
        return [blocks]
    # A container as a list of its members, but no mapping: its keys would be taken for names of modules.
    if isinstance(blocks, Iterable) and not isinstance(blocks, (Mapping, bytes)):
        return list(blocks)
    raise BlockListError(
        f"blocks={show_value(blocks)} is not a list of modules, a ModuleList, or a module name: for instance "
        "blocks='encoder.layers' or blocks=[model.first, model.second]"
    )


def _module(model: nn.Module, entry: object) -> nn.Module:
    if isinstance(entry, str):
        try:
            return model.get_submodule(entry)
        except AttributeError:
            raise BlockListError(
                f"blocks={entry!r} names no module of {type(model).__name__}{_meant(model, entry)}; "
                f"{_children(model, entry)}"
            ) from None
    if isinstance(entry, nn.Module):
        return entry
    raise BlockListError(f"blocks holds {show_value(entry)} ({type(entry).__name__}): {_WHAT}")


def _meant(model: nn.Module, entry: str) -> str:
    """A name that is nearly that, or ends in it, as a question."""
    names = [name for name, _ in model.named_modules() if name]
    near = [name for name in names if name.endswith(f".{entry}")][:2] or get_close_matches(entry, names, n=1)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def _children(model: nn.Module, entry: str) -> str:
    """What there is where the name stops being one of the model's."""
    there, module = [], model
    for part in entry.split("."):
        if part not in module._modules or module._modules[part] is None:
            break
        there.append(part)
        module = module.get_submodule(part)
    whose = f"the children of '{'.'.join(there)}'" if there else "its children"
    return f"{whose}: {describe_children(module)}"


def _members(module: nn.Module, name: str, alone: bool) -> list[nn.Module]:
    """The blocks that ``module`` stands for: itself, or what a container holds."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not is_callable(module):
        return [block for _, block in opened(module, "")]
    if not is_callable(module):
        raise BlockListError(
            f"blocks holds '{name}' ({type(module).__name__}), which has no forward to manage: name the modules in it "
            f"({describe_children(module)})"
        )
    if alone and isinstance(module, nn.Sequential):
        # Named alone, a Sequential of blocks is the stack, as it is when stacks are searched.
        return [block for _, block in repeated(opened(module, ""))] or [module]
    return [module]


def given_blocks(model: nn.Module, blocks: object) -> tuple[BlockRef, ...]:
    """The blocks that the user named: a container, a module name, or modules, containers and names in a sequence.

    Containers are stacks of their own; modules that are named one by one are one stack.

    Raises:
        BlockListError: not modules of this model, without a forward, one inside another, one twice, or none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    alone = isinstance(blocks, (str, nn.Module))
    stacks: dict[int, int] = {}
    chosen: list[tuple[int, nn.Module]] = []
    for index, entry in enumerate(_entries(blocks)):
        module = _module(model, entry)
        members = _members(module, names.get(id(module), type(module).__name__), alone)
        one_by_one = members == [module]
        for block in members:
            chosen.append((stacks.setdefault(-1 if one_by_one else index, len(stacks)), block))
    if not chosen:
        raise BlockListError("blocks is empty: name at least one block, or leave it out to let memo find the stack")
    _refuse_unusable(model, [block for _, block in chosen], names)
    return tuple(BlockRef(name=names[id(block)], stack=stack, module=block) for stack, block in chosen)


def _refuse_unusable(model: nn.Module, chosen: list[nn.Module], names: dict[int, str]) -> None:
    for module in chosen:
        if id(module) not in names:
            raise BlockListError(f"blocks holds a {type(module).__name__} that is not part of {type(model).__name__}")
        if module is model:
            raise BlockListError("blocks holds the model itself: name its repeated blocks")
        if is_scripted(module):
            raise BlockListError(f"blocks holds '{names[id(module)]}'. {SCRIPTED}")
    for index, module in enumerate(chosen):
        inside = {id(inner) for inner in module.modules()}
        for other_index, other in enumerate(chosen):
            if other_index != index and id(other) in inside:
                raise BlockListError(
                    f"blocks holds '{names[id(other)]}' inside or equal to '{names[id(module)]}': name each block once"
                )
