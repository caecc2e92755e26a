"""The devices that torch sees: their memory, peak and links, and the host memory behind them."""

from __future__ import annotations

from dataclasses import asdict

import torch

from memo_runtime.cli.findings import Device, HostMemory
from memo_runtime.profiling.link import link_facts
from memo_runtime.profiling.machine import host_limit
from memo_runtime.reporting.mfu import peak_flops


def all_devices() -> list[torch.device]:
    """The CPU, and every CUDA device."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def host_memory() -> HostMemory:
    """What a plan may take on the host."""
    limit, source = host_limit()
    return HostMemory(limit_bytes=limit, source=source)


def describe(device: torch.device) -> Device:
    """Facts and measured link rates of ``device``; never raises."""
    try:
        facts_of_link = asdict(link_facts(device))
        if device.type == "cpu":
            return Device(name="cpu", kind="cpu", **facts_of_link)
        facts = torch.cuda.get_device_properties(device)
        peak = peak_flops(facts.name)
        return Device(
            name=str(device),
            kind=facts.name,
            memory_bytes=facts.total_memory,
            capability=f"{facts.major}.{facts.minor}",
            peak_flops=None if peak is None else peak.flops,
            **facts_of_link,
        )
    except Exception as error:  # a device that fails is a line of the answer
        return Device(name=str(device), kind=device.type, error=f"{type(error).__name__}: {error}")
