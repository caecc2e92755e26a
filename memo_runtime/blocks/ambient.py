"""What surrounds a forward and must be the same when it runs again: autocast, random numbers, kernels of attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from memo_runtime.blocks.aside import Aside
from memo_runtime.blocks.region import shrink
from memo_runtime.blocks.undo import Undo


@dataclass(frozen=True, slots=True)
class AutocastState:
    """Autocast settings of the CPU and of one accelerator type."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cache_enabled: bool

    @classmethod
    def current(cls, device_type: str) -> AutocastState:
        """The settings in force here."""
        kinds = ["cpu"] if device_type == "cpu" else ["cpu", device_type]
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
            torch.is_autocast_cache_enabled(),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run under these settings."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                # Some dtypes are refused even where autocast is off, and then they do not matter.
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache_enabled)
                    )
            yield

    def uncached(self) -> AutocastState:
        """The same with every cast made anew, so that two runs have the same operators in the same order."""
        return replace(self, cache_enabled=False)

    def signature(self) -> str:
        """Distinguishes calls that compute in other precisions."""
        return ",".join(f"{kind}:{dtype}" for kind, enabled, dtype in self.settings if enabled)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Autocast off; nothing where it is, since to say so again takes as long as some launches."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def _accessors(*names: str) -> tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...]:
    """Getters and setters of what this PyTorch has of ``names``, in its own words: called at every forward."""
    found = []
    for getter, setter in (name.split() for name in names):
        if hasattr(torch._C, getter) and hasattr(torch._C, setter):
            found.append((getattr(torch._C, getter), getattr(torch._C, setter)))
    return tuple(found)


_ATTENTION = _accessors(
    "_get_flash_sdp_enabled _set_sdp_use_flash",
    "_get_mem_efficient_sdp_enabled _set_sdp_use_mem_efficient",
    "_get_cudnn_sdp_enabled _set_sdp_use_cudnn",
    "_get_math_sdp_enabled _set_sdp_use_math",
    "_get_overrideable_sdp_enabled _set_sdp_use_overrideable",
    "_get_fa3_sdp_enabled _set_sdp_use_fa3",
    "_get_math_sdp_allow_fp16_bf16_reduction _set_math_sdp_allow_fp16_bf16_reduction",
    "_get_sdp_priority_order _set_sdp_priority_order",
)


def _attention_now() -> tuple[Any, ...]:
    return tuple([get() for get, _ in _ATTENTION])


@dataclass(frozen=True, slots=True)
class AttentionState:
    """Which kernels ``scaled_dot_product_attention`` may take, and in which order (``torch.nn.attention.sdpa_kernel``).

    They belong to the process, and backward mostly runs when what was in force around the forward is over.
    """

    values: tuple[Any, ...]

    @classmethod
    def current(cls) -> AttentionState:
        """What is in force here."""
        return cls(_attention_now())

    def set(self) -> None:
        """Make it what is in force."""
        for (get, put), value in zip(_ATTENTION, self.values, strict=True):
            if get() != value:
                put(value)

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """Run with it in force, then put back what was before; nothing where it is, as mostly."""
        return contextlib.nullcontext() if self.values == _attention_now() else self._restored()

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        undo = Undo(AttentionState.current().set)
        try:
            self.set()
            yield
        finally:
            undo()


@dataclass(frozen=True, slots=True)
class BufferState:
    """Values of buffers and other tensors that a block holds and writes to (running statistics, power iterations).

    Attributes:
        values: tensors, each as it lay in memory, and with what was in it.
    """

    values: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]

    @classmethod
    def current(cls, tensors: Iterable[torch.Tensor]) -> BufferState:
        """The values at this point; as in ``set``, a block may be running and is not to be charged with the copies."""
        with Aside():
            lying = [(tensor, tensor.detach()) for tensor in tensors]
            return cls(tuple((tensor, lies, shrink(lies).clone()) for tensor, lies in lying))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is restored."""
        return [tensor for tensor, _, _ in self.values]

    def set(self) -> None:
        """Make them the current values; no dispatch mode sees that."""
        with torch.no_grad(), Aside():
            for buffer, lies, value in self.values:
                # Resized, or of another size by an assignment to .data.
                if buffer.shape != lies.shape:
                    buffer.data = lies
                # Every value set here is undone after the rerun: to autograd the buffer was not written to. Expanded
                # dimensions cannot be written to: one element stands for all.
                with _unsafe_preserve_version_counter(buffer):
                    shrink(buffer.detach()).copy_(value)

    def changed(self) -> bool:
        """The buffers have other values now."""
        with Aside():
            return any(not torch.equal(shrink(buffer), value) for buffer, _, value in self.values)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run from these values, then put back those from before, so that a rerun does not count twice.

        What the run itself writes is no write either: autograd has saved a buffer that its block reads behind its own
        write, and would take the second one for somebody else's. Whatever was written before the run stays counted.
        """
        before, versions = BufferState.current(self.tensors), _unsafe_preserve_version_counter(tuple(self.tensors))

        def put_back() -> None:
            before.set()
            versions.__exit__()

        undo = Undo(put_back)
        try:
            self.set()
            yield
        finally:
            undo()


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of the CPU generator and of one CUDA device's."""

    cpu: torch.Tensor
    device: torch.device | None
    cuda: torch.Tensor | None

    @classmethod
    def current(cls, device: torch.device) -> RandomState:
        """The state at this point."""
        if device.type == "cuda":
            return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device))
        return cls(torch.get_rng_state(), None, None)

    def set(self) -> None:
        """Make it the current state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and self.device is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run from this state, then put back the one from before."""
        undo = Undo(RandomState.current(self.device or torch.device("cpu")).set)
        try:
            self.set()
            yield
        finally:
            undo()
