"""Blocks that come to a wrapped model's stacks, or leave them: what is managed was found when it was wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from memo_runtime.errors import BlockFallbackError

if TYPE_CHECKING:
    from memo_runtime.execution.session import Session

_AGAIN = "Would work: memo.unwrap(model), then memo.wrap as before"


class Members:
    """The containers of the managed blocks of ``model``, and what they held when it was wrapped."""

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> None:
        self._managed = {id(block): block for _, block in blocks}
        owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks)
        self._stacks = [(name, owner) for name in owners if (owner := _module(model, name)) is not None]
        #: By address, all that were there: whoever is held keeps that.
        self._known = {id(one): one for _, owner in self._stacks for one in owner._modules.values()}
        self._there = [[*map(id, owner._modules.values())] for _, owner in self._stacks]

    def look(self, session: Session) -> None:
        """Say, once for each change, which members are not managed, and which managed blocks have left.

        Raises:
            BlockFallbackError: ``strict``.
        """
        there = [[*map(id, owner._modules.values())] for _, owner in self._stacks]
        if there == self._there:
            return
        text = self._text()
        if text and session.strict:
            raise BlockFallbackError(f"strict=True, and {text}")
        self._there = there
        if text:
            session.note(text)

    def _text(self) -> str:
        kinds = {type(block) for block in self._managed.values()}
        here = [(f"{name}.{key}" if name else key, module)
                for name, owner in self._stacks for key, module in owner._modules.items()]  # fmt: skip
        strangers = [name for name, module in here if type(module) in kinds and id(module) not in self._known]
        held = {id(module) for _, module in here}
        gone = sum(address not in held for address in self._managed)
        if not strangers and not gone:
            return ""
        if not strangers:
            return f"{gone} managed blocks have left their stacks since wrap, and plans count them. {_AGAIN}"
        left = f", and {gone} of {len(self._managed)} managed ones have left" if gone else ""
        return f"blocks that came after wrap are not managed ({_some(strangers)}){left}. {_AGAIN}"


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a block in a list that is no module
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
