"""Finding the stacks: the runs of repeated blocks of any ``nn.Module``.

A block can be called: a ``ModuleList`` or ``ModuleDict`` only holds others, and is looked into instead. A stack is a
container with at least two members of one class that themselves have sub-modules (a list of plain ``Linear`` heads is
no stack), or, where a model has no such container, a run of attributes of one class (``self.block0``,
``self.block1``). Only the outermost ones count: the experts inside a block are part of the block.

    ModuleList(Layer, Layer, ...)                                one stack of layers
    ModuleList(ModuleList(Attention, MLP), ModuleList(...))      one stack: attention, MLP, attention, MLP, ...
    Sequential(Stage(64 wide: 2 blocks), Stage(128 wide: 6))     stages of different shapes: one stack in each
    encoder.layers, decoder.layers                               two stacks
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from memo_runtime.errors import ArgumentError, NoBlocksError

#: A container with a smaller share of the largest stack's parameters than this is no stack (adapters, heads).
_MIN_PARAMETER_SHARE = 0.01
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_CANDIDATES_SHOWN = 3
SCRIPTED = "Modules that torch.jit has compiled cannot be blocks: wrap the model with those that they were made of."

Run = list[tuple[str, nn.Module]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRef:
    """One block of a model: its qualified name, its stack and the module itself."""

    name: str
    stack: int
    module: nn.Module


def is_callable(module: nn.Module) -> bool:
    """Whether ``module`` has a forward; one that only holds others (a ``ModuleList``) has none."""
    if is_scripted(module):
        return True  # its class does not say
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def is_scripted(module: nn.Module) -> bool:
    """Whether ``torch.jit`` has compiled ``module``: what it does is no Python, and no forward can be put over it."""
    return isinstance(module, torch.jit.ScriptModule)


def opened(module: nn.Module, prefix: str) -> Run:
    """Members of a container by qualified name, with those of containers in it that cannot be called in their place."""
    members: Run = []
    for name, child in module.named_children():
        if is_callable(child):
            members.append((prefix + name, child))
        elif isinstance(child, _CONTAINERS):
            members += opened(child, f"{prefix}{name}.")
    return members


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules with the same parameters under the same names."""
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _could_be_block(module: nn.Module) -> bool:
    return (
        is_callable(module)
        and not is_scripted(module)
        and next(module.children(), None) is not None
        and next(module.parameters(), None) is not None
    )


def repeated(children: Iterable[tuple[str, nn.Module]]) -> Run:
    """Callable children with sub-modules and parameters whose class occurs at least twice among them."""
    candidates = [(name, child) for name, child in children if _could_be_block(child)]
    counts = Counter(type(child) for _, child in candidates)
    return [(name, child) for name, child in candidates if counts[type(child)] >= 2]


def _containers(module: nn.Module, prefix: str, staged: bool = True) -> list[Run]:
    """Stacks of the outermost containers below ``module`` that hold repeated blocks, which may be ``staged``."""
    if isinstance(module, _CONTAINERS):
        found = _stacks_in(module, prefix, staged)
        if found:
            return found
    return [run for name, child in module.named_children() for run in _containers(child, f"{prefix}{name}.", staged)]


def _stacks_in(container: nn.Module, prefix: str, staged: bool) -> list[Run]:
    """Stacks of one container; empty if nothing repeats in it."""
    inner = [(name, child) for name, child in container.named_children() if not is_callable(child)]
    apart = isinstance(container, nn.ModuleDict) or len({_shape(child) for _, child in inner}) > 1
    if apart and any(repeated(opened(child, "")) for _, child in inner):
        # Lists of different shapes, or under names: each is a stack of its own.
        own = repeated((name, child) for name, child in container.named_children() if is_callable(child))
        nested = [run for name, child in inner for run in _containers(child, f"{prefix}{name}.", staged)]
        return [*([[(prefix + name, child) for name, child in own]] if own else []), *nested]
    members = repeated(opened(container, prefix))
    if not members:
        return []
    return (staged and _stages(members)) or [members]


