"""Copies between device and host behind one interface, whoever makes them.

    engine.to_host(source, target, name="layers.3 attention")   starts when the current stream has made the source
    ticket.wait()        the current stream goes on when the copy is made (on CPU: the caller does); uses the ticket up
    ticket.release()     the same where nobody has waited yet, then lets go of both ends; False: source was modified
    ticket.cancel()      nobody wants the result

Many copies go under one ticket (``many_to_host``, ``many_to_device``): one submission, and one event for all of them.

Copies of one direction run in the order of their submission, the two directions beside each other. The host end lies
in a slab that is open. Neither call waits on the host where there is a GPU. Both ends stay alive until the ticket is
used up: memory that is freed earlier would be reused under the copy. A ticket that is dropped cancels itself, wherever
an interrupt was raised and without a destructor in Python, in which an interrupt would be lost.

Errors: what makes no sense is a ``CopyUseError`` at once, and nothing was started. A copy that fails is a
``CopyError`` with its name when its ticket is waited for; the engine goes on.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch

from memo_runtime.errors import CopyError, CopyUseError

Pair = tuple[torch.Tensor, torch.Tensor]


class Ticket:
    """One submission. It is there before the copies start, so that nothing that happens then can lose them.

    ``number`` is the engine's. ``watched``: modifying a source in place is told; of copies to the device nobody but the
    owner writes to the source.
    """

    __slots__ = ("__weakref__", "_engine", "_held", "_over", "_used", "_versions", "name", "number")

    def __init__(
        self, engine: CopyEngine, held: tuple[Pair, ...], name: str, *, number: int, watched: bool = True
    ) -> None:
        self._engine = engine
        self._held = held
        self._versions = tuple([source._version for source, _ in held]) if watched else ()
        #: Somebody has asked for it. It serves once.
        self._used = False
        #: The current stream is behind the copies, or nobody wants them: both ends may be used again.
        self._over = False
        self.name = name
        self.number = number

    def wait(self) -> None:
        """Make the current stream wait for the copy (on CPU: the caller).

        Raises:
            CopyError: the copy failed; names it.
            CopyUseError: the ticket was used up before.
        """
        self._refuse_used()
        self._finish()

    def release(self) -> bool:
        """Wait unless that was done, then let go of both ends. May be repeated where an interrupt cut it off.

        Returns:
            False if the source was modified in place since it was submitted.

        Raises:
            CopyError: the copy failed.
        """
        try:
            self._finish()
            return not self.changed()
        finally:
            # Not after an interrupt, which may have come before the wait.
            if self._over:
                self._held, self._versions = (), ()

    def changed(self) -> tuple[int, ...]:
        """Which sources were modified in place since they were submitted, by their place among the copies.

        To be asked before ``release``, which lets go of them.
        """
        pairs = zip(self._held, self._versions, strict=False)
        return tuple(place for place, ((source, _), version) in enumerate(pairs) if source._version != version)

    def cancel(self) -> bool:
        """Nobody wants the result; both ends may be used again by what the current stream does next.

        Returns:
            Whether the copy was prevented: False if it was made, or cannot be stopped any more.

        Raises:
            CopyUseError: the ticket was used up before.
        """
        self._refuse_used()
        self._used = True
        prevented = not self._over and self._engine._cancel(self.number)
        self.settled()
        self._held, self._versions = (), ()
        return prevented

    def done(self) -> bool:
        """Whether the copy is made, or has failed; does not wait and does not use the ticket up."""
        return self._used or self._over or self._engine._done(self.number)

    def settled(self) -> None:
        """The engine has nothing to do for it any more."""
        self._over = True
        self._engine._forget(self.number)

    def _finish(self) -> None:
        again, self._used = self._used, True
        if self._over:
            return
        try:
            self._engine._wait(self.number)
        except CopyError:
            self.settled()
            raise
        except CopyUseError:
            # An interrupt came behind the wait: the engine knows that it is over, and the ticket did not.
            if not again:
                raise
        self.settled()

    def _refuse_used(self) -> None:
        if self._used:
            what = f"'{self.name.splitlines()[0]}'" if self.name else "a tensor"
            raise CopyUseError(f"the copy of {what} was waited for or cancelled before: a ticket serves once")


class CopyEngine(ABC):
    """Copies for one device.

    Attributes:
        device: where the device ends are. closed: it takes no more copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.closed = False
        self._numbers = itertools.count(1)

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, name: str = "") -> Ticket:
        """Copy ``source`` on the device into ``target`` in a slab, of the same shape and dtype."""
        return self._submit(True, _plain(((source, target),)), name)

    def to_device(self, source: torch.Tensor, target: torch.Tensor, *, name: str = "") -> Ticket:
        """Copy ``source`` in a slab into ``target`` on the device, of the same shape and dtype."""
        return self._submit(False, _plain(((source, target),)), name)

    def many_to_host(self, pairs: Iterable[Pair], *, name: str = "") -> Ticket:
        """Many copies to the host, (source, target) each, under one ticket; ``name`` may have a line for each."""
        return self._submit(True, _plain(pairs), name)

    def many_to_device(self, pairs: Iterable[Pair], *, name: str = "") -> Ticket:
        """Many copies to the device, (source, target) each, under one ticket; ``name`` may have a line for each."""
        return self._submit(False, _plain(pairs), name)

    @property
    @abstractmethod
    def open_copies(self) -> int:
        """Tickets that are not used up."""

    @abstractmethod
    def stream_handle(self, *, to_host: bool) -> int:
        """Raw handle of the stream of one direction, for profilers and tests that slow it; 0 on CPU."""

    @abstractmethod
    def drain(self) -> None:
        """Return when nothing is under way. Not for a step: it waits on the host."""

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way and give everything back; later use is a ``CopyUseError``."""

    @abstractmethod
    def _submit(self, out: bool, pairs: tuple[Pair, ...], name: str) -> Ticket: ...

    @abstractmethod
    def _wait(self, number: int) -> None: ...

    @abstractmethod
    def _cancel(self, number: int) -> bool: ...

    @abstractmethod
    def _done(self, number: int) -> bool: ...

    @abstractmethod
    def _forget(self, number: int) -> None:
        """The ticket was used up: its death is of no interest any more."""

    def _check_device(self, tensor: torch.Tensor) -> None:
        if tensor.device != self.device:
            raise CopyUseError(f"the tensor is on {tensor.device}, and this engine copies for {self.device}")


def _plain(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """``pairs``, none of which means something else than lies in its memory."""
    found = tuple(pairs)
    for pair in found:
        for tensor in pair:
            if tensor.is_conj() or tensor.is_neg():
                raise CopyUseError(
                    "the tensor is a view that conjugates or negates what lies in memory, and this engine copies "
                    "memory: give tensor.resolve_conj().resolve_neg()"
                )
    return found
