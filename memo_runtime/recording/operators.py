"""Recording operator by operator: what each result's storage takes, and when the last user of it lets go.

For CPU and meta tensors, which no allocator with a history stands behind. Views and in-place results share a
storage and are one request; what autograd saves keeps its storage alive. Memory that a kernel takes for itself
is not seen, and what a device would do is what its meta kernels say.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memo_runtime.traces.trace import Phase, Trace, TraceBuilder


class OperatorRecorder(TorchDispatchMode):
    """Records while it is entered. Tensors that are older count as there from the start.

    It keeps no tensor alive. An error of an operator ends recording where it happened; what was recorded stays.
    """

    def __init__(self, before: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._builder = TraceBuilder()
        self._known: dict[int, _Known] = {}
        self._recording = False
        for tensor in before:
            self._note(tensor, before=True)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled regions stay compiled."""
        return True

    def __enter__(self) -> OperatorRecorder:
        self._recording = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, at)  # type: ignore[no-untyped-call]
        self._recording = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and note storages that were not seen before."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, before=True)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._note(tensor, before=False)
        return result

    def begin(self, phase: Phase, block: str = "") -> None:
        """A span begins."""
        self._builder.begin(phase, block)

    def end(self, phase: Phase, block: str = "") -> None:
        """It ends."""
        self._builder.end(phase, block)

    def trace(self, provenance: dict[str, str] | None = None) -> Trace:
        """What was recorded so far."""
        words = {"recorder": "operators", "torch": torch.__version__, **(provenance or {})}
        return self._builder.build(provenance=words)

    def _note(self, tensor: torch.Tensor, *, before: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known.size != size:  # it was resized: other bytes, at another place
                self._builder.free(known.number)
                known.number, known.size = self._builder.allocate(size), size
            return
        number = self._builder.allocate(size, before=before)
        self._known[key] = _Known(number, size, weakref.finalize(storage, self._gone, key))

    def _gone(self, key: int) -> None:
        known = self._known.pop(key)
        if self._recording:
            self._builder.free(known.number)


class _Known:
    """One live storage: its request, its size then, and what tells its end."""

    __slots__ = ("finalizer", "number", "size")

    def __init__(self, number: int, size: int, finalizer: weakref.finalize[Any, Any]) -> None:
        self.number = number
        self.size = size
        self.finalizer = finalizer
        # At the end of the process nobody needs to know.
        finalizer.atexit = False


def _tensors(values: Any) -> list[torch.Tensor]:
    return [
        value
        for value in _pytree.tree_leaves(values)
        if isinstance(value, torch.Tensor) and not hasattr(value, "__tensor_flatten__")
    ]
