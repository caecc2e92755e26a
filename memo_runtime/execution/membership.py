"""Blocks that come to a wrapped model's stacks, or leave them: what is managed was found when it was wrapped."""

from __future__ import annotations

import weakref
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
        self._model = weakref.ref(model)
        self._managed = {id(block): block for _, block in blocks}
        self._names = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks))
        #: By address, all that were there: whoever is held keeps that.
        self._known = {id(one): one for _, one in self._members()}
        self._there = [*map(id, self._known.values())]

    def look(self, session: Session) -> None:
        """Say, once for each change, which members are not managed, and which managed blocks have left.

        Raises:
            BlockFallbackError: ``strict``.
        """
        members = self._members()
        there = [id(one) for _, one in members]
        if there == self._there:
            return
        text = self._text(members)
        if text and session.strict:
            raise BlockFallbackError(f"strict=True, and {text}")
        self._there = there
        if text:
            session.note(text)

    def _members(self) -> list[tuple[str, nn.Module]]:
        """What is where the blocks were found; the container itself may be another by now."""
        model = self._model()
        owners = [(name, _module(model, name)) for name in self._names] if model is not None else []
        return [(f"{name}.{key}" if name else key, one)
                for name, owner in owners if owner is not None
                for key, one in owner._modules.items() if one is not None]  # fmt: skip

    def _text(self, members: Sequence[tuple[str, nn.Module]]) -> str:
        kinds = {type(block) for block in self._managed.values()}
        # One that somebody has put into another module since (torch.compile, adapters) is still there.
        strangers = [name for name, one in members if type(one) in kinds and id(one) not in self._known
                     and not any(id(inner) in self._managed for inner in one.modules())]  # fmt: skip
        model = self._model()
        held = {id(one) for one in model.modules()} if model is not None else set()
        gone = sum(address not in held for address in self._managed)
        if not strangers and not gone:
            return ""
        if not strangers:
            return f"{gone} of {len(self._managed)} managed blocks have left since wrap, and plans count them. {_AGAIN}"
        left = f", and {gone} of {len(self._managed)} managed ones have left" if gone else ""
        return f"blocks that came after wrap are not managed ({_some(strangers)}){left}. {_AGAIN}"


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a block in a list that is no module
        return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
