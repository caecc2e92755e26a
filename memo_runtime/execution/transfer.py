"""Copies between device and host behind one small interface.

``TorchTransfer`` does them with PyTorch: on CUDA on two side streams (one each way) ordered by events, on CPU at
once, into a second buffer. Who waits for what:

    compute   | forward of block i | forward of block i+1        | ... | backward of i+1 | backward of i
    to host   |                    | (after i) copy i's rows     |     |                 |
    to device |                    |                             |     | copy i's rows   |

A copy to the host starts when compute has made its source, and the source stays alive until compute has been told
to wait for the copy (``Ticket.release``): memory that is freed earlier would be reused under it. A copy to the
device starts when compute has reached the allocation of its target, since the target's memory may be in use by
earlier kernels; compute waits for it before the first use (``Ticket.wait``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

#: Above this many runs of memory a strided copy goes through a packed buffer on the device.
_MAX_RUNS = 128


class Ticket(ABC):
    """One copy under way."""

    @abstractmethod
    def wait(self) -> None:
        """Make the compute stream wait for the copy (on CPU: it is done)."""

    @abstractmethod
    def release(self) -> bool:
        """Wait, then let go of the source; False if the source was modified in place before the copy was over."""


class Transfer(ABC):
    """Copies of [outer, rows, inner] tensors; what the native core will implement too."""

    #: Copies handed out and not released yet.
    open_copies: int = 0

    @abstractmethod
    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """Copy device rows ``source`` into host memory ``target`` of the same shape, packed."""

    @abstractmethod
    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """Copy packed host memory ``source`` into device rows ``target`` of the same shape."""


class _Done(Ticket):
    """A copy that was made at once."""

    def wait(self) -> None:
        """Nothing is under way."""

    def release(self) -> bool:
        """Nothing is held, and nothing was modified before the copy was over."""
        return True


class CpuTransfer(Transfer):
    """Copies within host memory, made at once."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """See ``Transfer``."""
        target.copy_(source)
        return _DONE

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """See ``Transfer``."""
        target.copy_(source)
        return _DONE


_DONE = _Done()


class _CudaTicket(Ticket):
    def __init__(self, transfer: CudaTransfer, event: torch.cuda.Event, held: torch.Tensor | None) -> None:
        self._transfer = transfer
        self._event = event
        self._held = held
        self._version = held._version if held is not None else 0
        self._open = True

    def wait(self) -> None:
        torch.cuda.current_stream(self._transfer.device).wait_event(self._event)
        self._close()

    def release(self) -> bool:
        if self._open:
            self.wait()
        untouched = self._held is None or self._held._version == self._version
        self._held = None
        return untouched

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._transfer.open_copies -= 1


class CudaTransfer(Transfer):
    """Asynchronous copies on one stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Each way its own stream: the two directions use different copy engines and overlap.
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """See ``Transfer``."""
        return self._copy(self._out, source, target, held=source)

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> Ticket:
        """See ``Transfer``."""
        return self._copy(self._in, source, target, held=None)

    def _copy(
        self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor, held: torch.Tensor | None
    ) -> Ticket:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if source.shape[0] <= _MAX_RUNS:
                # Each run is one plain asynchronous copy; a strided one would go through a temporary.
                for run in range(source.shape[0]):
                    target[run].copy_(source[run], non_blocking=True)
            else:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        self.open_copies += 1
        return _CudaTicket(self, event, held)


def make_transfer(device: torch.device) -> Transfer:
    """The transfer for ``device``."""
    return CudaTransfer(device) if device.type == "cuda" else CpuTransfer()
