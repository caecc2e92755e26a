"""What a rehearsal found, as a value. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memo_runtime.records import Forecast
from memo_runtime.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplacedKernel:
    """Calls of one kernel in the rehearsed step; ``inside_bytes``: the most that a call would allocate inside."""

    name: str
    forward: int
    backward: int
    inside_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Outcome of ``memo.rehearse``. ``print(rehearsal)`` says it in words.

    Attributes:
        fits: the step ended. seconds: of the rehearsed step, without what the kernels take that were replaced.
        peak_bytes, reserved_bytes: most that PyTorch's allocator gave and held in the step, with what was there before.
            On the CPU the bytes of tensors, and nothing is reserved.
        host_bytes: host memory reserved by the wrapped model, or pinned by PyTorch if it is not wrapped.
        bytes_to_host, bytes_to_device: copied by the wrapped model's blocks.
        replaced: kernels that others stood in for. forecast: of the plan that was rehearsed; None: there is none.
        phase: where a step that does not fit ended: ``plan``, ``forward``, ``backward`` or ``optimizer``.
            where: the module, or how many kernels had gone backward. error: the first line of what was raised.
    """

    fits: bool
    seconds: float
    peak_bytes: int
    reserved_bytes: int
    host_bytes: int
    bytes_to_host: int
    bytes_to_device: int
    replaced: tuple[ReplacedKernel, ...]
    forecast: Forecast | None
    phase: str = ""
    where: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """Calls of kernels that were replaced, forward and backward."""
        return sum(one.forward + one.backward for one in self.replaced)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    @classmethod
    def short(cls, *, phase: str, where: str, error: str) -> Rehearsal:
        """One that ended before there was anything to measure."""
        return cls(
            fits=False, seconds=0.0, peak_bytes=0, reserved_bytes=0, host_bytes=0, bytes_to_host=0, bytes_to_device=0,
            replaced=(), forecast=None, phase=phase, where=where, error=error,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rehearsal:
        """The rehearsal of ``to_dict``, through JSON or not."""
        forecast = values["forecast"]
        read = {
            "replaced": tuple(ReplacedKernel(**one) for one in values["replaced"]),
            "forecast": None if forecast is None else Forecast(**forecast),
            "notes": tuple(values["notes"]),
        }
        return cls(**{**values, **read})

    def __str__(self) -> str:
        verdict = f"fits, rehearsed in {format_seconds(self.seconds)}"
        if not self.fits:
            verdict = f"does NOT fit: {self.phase}, {self.where}: {self.error}"
        rows = [("rehearsal", verdict)]
        foreseen = self.forecast
        sizes = (
            ("peak", self.peak_bytes, foreseen.peak_bytes if foreseen else None),
            ("reserved", self.reserved_bytes, None),
            ("host", self.host_bytes, foreseen.host_bytes if foreseen else None),
            ("to host", self.bytes_to_host, foreseen.bytes_to_host if foreseen else None),
            ("to device", self.bytes_to_device, foreseen.bytes_to_device if foreseen else None),
        )
        for name, size, forecast in sizes:
            said = "" if forecast is None else f"  (forecast {format_bytes(forecast)})"
            rows.append((name, f"{format_bytes(size)}{said}"))
        if foreseen is not None:
            rows.append(("real step", f"forecast {format_seconds(foreseen.step_seconds)}"))
        for one in self.replaced:
            inside = f", {format_bytes(one.inside_bytes)} inside" if one.inside_bytes else ""
            rows.append(("replaced", f"{one.name}: {one.forward} forward, {one.backward} backward{inside}"))
        rows += [("note", text) for text in self.notes]
        return "\n".join(f"{name:<10} {text}" for name, text in rows)
