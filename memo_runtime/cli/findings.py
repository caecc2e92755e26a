"""What ``memo doctor`` finds, as records: their fields are those of ``memo doctor --json``."""

from __future__ import annotations

from dataclasses import dataclass

from memo_runtime.reporting.environment import Package, System


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """What the step on one device showed; ``error`` is empty where it ran."""

    device: str
    ok: bool
    loss_difference: float | None = None
    gradient_error: float | None = None
    bytes_to_host: int = 0
    recomputed_flops: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTests:
    """The self-test of every device."""

    ok: bool
    devices: tuple[SelfTest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device; rates are bytes per second; ``error`` is empty where it works.

    ``both`` is the rate of both directions together, ``pinning`` that of making pinned memory, ``submit_seconds`` the
    host's time for one copy, ``copies`` who makes them and why.
    """

    name: str
    kind: str
    memory_bytes: int | None = None
    capability: str | None = None
    peak_flops: float | None = None
    to_host: float | None = None
    to_device: float | None = None
    both: float | None = None
    pinning: float | None = None
    submit_seconds: float | None = None
    copies: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """How much memory a plan may take on the host, and which limit that is."""

    limit_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """A compiled part: ``state`` is ``ok`` or ``unavailable``, ``detail`` says why."""

    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything ``memo doctor`` says; ``host`` is None where torch does not load."""

    ok: bool
    version: str
    system: System
    packages: tuple[Package, ...]
    cuda_driver: str | None
    host: HostMemory | None
    devices: tuple[Device, ...]
    native: tuple[Native, ...]
    selftest: SelfTests
