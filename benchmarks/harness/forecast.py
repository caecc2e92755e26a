"""What memo forecast for a step beside what was measured. Needs no torch.

A row of a memo contender has both; ``off`` says by which part the forecast is above (+) or below (-) the measurement.
"""

from __future__ import annotations

from benchmarks.harness.rows import Row

#: By how much a forecast may be off, either way: seconds of a step, peak of device memory, pinned host memory.
LIMITS = {"step": 0.05, "peak": 0.03, "host": 0.01}
#: The same for the longest length, between ``memo fit`` and a rehearsed run.
LONGEST_LIMIT = 0.05
#: Host bytes below this are no activations: PyTorch's pool has a few.
_NO_HOST = 2**20


def forecast_of(row: Row) -> Row | None:
    """The forecast of a row, where it has one; rows of the example have it apart."""
    found = (row.get("details") or {}).get("forecast") or row.get("forecast")
    return found if row["status"] == "ok" else None


def off(row: Row) -> dict[str, float]:
    """Parts by which the forecast of ``row`` is off, of what was measured; what was not measured is left out."""
    found = forecast_of(row)
    if found is None:
        return {}
    # On the CPU nothing is pinned, and what the runtime holds is its own count.
    host = row.get("pinned_bytes") if row.get("gpu") else (row.get("details") or {}).get("host_bytes")
    pairs = {
        "step": (found["step_seconds"], row.get("step_seconds"), 0.0),
        "peak": (found["peak_bytes"], row.get("peak_allocated"), 0.0),
        "host": (found["host_bytes"], host, _NO_HOST),
    }
    return {
        name: (forecast - measured) / max(measured, least)
        for name, (forecast, measured, least) in pairs.items()
        if measured is not None and forecast is not None
    }


def beyond(row: Row) -> dict[str, float]:
    """What of ``off`` is beyond its limit."""
    return {name: part for name, part in off(row).items() if not abs(part) <= LIMITS[name]}


def text(row: Row) -> str:
    """``step -3.1 %, peak +0.2 %, host +0.0 %``; "" where there is no forecast."""
    return ", ".join(f"{name} {100 * part:+.1f} %" for name, part in off(row).items())
