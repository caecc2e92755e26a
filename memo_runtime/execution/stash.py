"""What is kept of one block call between its forward and its backward.

    forward:   autograd hands over every tensor that it saves (``pack``); when the block is done, ``commit`` sorts them
               into pieces and starts the copies
    backward:  the first ``unpack`` fetches the pieces and runs the block again on the tokens that were not stashed;
               later ones hand out views, and start the fetch of the block below (``FETCH_PARTS``)

Autograd holds only ``Holder`` objects, and they hold the stash and what is on the device for them: when the graph is
freed, after backward or because a step was abandoned, everything goes back by itself, without a destructor in Python
(``execution.ledger`` says why). ``backward(retain_graph=True)`` fetches and rebuilds again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.blocks.undo import Surroundings
from memo_runtime.config import OnRefusal
from memo_runtime.errors import CopyError, ReplayMismatchError, StateChangedError, StepGivenUpError
from memo_runtime.execution.batch import Incoming, Outgoing
from memo_runtime.execution.ledger import Ledger, Share
from memo_runtime.execution.piece import Landed, Piece
from memo_runtime.execution.ranges import named
from memo_runtime.native.backend import choose_backend
from memo_runtime.native.engine import Pair
from memo_runtime.native.pool import HostPool
from memo_runtime.records import FETCH_PARTS

#: What a block raises when it does not take a slice of its tokens. Classes of their own say something else.
_FAILURES = (RuntimeError, IndexError, KeyError, ValueError, TypeError, AttributeError, AssertionError)

class Counters(Protocol):
    """Where a stash counts what it does; see ``execution.counters``."""

    bytes_to_host: int
    bytes_to_device: int
    bytes_kept: int
    recomputed_flops: int


class Rebuild(Protocol):
    """How a block's missing tensors are made again (``replay.Replay``, ``recompute.Recompute``)."""

    def run(self, stash: Stash) -> int:
        """Rebuild what ``stash`` lacks; returns the FLOPs spent."""
        ...


class Tools:
    """What all stashes of one device share: host memory, copies, and the count of what they hold.

    Args:
        device: where the blocks compute. host_bytes: most host memory.
        on_refusal: what the pool keeps when the system refuses.
    """

    def __init__(self, device: torch.device, host_bytes: int, *, on_refusal: OnRefusal = OnRefusal.STOP) -> None:
        self.device = device
        self.backend = choose_backend(device)
        self.pool = HostPool(host_bytes, self.backend, on_refusal=on_refusal)
        self.engine = self.backend.engine()
        self.ledger = Ledger()
        #: A forked child has no copying threads and none of the driver's state.
        self.process = os.getpid()


class Holder:
    """What autograd keeps in place of one saved tensor."""

    __slots__ = ("__weakref__", "index", "kept", "landed", "piece", "position", "problem", "stash", "version")

    def __init__(self, stash: Stash, index: int) -> None:
        self.stash = stash
        self.index = index
        self.kept: torch.Tensor | None = None
        self.piece: Piece | None = None
        self.landed: Landed | None = None
        self.position = 0
        self.version = 0
        self.problem = ""


class Below(Protocol):
    """What the block below has on the host: a stash, or what tiles have."""

    @property
    def landing_bytes(self) -> int:
        """Device bytes that a fetch takes."""
        ...

    def fetch(self) -> None:
        """Start the copies back, once."""
        ...


