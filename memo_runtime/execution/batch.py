"""The copies of one block call in one direction, under one ticket.

A block has about ten tensors to copy. One submission for all of them costs the host less than one for each, and they
are wanted together: sources are let go when the next block but one starts, and backward needs all before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from memo_runtime.errors import CopyError
from memo_runtime.execution.piece import Piece
from memo_runtime.native.engine import CopyEngine, Pair, Ticket


class Outgoing:
    """Copies to the host under way. Sources stay alive until compute waits for them."""

    __slots__ = ("__weakref__", "_pieces", "_ticket")

    def __init__(self, engine: CopyEngine, pairs: Sequence[tuple[Piece, Pair]], name: str) -> None:
        self._pieces = [piece for piece, _ in pairs]
        self._ticket: Ticket | None = None
        if pairs:
            self._ticket = engine.many_to_host([pair for _, pair in pairs], name=_names(name, self._pieces))

    def sent(self) -> None:
        """Make compute wait for the copies and let go of their sources.

        A source that was modified under its copy, and a copy that failed, are told by whoever needs the piece.
        """
        ticket, self._ticket = self._ticket, None
        if ticket is None:
            return
        for place in ticket.changed():
            self._pieces[place].modified = True
        try:
            ticket.release()
        except CopyError as error:
            # Which of them were made before one failed is not told.
            for piece in self._pieces:
                piece.lost = str(error)
        self._pieces = []


class Incoming:
    """Copies back under way, into buffers that compute allocated."""

    __slots__ = ("_ticket",)

    def __init__(self, engine: CopyEngine, pairs: Sequence[tuple[Piece, Pair]], name: str) -> None:
        self._ticket: Ticket | None = None
        if pairs:
            names = _names(name, [piece for piece, _ in pairs])
            self._ticket = engine.many_to_device([pair for _, pair in pairs], name=names)

    def arrived(self) -> None:
        """Make compute wait for the copies.

        Raises:
            CopyError: one failed; names it.
        """
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.release()

    def unwanted(self) -> None:
        """Nobody reads what arrives; its memory may be used again by what compute does next."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.cancel()


def _names(block: str, pieces: Sequence[Piece]) -> str:
    """A line for each copy, of which the error shows the one that failed."""
    return "\n".join(f"{block} {piece.label}" for piece in pieces)

