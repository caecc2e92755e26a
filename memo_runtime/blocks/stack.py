"""Finding the stack: the runs of repeated blocks of any ``nn.Module``.

A stack is a ``ModuleList`` or ``Sequential`` with at least two members of one class that themselves have
sub-modules (a list of plain ``Linear`` heads is no stack), or, where a model has no such container, a run of
attributes of one class (``self.block0``, ``self.block1``). Only the outermost ones count: the experts inside a
block are part of the block. Encoder and decoder of one model are two stacks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from memo_runtime.errors import BlockListError, NoBlocksError

#: A container with a smaller share of the largest stack's parameters than this is no stack (adapters, heads).
_MIN_PARAMETER_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRef:
    """One block of a model: its qualified name, its stack and the module itself."""

    name: str
    stack: int
    module: nn.Module


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _repeated(children: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Children with sub-modules and parameters whose class occurs at least twice among them."""
    candidates = [
        (name, child)
        for name, child in children
        if next(child.children(), None) is not None and next(child.parameters(), None) is not None
    ]
    counts = Counter(type(child) for _, child in candidates)
    return [(name, child) for name, child in candidates if counts[type(child)] >= 2]


def _containers(module: nn.Module, prefix: str) -> list[list[tuple[str, nn.Module]]]:
    """Outermost containers below ``module`` that hold repeated blocks, as lists of (name, block)."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        members = _repeated(module.named_children())
        if members:
            return [[(prefix + name, child) for name, child in members]]
    found = []
    for name, child in module.named_children():
        found += _containers(child, f"{prefix}{name}.")
    return found


def _attribute_runs(module: nn.Module, prefix: str) -> list[list[tuple[str, nn.Module]]]:
    """Outermost modules whose attributes are repeated blocks."""
    members = _repeated(module.named_children())
    if members:
        return [[(prefix + name, child) for name, child in members]]
    found = []
    for name, child in module.named_children():
        found += _attribute_runs(child, f"{prefix}{name}.")
    return found


def _describe_children(model: nn.Module) -> str:
    return ", ".join(f"{name}: {type(child).__name__}" for name, child in list(model.named_children())[:8]) or "none"


def find_blocks(model: nn.Module) -> tuple[BlockRef, ...]:
    """The blocks of every stack of ``model``, in registration order.

    Raises:
        NoBlocksError: the model has no repeated blocks.
    """
    stacks = _containers(model, "") or _attribute_runs(model, "")
    sizes = [sum(_numel(block) for _, block in run) for run in stacks]
    large = [run for run, size in zip(stacks, sizes, strict=True) if size >= _MIN_PARAMETER_SHARE * max(sizes)]
    if not large:
        raise NoBlocksError(
            f"no repeated block found in {type(model).__name__} (its children: {_describe_children(model)}): "
            "memo looks for a ModuleList or Sequential with at least two modules of one class that have "
            "sub-modules. Name the blocks yourself: memo.wrap(model, blocks=[model.first, model.second]) or "
            "blocks='encoder.layers'"
        )
    return tuple(
        BlockRef(name=name, stack=index, module=block) for index, run in enumerate(large) for name, block in run
    )


def _resolve(model: nn.Module, entry: object) -> list[nn.Module]:
    if isinstance(entry, str):
        try:
            entry = model.get_submodule(entry)
        except AttributeError:
            raise BlockListError(
                f"blocks={entry!r} names no module of {type(model).__name__}; its children: {_describe_children(model)}"
            ) from None
    if isinstance(entry, nn.ModuleList):
        return list(entry)
    if isinstance(entry, nn.Module):
        return [entry]
    raise BlockListError(
        f"blocks holds {entry!r} ({type(entry).__name__}): give modules of the model, a ModuleList, or their names"
    )


def given_blocks(model: nn.Module, blocks: object) -> tuple[BlockRef, ...]:
    """The blocks that the user named: a ModuleList or Sequential, a module name, or modules and names in a sequence.

    Raises:
        BlockListError: not modules of this model, one inside another, one twice, or none.
    """
    entries: Sequence[object]
    if isinstance(blocks, (str, nn.Module)):
        entries = [blocks]
    elif isinstance(blocks, Sequence) or (isinstance(blocks, Iterable) and not isinstance(blocks, dict)):
        entries = list(blocks)
    else:
        raise BlockListError(f"blocks={blocks!r} is not a list of modules, a ModuleList, or a module name")
    names = {id(module): name for name, module in model.named_modules()}
    chosen = [module for entry in entries for module in _resolve(model, entry)]
    if isinstance(blocks, (str, nn.Module)) and len(chosen) == 1 and isinstance(chosen[0], nn.Sequential):
        # Named alone, a Sequential of blocks is the stack, as it is when stacks are searched.
        chosen = [block for _, block in _repeated(chosen[0].named_children())] or chosen
    if not chosen:
        raise BlockListError("blocks is empty: name at least one block, or leave it out to let memo find the stack")
    for module in chosen:
        if id(module) not in names:
            raise BlockListError(f"blocks holds a {type(module).__name__} that is not part of {type(model).__name__}")
        if module is model:
            raise BlockListError("blocks holds the model itself: name its repeated blocks")
    for index, module in enumerate(chosen):
        inside = {id(inner) for inner in module.modules()}
        for other_index, other in enumerate(chosen):
            if other_index != index and id(other) in inside:
                raise BlockListError(
                    f"blocks holds '{names[id(other)]}' inside or equal to '{names[id(module)]}': name each block once"
                )
    return tuple(BlockRef(name=names[id(module)], stack=0, module=module) for module in chosen)
