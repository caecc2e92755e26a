"""Tensors in pinned host memory between forward and backward, copied on two streams of their own.

For contenders that are built here from public pieces. At most two tensors are still on their way to the host: a third
waits for the first, so that what leaves the device does not pile up there. What was sent last comes back first.
"""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

#: How many tensors may be on their way to the host before the next waits.
UNDER_WAY = 2

_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclass(slots=True, eq=False)
class Sent:
    """A tensor on the host, and on the device while it leaves or returns.

    Attributes:
        host: its copy. device: itself, until it has left and once it is on its way back. ready: when that copy is done.
    """

    host: torch.Tensor
    device: torch.Tensor | None
    ready: torch.cuda.Event | None
    returning: bool = False


class HostCopies:
    """Sends tensors to the host and brings them back; buffers on the host are used again in the next step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._out, self._back = (torch.cuda.Stream(device) if self._cuda else None for _ in range(2))
        self._leaving: deque[Sent] = deque()
        self._unused: dict[_Kind, list[torch.Tensor]] = defaultdict(list)

    def send(self, tensor: torch.Tensor) -> Sent:
        """Copy ``tensor``, whose maker was queued, to the host."""
        while len(self._leaving) >= UNDER_WAY:
            self._let_go(self._leaving.popleft())
        host = self._buffer(tensor)
        with self._after_now(self._out):
            host.copy_(tensor, non_blocking=True)
            sent = Sent(host, tensor, self._event(self._out))
        self._leaving.append(sent)
        return sent

    def forget(self) -> None:
        """Let go of buffers: the next step has other sizes."""
        self._unused.clear()

    def prefetch(self, sent: Sent) -> None:
        """Begin to bring it back, if it has left."""
        if sent.device is not None:
            return
        # Memory of the compute stream: the copy begins when all that was queued there before is done.
        sent.device = torch.empty_strided(
            sent.host.size(), sent.host.stride(), dtype=sent.host.dtype, device=self._device
        )
        with self._after_now(self._back):
            sent.device.copy_(sent.host, non_blocking=True)
            sent.ready, sent.returning = self._event(self._back), True

    def fetch(self, sent: Sent) -> torch.Tensor:
        """The tensor on the device, for what is queued from now on. A tensor is fetched once."""
        if sent in self._leaving:  # the last ones never left
            self._leaving.remove(sent)
        self.prefetch(sent)
        self._wait(sent)
        tensor, sent.device = sent.device, None
        assert tensor is not None, "prefetch made it"
        self._unused[_kind(sent.host)].append(sent.host)
        return tensor

    def _let_go(self, sent: Sent) -> None:
        """Free the device's memory behind its copy."""
        self._wait(sent)
        sent.device = None

    def _wait(self, sent: Sent) -> None:
        if sent.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(sent.ready)
            sent.ready = None

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        unused = self._unused[_kind(tensor)]
        if unused:
            return unused.pop()
        size, stride = tensor.size(), tensor.stride()
        return torch.empty_strided(size, stride, dtype=tensor.dtype, device="cpu", pin_memory=self._cuda)

    def _after_now(self, stream: torch.cuda.Stream | None) -> Any:
        """Work on ``stream``, behind all that the compute stream was given."""
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(stream)

    def _event(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        return None if stream is None else stream.record_event()


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.size(), tensor.stride(), tensor.dtype
