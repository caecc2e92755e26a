"""One length of a contender, rehearsed: its memory with stand-ins for the kernels of attention, the same for everybody.

Two steps, the second of which is measured; their seconds are no times of anything, and a row keeps them in its details.
Any contender can be rehearsed whose attention goes through PyTorch's fused operators: its own interface is all that is
used. One whose attention does not is refused, since its row would be beside others for which there was no attention.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.job import Job
from benchmarks.harness.memory import cuda_peaks, host_facts, release, reset_peaks
from memo_runtime.errors import RehearsalError
from memo_runtime.profiling.machine import host_limit
from memo_runtime.rehearsal.cpu_peak import cpu_peak
from memo_runtime.rehearsal.stand_ins import StandIns


def rehearse(contender: Contender, job: Job, tokens: int) -> dict[str, Any]:
    """What a rehearsal of ``contender`` at ``tokens`` shows.

    Raises:
        RehearsalError: no kernel of its attention was replaced.
    """
    device, limit = contender.device, host_limit()[0]  # before anything is pinned
    with StandIns(device) as stand_ins:
        contender.start(tokens)
        contender.step()
        release(device)
        reset_peaks(device)
        stand_ins.clear()
        began = time.perf_counter()
        peaks: dict[str, Any]
        if device.type == "cpu":
            peaks = {"peak_allocated": cpu_peak(contender.step, contender.resident_bytes())}
        else:
            contender.step()
            torch.cuda.synchronize(device)
            peaks = cuda_peaks(device)
        seconds = time.perf_counter() - began
    if not any(one.forward and one.backward for one in stand_ins.calls.values()):
        raise RehearsalError(
            f"{job.contender} calls none of the kernels of attention that a rehearsal replaces, so its step was "
            "a real one: measure it without --rehearse"
        )
    facts: dict[str, Any] = {"status": "ok", "seq_len": tokens, "rehearsed": True, **peaks, **host_facts(device)}
    if facts["pinned_bytes"] is not None:
        facts["pinned_bytes"] += contender.pinned_bytes()
    replaced = {name: [one.forward, one.backward, one.inside_bytes] for name, one in stand_ins.calls.items()}
    facts["details"] = contender.details() | {
        "rehearsed_seconds": seconds, "replaced": replaced, "memory": _memory(job, device),
        "host_limit": limit,
    }  # fmt: skip
    return facts


def _memory(job: Job, device: torch.device) -> int | None:
    """Bytes that may be allocated, where that is known."""
    if job.settings.memory is not None:
        return job.settings.memory
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None
