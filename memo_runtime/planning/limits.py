"""The two budgets of a plan, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memo_runtime.config import Settings
from memo_runtime.planning.sheet import Choice, Sheet
from memo_runtime.records import Limits, Profile

_UNLIMITED = "not limited: device and host are the same memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard limits in bytes; ``device`` is None where only the host counts (CPU without a budget)."""

    device: int | None
    device_source: str
    host: int
    host_source: str

    @classmethod
    def of(cls, profile: Profile, settings: Settings) -> Budgets:
        """What the user gave, obeyed as given; else what was detected."""
        device: int | None = profile.device_bytes
        device_source = f"memory of {profile.device_name or profile.device_type}"
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


def fits(sheet: Sheet, budgets: Budgets, choices: Sequence[Choice]) -> bool:
    """``choices`` keep within both budgets, by exact bytes."""
    return not (budgets.over_host(sheet.host_bytes(choices)) or budgets.over_device(sheet.peak_bytes(choices)))
