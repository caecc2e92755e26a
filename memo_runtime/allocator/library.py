"""The one place that loads the built allocator, and its functions as Python calls (csrc/torch_allocator/shell).

Once installed it stays for the life of the process: tensors keep a pointer to it. Until a plan is handed over it passes
everything on to PyTorch's own allocator, and that one's tensors untouched.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from memo_runtime.allocator.versions import BUILD_COMMAND, KNOWN, library_path, number, running
from memo_runtime.errors import AllocatorPlanError, AllocatorUnavailableError

INTERFACE_VERSION = 3
_BUG, _INVALID, _NO_MEMORY = 1, 2, 3
#: csrc/torch_allocator/shell/interface.cpp
_ERRORS: dict[int, type[Exception]] = {
    _BUG: RuntimeError,
    _INVALID: AllocatorPlanError,
    _NO_MEMORY: AllocatorPlanError,
    4: AllocatorUnavailableError,
    5: AllocatorUnavailableError,
}

_I32, _I64, _U64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "torch": (_I32, ()),
    "interface_version": (_I32, ()),
    "error": (_I64, (_POINTER, _I64)),
    "install": (_I32, (_I32,)),
    "arm": (_I32, (_I32, _POINTER, _U64, _U64)),
    "disarm": (_I32, (_I32, _POINTER)),
    "begin_step": (_I32, (_I32,)),
    "end_step": (_I32, (_I32,)),
    "statistics": (_I32, (_I32, _POINTER, _I64)),
    "misfits": (_I32, (_I32, _POINTER, _U64, _POINTER)),
    "holds": (_I32, (_I32, _U64, _POINTER)),
}

#: The offset of a request that outlives the step: its place in the order counts, its bytes are PyTorch's.
NATIVE = 2**64 - 1
#: (lower, upper, size, offset, stream handle) of one request of a step.
Slot = tuple[int, int, int, int, int]
#: Least and most bytes that a request may have.
Bounds = tuple[int, int]
#: A step says no more of other sizes; csrc/torch_allocator/arena.cpp
_MOST_MISFITS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests and bytes of a time; ``Counts`` of csrc/torch_allocator/arena.hpp.

    Attributes:
        requests, bytes: that came, bytes as requested. served, served_bytes: at the plan's offsets.
        resident: not served, since they outlive the step in the plan. outside: since no step was open.
        other_stream: on a stream that the plan does not know. unplanned: of a size that it does not have there.
        occupied: their bytes were in use. unordered: their bytes could not be waited for.
        displaced: served from another place of the plan than the next. jumps: how often the place was lost and found.
        waits: events of other streams that had to be waited for.
    """

    requests: int
    bytes: int
    served: int
    served_bytes: int
    resident: int
    outside: int
    other_stream: int
    unplanned: int
    occupied: int
    unordered: int
    displaced: int
    jumps: int
    waits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What the arena of one device did.

    Attributes:
        total: since it was made. last_step: in the last whole step. steps: whole ones.
        live, live_bytes, live_requested: tensors in it, with bytes rounded and as requested. peak_bytes: most of them.
        arena_bytes: of the arena. bypassed: requests of private pools and graphs, which are PyTorch's own.
        given_back: how often the arena was given back since memory ran out. armed: there is a plan.
    """

    total: Counts
    last_step: Counts
    steps: int
    live: int
    live_bytes: int
    live_requested: int
    peak_bytes: int
    arena_bytes: int
    bypassed: int
    given_back: int
    armed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorStatus:
    """Whether the planned allocator can be used, and if not, why."""

    available: bool
    reason: str


class PlannedAllocator:
    """The functions of one loaded library; those that return a status raise instead.

    Raises:
        AllocatorUnavailableError: not there, not loadable, or built for another torch or interface.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise AllocatorUnavailableError(f"not built for torch {running()}: run {BUILD_COMMAND}")
        try:
            handle = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, f"memo_alloc_{name}")
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise AllocatorUnavailableError(f"cannot be loaded, build it again ({BUILD_COMMAND}): {error}") from None
        found = int(handle.memo_alloc_interface_version())
        if found != INTERFACE_VERSION:
            raise AllocatorUnavailableError(
                f"has interface {found}, this version needs {INTERFACE_VERSION}: run {BUILD_COMMAND}"
            )
        built = int(handle.memo_alloc_torch())
        if built != number(running()):
            raise AllocatorUnavailableError(
                f"is built for torch {built // 1000}.{built % 1000}, and {running()} is running: run {BUILD_COMMAND}"
            )
        self._handle = handle

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._handle, f"memo_alloc_{name}")(*arguments)
        if status:
            text = ctypes.create_string_buffer(2048)
            self._handle.memo_alloc_error(text, len(text))
            raise _ERRORS.get(status, RuntimeError)(text.value.decode(errors="replace"))

    def install(self) -> None:
        """Go in front of PyTorch's own allocator, for good; a second call does nothing.

        Raises:
            AllocatorUnavailableError: another allocator is in use (pluggable, cudaMallocAsync).
        """
        self._call("install", number(running()))

    def arm(self, device: int, slots: Sequence[Slot], size: int, bounds: Sequence[Bounds] | None = None) -> None:
        """Serve ``slots``, in order of their begin, from the next step on, in an arena of at least ``size`` bytes.

        Args:
            bounds: of the size of each slot, which has room for the most; sizes are certain where not given.

        Raises:
            AllocatorPlanError: they cannot be a plan, or there is no memory for them; nothing has changed.
        """
        bounds = [(slot[2], slot[2]) for slot in slots] if bounds is None else bounds
        whole = ((*slot, *both) for slot, both in zip(slots, bounds, strict=True))
        numbers = array("Q", [value for values in whole for value in values])
        address, _ = numbers.buffer_info()
        self._call("arm", device, address, len(slots), size)

    def disarm(self, device: int) -> int:
        """Serve nothing any more; the arena goes back once no tensor lives in it. Returns bytes that still do."""
        alive = _U64()
        self._call("disarm", device, ctypes.byref(alive))
        return int(alive.value)

    def begin_step(self, device: int) -> None:
        """A step begins, at the plan's first request; one that is open ends."""
        self._call("begin_step", device)

    def end_step(self, device: int) -> None:
        """The step ends; nothing is served until the next."""
        self._call("end_step", device)

    def misfits(self, device: int) -> list[tuple[int, int]]:
        """(slot, bytes) of requests of the last step that had another size than planned, where their slot is known."""
        values, count = (_U64 * (2 * _MOST_MISFITS))(), _U64()
        self._call("misfits", device, values, _MOST_MISFITS, ctypes.byref(count))
        return [(values[2 * at], values[2 * at + 1]) for at in range(count.value)]

    def holds(self, device: int, address: int) -> bool:
        """Whether planned memory is at ``address``."""
        holds = _I32()
        self._call("holds", device, address, ctypes.byref(holds))
        return bool(holds.value)

    def statistics(self, device: int) -> Statistics:
        """What the arena of ``device`` did; zeros where there is none."""
        each, own = len(fields(Counts)), len(fields(Statistics)) - 2
        values = (_U64 * (2 * each + own))()
        self._call("statistics", device, values, len(values))
        names = [field.name for field in fields(Counts)]
        total, last, rest = values[:each], values[each : 2 * each], list(values[2 * each :])
        return Statistics(
            total=Counts(**dict(zip(names, total, strict=True))),
            last_step=Counts(**dict(zip(names, last, strict=True))),
            steps=rest[0],
            live=rest[1],
            live_bytes=rest[2],
            live_requested=rest[3],
            peak_bytes=rest[4],
            arena_bytes=rest[5],
            bypassed=rest[6],
            given_back=rest[7],
            armed=bool(rest[8]),
        )


@functools.cache
def _load() -> PlannedAllocator | AllocatorUnavailableError:
    if torch.version.cuda is None:
        return AllocatorUnavailableError(f"torch {torch.__version__} is built without CUDA")
    if running() not in KNOWN:
        return AllocatorUnavailableError(f"torch {running()} is running, and it is known for torch {', '.join(KNOWN)}")
    try:
        return PlannedAllocator(library_path(running()))
    except AllocatorUnavailableError as error:
        return error


def planned_allocator() -> PlannedAllocator:
    """The allocator for the torch that is running, loaded once.

    Raises:
        AllocatorUnavailableError: it is not there; says why.
    """
    found = _load()
    if isinstance(found, AllocatorUnavailableError):
        raise AllocatorUnavailableError(f"the planned allocator cannot be used: {found}")
    return found


def allocator_status() -> AllocatorStatus:
    """Say whether the planned allocator loads."""
    found = _load()
    if isinstance(found, AllocatorUnavailableError):
        return AllocatorStatus(available=False, reason=str(found))
    return AllocatorStatus(available=True, reason=f"built for torch {running()}")