def _stages(members: Run) -> list[Run] | None:
    """Stacks inside ``members`` if those are stages, each a stack of another shape; None if they are blocks.

    Blocks are alike, or at least some are (the first layers of many mixtures of experts are not), and what repeats in
    them, such as experts, is part of them.
    """
    shapes = [_shape(module) for _, module in members]
    if len(set(shapes)) < len(shapes):
        return None
    inside = [_containers(module, f"{name}.", staged=False) for name, module in members]
    if sum(map(bool, inside)) * 2 <= len(members):
        return None
    kinds = {type(block) for runs in inside for run in runs for _, block in run}
    stacks = []
    for (prefix, module), runs in zip(members, inside, strict=True):
        # A stage of one block has nothing that repeats.
        single = [(f"{prefix}.{name}", m) for name, m in module.named_modules() if type(m) in kinds]
        stacks += runs or ([single] if single else [])
    return stacks


def _attribute_runs(module: nn.Module, prefix: str) -> list[Run]:
    """Outermost modules whose attributes are repeated blocks."""
    members = repeated(module.named_children())
    if members:
        return [[(prefix + name, child) for name, child in members]]
    return [run for name, child in module.named_children() for run in _attribute_runs(child, f"{prefix}{name}.")]


def describe_children(model: nn.Module) -> str:
    """Names and classes of what ``model`` consists of."""
    return ", ".join(f"{name}: {type(child).__name__}" for name, child in list(model.named_children())[:8]) or "none"


def _candidates(model: nn.Module) -> list[str]:
    """Names of modules that could be given as blocks: alone in their container, else the largest parts."""
    alone = [
        f"{name}.{only[0][0]}"
        for name, container in model.named_modules()
        if name and isinstance(container, _CONTAINERS) and len(only := opened(container, "")) == 1
        if _could_be_block(only[0][1])
    ]
    outermost = [name for name in alone if not any(name.startswith(f"{other}.") for other in alone)]
    if outermost:
        return outermost[:_CANDIDATES_SHOWN]
    parts = [(name, child) for name, child in model.named_children() if _could_be_block(child)]
    parts.sort(key=lambda part: -_numel(part[1]))
    return [name for name, _ in parts[:_CANDIDATES_SHOWN]]


def find_blocks(model: nn.Module) -> tuple[BlockRef, ...]:
    """The blocks of every stack of ``model``, in registration order.

    Raises:
        NoBlocksError: the model has no repeated blocks.
    """
    stacks = _once(_containers(model, "")) or _once(_attribute_runs(model, ""))
    sizes = [sum(_numel(block) for _, block in run) for run in stacks]
    large = [run for run, size in zip(stacks, sizes, strict=True) if size >= _MIN_PARAMETER_SHARE * max(sizes)]
    if not large:
        candidates = _candidates(model)
        given = f"'{candidates[0]}'" if len(candidates) == 1 else str(candidates)
        ready = (
            f"What could be one (also one that is called many times, with weights shared over depth): memo.wrap(model, "
            f"blocks={given})"
            if candidates
            else "Name the blocks yourself: memo.wrap(model, blocks=[model.first, model.second])"
        )
        if any(is_scripted(module) for module in model.modules()):
            ready = f"{SCRIPTED} {ready}" if candidates else SCRIPTED
        raise NoBlocksError(
            f"no repeated block found in {type(model).__name__} (its children: {describe_children(model)}): memo looks "
            "for a ModuleList, ModuleDict or Sequential with at least two modules of one class that have a forward and "
            f"sub-modules. {ready}"
        )
    return tuple(
        BlockRef(name=name, stack=index, module=block) for index, run in enumerate(large) for name, block in run
    )


def _once(stacks: list[Run]) -> list[Run]:
    """``stacks`` with a module that stands in several places (shared weights) in the first of them only."""
    seen: set[int] = set()
    kept: list[Run] = []
    for run in stacks:
        new: Run = []
        for name, block in run:
            if id(block) not in seen:
                seen.add(id(block))
                new.append((name, block))
        kept += [new] if new else []
    return kept


def check_keep_last(refs: Iterable[BlockRef], keep_last: int | None) -> None:
    """Refuse more kept blocks than a stack has.

    Raises:
        ArgumentError: names the stack and what would work.
    """
    stacks: dict[int, list[str]] = {}
    for ref in refs:
        stacks.setdefault(ref.stack, []).append(ref.name)
    fewest = min(map(len, stacks.values()), default=0)
    for stack, names in stacks.items():
        if keep_last is not None and keep_last > len(names):
            raise ArgumentError(
                f"keep_last={keep_last}, but stack {stack} ({names[0]} to {names[-1]}) has {len(names)} blocks: "
                f"give 0 to {fewest}"
            )
