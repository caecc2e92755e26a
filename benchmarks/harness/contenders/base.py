"""What a contender is: something that can run one step at a length.

Most train the same subject and differ in what they do to its blocks (``Training``); ``kernels`` does not train.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from benchmarks.harness.job import Job
from benchmarks.harness.subject import OnGradients, Subject
from memo_runtime.rehearsal.cpu_peak import storage_bytes
from memo_runtime.rehearsal.stand_ins import StandIns

BlockForward = Callable[..., torch.Tensor]


class Contender(ABC):
    """One way of running a step: for each length, shortest first, ``start``, its steps, ``finish``."""

    device: torch.device

    @abstractmethod
    def start(self, tokens: int) -> None:
        """Get ready for ``tokens``."""

    @abstractmethod
    def finish(self) -> None:
        """Let go of what belongs to this length."""

    @abstractmethod
    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step; ``on_gradients`` sees the gradients, where there are any."""

    @abstractmethod
    def model_flops(self, tokens: int) -> int:
        """FLOPs that a step needs."""

    def rehearse(self, on_gradients: OnGradients | None = None) -> None:
        """All of a step but attention, before one that takes long."""
        with StandIns(self.device):
            self.step(on_gradients)

    def batch(self) -> tuple[torch.Tensor, ...]:
        """What a step is given, where it is made before the step."""
        return ()

    def close(self) -> None:
        """Let go of what belongs to the process; no step comes after it."""
        return

    def recomputed_flops(self, tokens: int) -> int | None:
        """FLOPs that it spends a second time, in the last step; None: unknown."""
        return 0

    def pinned_bytes(self) -> int:
        """Pinned bytes beyond those of PyTorch's own pool."""
        return 0

    def details(self) -> dict[str, Any]:
        """What else a row should say."""
        return {}

    def resident_bytes(self) -> int:
        """Bytes of tensors between two steps; asked on the CPU only, where no allocator counts."""
        return 0


class Training(Contender):
    """Trains the subject of its job.

    Attributes:
        settings: what ``install`` chose of another project's options, as a row says it.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.subject = Subject(job.settings, longest=job.model_length)
        self.device = self.subject.device
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self.settings: dict[str, Any] = {}
        self.install()

    def install(self) -> None:
        """Change the subject's blocks, once for all lengths."""
        self.subject.tile_loss()

    def start(self, tokens: int) -> None:
        """A batch of ``tokens``."""
        self._batch = self.subject.batch(tokens)

    def finish(self) -> None:
        """Drop the batch."""
        self._batch = None

    def batch(self) -> tuple[torch.Tensor, ...]:
        """Its input and its target."""
        return self._batch or ()

    def step(self, on_gradients: OnGradients | None = None) -> None:
        """One step of the subject."""
        assert self._batch is not None, "start comes first"
        self.subject.step(self._batch, on_gradients)

    def model_flops(self, tokens: int) -> int:
        """FLOPs of the whole subject."""
        return self.subject.shape.model_flops(tokens)

    def details(self) -> dict[str, Any]:
        """The settings, where there are any to choose, and why the loss did not run by tiles, if it did not."""
        found = {"settings": self.settings, "full_logits": self.subject.full_logits}
        return {name: value for name, value in found.items() if value}

    def resident_bytes(self) -> int:
        """Parameters, buffers, optimizer states and the batch."""
        assert self._batch is not None, "start comes first"
        model = self.subject.model
        states = (v for s in self.subject.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return storage_bytes([*model.parameters(), *model.buffers(), *states, *self._batch])


def replace_forwards(layers: Iterable[nn.Module], around: Callable[[BlockForward], BlockForward]) -> None:
    """Run every layer's forward inside ``around``; ``__call__`` and its hooks stay."""
    for layer in layers:
        layer.forward = around(layer.forward)