class Stash:
    """The pieces of one block call, and how to rebuild what they lack."""

    def __init__(self, name: str, tools: Tools, counters: Counters) -> None:
        self.name = name
        self.tools = tools
        self.counters = counters
        self.pending: list[torch.Tensor] = []
        self.versions: list[int] = []
        self.holders: list[weakref.ref[Holder]] = []
        self.pieces: list[Piece] = []
        self.rebuild: Rebuild | None = None
        self.lower: weakref.ref[Below] | None = None
        self.before_backward: Callable[[Stash], None] | None = None
        self.on_mismatch: Callable[[Stash, ReplayMismatchError], ReplayMismatchError] | None = None
        #: A rerun makes all of the block as it was: nothing is replaced and nothing is cut.
        self.whole_rerun = False
        #: The forward itself went backward through what it saved (torch.autograd.grad inside).
        self.walked = False
        self._ready = False
        self._out: Outgoing | None = None
        self._in: list[Incoming] = []
        self._fetch_below_at: int | None = None
        self._share = Share(tools.ledger)
        self._kept_bytes = 0
        self._skeletal_bytes = 0
        self._settled = False
        self._given_up = False
        #: Set while something is half done: an interrupt came in between if the next one finds it set.
        self._fetching = self._preparing = False

    # ---- forward

    def pack(self, tensor: torch.Tensor) -> Holder:
        """Take a tensor that autograd saves."""
        holder = Holder(self, len(self.pending))
        self.pending.append(tensor.detach())
        self.versions.append(tensor._version)
        self.holders.append(weakref.ref(holder))
        return holder

    def holder(self, index: int) -> Holder | None:
        """Holder of saved tensor ``index``, None once its node has run."""
        return self.holders[index]()

    def assign(self, index: int, piece: Piece, position: int) -> None:
        """Saved tensor ``index`` is view ``position`` of ``piece``."""
        holder = self.holder(index)
        if holder is not None:
            holder.piece = piece
            holder.position = position
            piece.add_user(index, self.holders[index])

    def keep(self, index: int) -> None:
        """Saved tensor ``index`` stays on the device as it is; what it takes is counted elsewhere."""
        holder = self.holder(index)
        if holder is not None:
            holder.kept = self.pending[index]
            holder.version = self.versions[index]

    def hold_kept(self, count: int) -> None:
        """``count`` bytes stay on the device until the stash is gone."""
        self._kept_bytes += count
        self.counters.bytes_kept += count

    def hold_skeletal(self, count: int) -> None:
        """``count`` bytes are held while the forward's tensors are alive; ``settle`` drops them."""
        self._skeletal_bytes = count
        self._share.hold(count)

    def hold_gathered(self, count: int) -> None:
        """``count`` bytes were copied on the device to be sent together; ``settle`` drops them."""
        self._skeletal_bytes += count
        self._share.hold(count)

    def send(self, outgoing: list[tuple[Piece, torch.Tensor]]) -> Outgoing:
        """Start the copies to the host of pieces with the elements that they lie in."""
        pairs: list[tuple[Piece, Pair]] = []
        for piece, flat in outgoing:
            pair = piece.outgoing(flat)
            if pair is not None:
                pairs.append((piece, pair))
                self.counters.bytes_to_host += piece.bytes_out
        self._out = Outgoing(self.tools.engine, pairs, self.name)
        return self._out

    def settle(self) -> None:
        """The forward is done and the copies are made or under way: let go of the live tensors."""
        for index, (tensor, version) in enumerate(zip(self.pending, self.versions, strict=True)):
            holder = self.holder(index)
            if holder is not None and tensor._version != version:
                holder.problem = (
                    f"saved tensor {index} of '{self.name}' was modified by an in-place operation after it was saved"
                )
        self.pending = []
        self.versions = []
        # Rows that were copied are counted by their pieces already; what stays where it is, never twice.
        self._share.hold(-self._skeletal_bytes)
        self._share.hold(self._kept_bytes)
        self._skeletal_bytes = 0
        self._settled = True

    # ---- backward

    def unpack(self, holder: Holder) -> torch.Tensor:
        """Hand a saved tensor back to autograd."""
        if not self._settled and self.pending:
            return self._live(holder)
        if self._given_up:
            raise StepGivenUpError(
                f"'{self.name}' is to go backward in a step that an exception ended, and its memory was needed for "
                "another one since. Would work: forward again, or a host_budget with room for both"
            )
        if holder.problem:
            raise RuntimeError(
                f"one of the variables needed for gradient computation cannot be given back: {holder.problem}"
            )
        if holder.kept is not None:
            if holder.kept._version != holder.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                    f"parameter or argument that '{self.name}' used (saved tensor {holder.index}) is at version "
                    f"{holder.kept._version}; expected version {holder.version} instead"
                )
            return holder.kept
        if not self._ready:
            self._make_ready()
        if self._fetch_below_at is not None:
            self._fetch_below()
        piece = holder.piece
        if piece is None:
            raise ReplayMismatchError(
                f"saved tensor {holder.index} of '{self.name}' is asked for, but its forward did not finish"
            )
        if piece.modified:
            raise RuntimeError(
                f"one of the variables needed for gradient computation cannot be given back: '{self.name}' was still "
                "being copied to the host when an in-place operation outside it modified its input or a saved tensor; "
                "make that operation out of place"
            )
        rebuilt = piece.rebuilt(holder.index)
        if rebuilt is not None:
            return rebuilt
        if not piece.present:
            raise self._mismatch(
                ReplayMismatchError(
                    f"'{self.name}' was run again and did not save tensor {holder.index}; its forward depends on "
                    "something that changed since (a module attribute, random numbers, data)"
                )
            )
        return piece.view(holder.position)

    def _live(self, holder: Holder) -> torch.Tensor:
        """The forward is still running and goes backward itself: nothing was moved yet."""
        self.walked = True
        tensor = self.pending[holder.index]
        if tensor._version != self.versions[holder.index]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: saved "
                f"tensor {holder.index} of '{self.name}' is at version {tensor._version}; expected version "
                f"{self.versions[holder.index]} instead"
            )
        return tensor

    def fetch(self) -> None:
        """Start the copies back of what is not there; what only the rerun read is not wanted again."""
        if self._fetching:
            self.drop()
        if self._ready or all(not piece.landing_bytes for piece in self.pieces):
            return
        self._fetching = True
        if self._out is not None:
            self._out.sent()
        pairs: list[tuple[Piece, Pair]] = []
        with named(f"memo::fetch {self.name}"):
            for piece in self.pieces:
                before = piece.present
                pair = piece.land(self.tools.device)
                if pair is not None:
                    pairs.append((piece, pair))
                if piece.present and not before:
                    self.counters.bytes_to_device += piece.bytes_in
            self._in.append(Incoming(self.tools.engine, pairs, self.name))
        self._fetching = False

    @property
    def landing_bytes(self) -> int:
        """Device bytes that a fetch takes."""
        return sum(piece.landing_bytes for piece in self.pieces)

    def _make_ready(self) -> None:
        if self._preparing:
            self.drop()
        self._preparing = True
        surroundings = Surroundings()
        try:
            self._prepare()
        except BaseException:
            surroundings.restore()
            raise
        self._ready = True
        self._preparing = False

    def _prepare(self) -> None:
        if self.before_backward is not None:
            self.before_backward(self)
        for piece in self.pieces:
            if piece.lost:
                raise CopyError(piece.lost)
        self.fetch()
        try:
            for incoming in self._in:
                incoming.arrived()
        except CopyError:
            self.drop()
            raise
        self._in.clear()
        self._plan_fetch_below()
        if self.rebuild is not None:
            with named(f"memo::rebuild {self.name}"):
                self.counters.recomputed_flops += self._rebuilt(self.rebuild)
            for piece in self.pieces:
                if not piece.users:  # only the rerun read it
                    piece.drop_buffer()

    def _plan_fetch_below(self) -> None:
        """Fetch the block below now, or when little of this one is left (``FETCH_PARTS``).

        Not as soon as there is room for what lands: gradients inside a block may take more than those that it began
        with, in the place of what it has freed, and the plan knows only the highest point of both together.
        """
        lower = self.lower() if self.lower is not None else None
        if lower is None:
            return
        landing = lower.landing_bytes
        own = sum(piece.full_bytes for piece in self.pieces if piece.users)
        if FETCH_PARTS * landing > own:
            lower.fetch()
        else:
            self._fetch_below_at = own // FETCH_PARTS

    def _fetch_below(self) -> None:
        """Start the fetch that was put off, if there is room for it by now."""
        assert self._fetch_below_at is not None, "it was put off"
        if sum(piece.held_bytes for piece in self.pieces) <= self._fetch_below_at:
            self._fetch_below_at = None
            lower = self.lower() if self.lower is not None else None
            if lower is not None:
                lower.fetch()

    def _rebuilt(self, rebuild: Rebuild) -> int:
        try:
            return rebuild.run(self)
        except StateChangedError:
            raise  # says what to do, and no other way of running the block again would help
        except ReplayMismatchError as error:
            raise self._mismatch(error) from error
        except Exception as error:
            pass_on(error)
            if type(error) not in _FAILURES:
                raise
            raise self._mismatch(
                ReplayMismatchError(
                    f"'{self.name}' was run again and failed, which its forward did not: {first_line(error)}. "
                    "No gradient of it was computed; policy='swap' runs nothing again"
                )
            ) from error

    def _mismatch(self, error: ReplayMismatchError) -> ReplayMismatchError:
        return error if self.on_mismatch is None else self.on_mismatch(self, error)

    def drop(self) -> None:
        """Free what was fetched and rebuilt; a later backward through the same graph makes it again."""
        self._ready = self._fetching = self._preparing = False
        self._fetch_below_at = None
        self._forget_incoming()
        for piece in self.pieces:
            piece.drop_buffer()

    def give_back(self) -> None:
        """An exception ended the step, and somebody keeps its graph: free everything. It goes backward no more."""
        self._given_up = True
        self.drop()
        if self._out is not None:
            self._out.sent()
        for piece in self.pieces:
            piece.give_back()

    def _forget_incoming(self) -> None:
        for incoming in self._in:
            incoming.unwanted()
        self._in.clear()
