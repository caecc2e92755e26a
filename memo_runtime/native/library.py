"""The one place that loads the compiled core (`_core.so`, from csrc/core), and its functions as Python calls.

The library needs neither a GPU nor torch to load. It finds the CUDA driver when a device is opened. ctypes releases
the interpreter lock during a call. The interface is csrc/core/c_interface.h; a failed call raises an error of
``memo_runtime.errors`` with the library's text.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memo_runtime.errors import CopyError, CopyUseError, NativeUnavailableError, PinningError

INTERFACE_VERSION = 3
CUDA_DRIVER = "libcuda.so.1"
_LIBRARY = Path(__file__).with_name("_core.so")

_REFUSED = 4
#: csrc/core/failure.hpp
_ERRORS: dict[int, type[Exception]] = {
    1: RuntimeError,
    2: CopyUseError,
    3: CopyUseError,
    _REFUSED: PinningError,
    5: CopyError,
    6: CopyUseError,
    7: CopyUseError,
    8: NativeUnavailableError,
}

_I32, _I64, _U64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
_TEXT, _POINTER = ctypes.c_char_p, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "error": (_I64, (_POINTER, _I64)),
    "device_open": (_I32, (_TEXT, _I32, _POINTER)),
    "device_close": (_I32, (_I64,)),
    "device_numa_node": (_I32, (_I64, _POINTER)),
    "slab_create": (_I32, (_I64, _U64, _U64, _I32, _I32, _I32, _POINTER)),
    "slab_refusal": (_I32, (_I64, _POINTER, _I64)),
    "slab_take": (_I32, (_I64, _U64, _U64, _POINTER)),
    "slab_give": (_I32, (_I64, _POINTER)),
    "slab_in_use": (_I32, (_I64, _POINTER)),
    "slab_close": (_I32, (_I64,)),
    "slab_destroy": (_I32, (_I64,)),
    "engine_create": (_I32, (_I64, _I32, _POINTER)),
    "engine_destroy": (_I32, (_I64,)),
    "engine_drain": (_I32, (_I64,)),
    "engine_stream": (_I32, (_I64, _I32, _POINTER)),
    "engine_num_open": (_I32, (_I64, _POINTER)),
    "submit": (_I64, (_TEXT, _TEXT)),
    "wait": (_I32, (_I64, _I64, _U64)),
    "cancel": (_I32, (_I64, _I64, _U64, _POINTER)),
    "drop": (None, (_I64, _I64, _U64, ctypes.py_object)),
    "done": (_I32, (_I64, _I64, _POINTER)),
}


class SlabInfo(ctypes.Structure):
    """``memo_core_slab_info``."""

    _fields_ = (
        ("slab", _I64),
        ("base", _U64),
        ("size", _U64),
        ("mapped", _U64),
        ("pinned", _I32),
        ("on_node", _I32),
    )


@functools.lru_cache(maxsize=256)
def packing(count: int) -> struct.Struct:
    """How a ``memo_core_request`` of ``count`` copies lies in memory.

    Engine, ticket, stream, direction and count; then six numbers of each copy: host, device, width, height, host pitch,
    device pitch. Packed bytes go over as they are: filling ctypes structures would take a microsecond for each copy.
    """
    return struct.Struct(f"=qqQii{6 * count}Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeStatus:
    """Whether the compiled core can be used, and if not, why."""

    available: bool
    reason: str


class Library:
    """The functions of one loaded library; those that return a status raise instead.

    Raises:
        NativeUnavailableError: no such file, not loadable, or of another interface version.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise NativeUnavailableError("not built: install with a C++17 compiler present (MEMO_BUILD_EXT=on)")
        try:
            handle = ctypes.CDLL(str(path))
            found = int(handle.memo_core_interface_version())
            if found != INTERFACE_VERSION:
                raise NativeUnavailableError(
                    f"has interface {found}, this version needs {INTERFACE_VERSION}: build it again"
                )
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, f"memo_core_{name}")
                function.restype, function.argtypes = result, arguments
        except OSError as error:
            raise NativeUnavailableError(f"cannot be loaded: {error}") from None
        except AttributeError as error:
            raise NativeUnavailableError(f"lacks a function, build it again: {error}") from None
        self._handle = handle
        # The calls of every copy, without a look-up by name.
        self.submit = handle.memo_core_submit
        self.wait = handle.memo_core_wait
        self.drop = handle.memo_core_drop

    def call(self, name: str, *arguments: Any) -> None:
        """Call ``memo_core_NAME``; raise what it reports."""
        status = getattr(self._handle, f"memo_core_{name}")(*arguments)
        if status:
            raise self.error(status)

    def number(self, name: str, kind: Any, *arguments: Any) -> int:
        """Call ``memo_core_NAME`` whose last parameter receives a number of ctypes type ``kind``."""
        value = kind()
        self.call(name, *arguments, ctypes.byref(value))
        return int(value.value)

    def error(self, status: int) -> Exception:
        """The exception for ``status``, with this thread's text."""
        text = ctypes.create_string_buffer(1024)
        self._handle.memo_core_error(text, len(text))
        return _ERRORS.get(status, RuntimeError)(text.value.decode(errors="replace"))

    def refusal(self, slab: int) -> str:
        """Why ``slab`` is smaller than asked; empty where it is not."""
        text = ctypes.create_string_buffer(1024)
        self.call("slab_refusal", slab, text, len(text))
        return text.value.decode(errors="replace")


@functools.cache
def _load() -> Library | NativeUnavailableError:
    try:
        return Library(_LIBRARY)
    except NativeUnavailableError as error:
        return error


def library() -> Library:
    """The compiled core.

    Raises:
        NativeUnavailableError: it is not there; says why.
    """
    found = _load()
    if isinstance(found, NativeUnavailableError):
        raise NativeUnavailableError(f"the native core cannot be used: {found}")
    return found


def native_status() -> NativeStatus:
    """Say whether the compiled core loads."""
    found = _load()
    if isinstance(found, NativeUnavailableError):
        return NativeStatus(available=False, reason=str(found))
    return NativeStatus(available=True, reason="native core in use")
