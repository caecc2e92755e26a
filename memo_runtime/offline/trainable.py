"""Training a part of a model: adapters of low rank, or parameters by name; all else is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from memo_runtime.blocks.stack import find_blocks
from memo_runtime.errors import ArgumentError
from memo_runtime.offline.subject import Subject

_SHOWN = 4


class LowRank(nn.Module):
    """A linear module that is frozen, and a trained product of two thin ones beside it, in the same dtype."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = base.weight
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the base gives, and the correction."""
        result: torch.Tensor = self.base(hidden) + self.up(self.down(hidden))
        return result


def check_rank(rank: int | None) -> None:
    """To be asked before a model is made, which may take minutes.

    Raises:
        ArgumentError: a rank of adapters below 1.
    """
    if rank is not None and rank < 1:
        raise ArgumentError(f"--lora {rank} is not a rank: give 1 or more")


def trained_in_part(subject: Subject, *, lora: int | None, trainable: str | None) -> Subject:
    """``subject`` with all but a part frozen, and a name that says so.

    Args:
        lora: rank of adapters beside every linear module of the blocks. trainable: pattern of names of parameters.

    Raises:
        ArgumentError: a rank below 1, or a pattern that is none or that no name has.
    """
    if lora is None and trainable is None:
        return subject
    model, what = subject.model, []
    matching = _matching(model, trainable) if trainable is not None else []
    model.requires_grad_(False)
    if lora is not None:
        _add_adapters(subject, lora)
        what.append(f"LoRA of rank {lora}")
    for parameter in matching:
        parameter.requires_grad_()
    if trainable is not None:
        what.append(f"parameters like {trainable}")
    return replace(subject, name=f"{subject.name} ({', '.join(what)})")


def _matching(model: nn.Module, trainable: str) -> list[nn.Parameter]:
    try:
        pattern = re.compile(trainable)
    except re.error as error:
        raise ArgumentError(f"--trainable {trainable!r} is not a regular expression: {error}") from None
    found = [parameter for name, parameter in model.named_parameters() if pattern.search(name)]
    if not found:
        names = [name for name, _ in model.named_parameters()]
        raise ArgumentError(
            f"--trainable {trainable!r} is in no parameter's name; there are {', '.join(names[:_SHOWN])}, ... "
            f"({len(names):,} in all)"
        )
    return found


def _linears(subject: Subject) -> Iterator[nn.Linear]:
    for ref in find_blocks(subject.model):
        yield from (module for module in ref.module.modules() if isinstance(module, nn.Linear))


def _add_adapters(subject: Subject, rank: int) -> None:
    check_rank(rank)
    count = 0
    widest = max((min(one.in_features, one.out_features) for one in _linears(subject)), default=rank)
    if rank > widest:
        raise ArgumentError(
            f"--lora {rank} is more than full rank: the blocks of {subject.name} have no nn.Linear of a rank above "
            f"{widest:,}; give less, such as 16"
        )
    for ref in find_blocks(subject.model):
        linears = [name for name, module in ref.module.named_modules() if isinstance(module, nn.Linear) and name]
        for name in linears:
            owner, _, last = name.rpartition(".")
            parent = ref.module.get_submodule(owner)
            setattr(parent, last, LowRank(ref.module.get_submodule(name), rank))  # type: ignore[arg-type]
            count += 1
    if not count:
        raise ArgumentError(f"--lora: the blocks of {subject.name} have no nn.Linear to put adapters beside")
