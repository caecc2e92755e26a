"""The two budgets of a plan, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_runtime.config import Settings
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Limits, Profile
from memo_runtime.units import format_bytes

#: Reserved and not allocated memory of a step, in largest tensors: 1.9 to 2.7 on an H100 for Llama-8B blocks at 16K to
#: 128K tokens, untouched, under checkpoints and selectively recomputed; 3.9 on an H200 for those of a Llama-1B by
#: replay at 64K, which ran out of memory with room for three.
_SPLINTERS = 4
#: The most that is left to it: this part of the device.
_MOST_SPLINTERS = 4

_UNLIMITED = "not limited: device and host are the same memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard limits in bytes; ``device`` is None where only the host counts (CPU without a budget)."""

    device: int | None
    device_source: str
    host: int
    host_source: str

    @classmethod
    def of(cls, sheet: Sheet, settings: Settings) -> Budgets:
        """What the user gave, obeyed as given; else what was detected, less what fragmentation takes of it."""
        profile = sheet.profile
        device: int | None = profile.device_bytes
        device_source = f"memory of {profile.device_name or profile.device_type}"
        splinters = _splinters(sheet)
        if splinters:
            device = profile.device_bytes - splinters
            device_source += f", less {format_bytes(splinters)} that large tensors splinter"
        if settings.budget is not None:
            device, device_source = settings.budget, "budget"
        elif profile.device_type == "cpu":
            device, device_source = None, _UNLIMITED
        host, host_source = profile.host_bytes, profile.host_source
        if settings.host_budget is not None:
            host, host_source = settings.host_budget, "host_budget"
        return cls(device=device, device_source=device_source, host=host, host_source=host_source)

    @classmethod
    def recorded(cls, limits: Limits) -> Budgets:
        """Those that a plan states."""
        unlimited = limits.device_source == _UNLIMITED
        device = None if unlimited else limits.device_bytes
        return cls(
            device=device, device_source=limits.device_source, host=limits.host_bytes, host_source=limits.host_source
        )

    def record(self, profile: Profile) -> Limits:
        """As the plan states them."""
        return Limits(
            device_bytes=profile.device_bytes if self.device is None else self.device,
            device_source=self.device_source,
            host_bytes=self.host,
            host_source=self.host_source,
        )

    def over_device(self, peak_bytes: int) -> int:
        """Bytes by which ``peak_bytes`` exceed the device limit, 0 if they fit."""
        return 0 if self.device is None else max(0, peak_bytes - self.device)

    def over_host(self, host_bytes: int) -> int:
        """Bytes by which ``host_bytes`` exceed the host limit, 0 if they fit."""
        return max(0, host_bytes - self.host)


def _splinters(sheet: Sheet) -> int:
    """Device bytes that lie idle between large tensors of many sizes; none where the allocator joins them again."""
    profile = sheet.profile
    if profile.device_type == "cpu" or profile.expandable:
        return 0
    tokens = sheet.lengths[-1] if sheet.lengths else 0
    # Logits that are not tiled are there as they are, in float32, and as two gradients.
    largest = profile.end(tokens, by_tiles=sheet.norm_by_tiles)[0] // 3
    for block, length in zip(profile.blocks, sheet.lengths, strict=True):
        for group in block.groups:
            # An estimate stands for many tensors.
            largest = max(largest, group.size.at(length) // (4 if group.estimated else 1))
    return min(_SPLINTERS * largest, profile.device_bytes // _MOST_SPLINTERS)


def fits(sheet: Sheet, budgets: Budgets, choices: Sequence[Choice]) -> bool:
    """``choices`` keep within both budgets, by exact bytes."""
    if budgets.over_host(sheet.host_bytes(choices)):
        return False
    # Most that do not fit are too large before head and loss already, which takes no walk through the step.
    at_head = sheet.bytes_at_head(choices)
    return not (budgets.over_device(at_head) or budgets.over_device(sheet.peak_bytes(choices)))
