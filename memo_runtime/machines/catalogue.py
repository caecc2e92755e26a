"""The machines that are known by name.

Memory is what the driver reports (a few per cent below the name); peaks are in reporting/mfu.py with their sources.
"""

from __future__ import annotations

import difflib

from memo_runtime.errors import ArgumentError
from memo_runtime.machines.machine import Machine, Shares
from memo_runtime.reporting.mfu import peak_flops
from memo_runtime.units import MiB

_HOPPER = Shares(
    matmul=0.73, attention_forward=0.57, attention_backward=0.54, elementwise=0.8, attention_far=0.52,
    source="shares measured on one H100 SXM: matrix products 700 to 755 TFLOP/s, cuDNN causal attention forward 640 "
    "over 32,768 tokens, 513 over 524,288, and 537 backward",
)  # fmt: skip
_AMPERE = Shares(
    matmul=0.72, attention_forward=0.6, attention_backward=0.52, elementwise=0.8,
    source="shares on A100 as published with FlashAttention-2 (causal, heads of 128: about 190 forward, 165 backward "
    "of 312 TFLOP/s); matrix products assumed like H100's",
)  # fmt: skip
_BLACKWELL = Shares(
    matmul=0.7, attention_forward=0.55, attention_backward=0.5, elementwise=0.8,
    source="shares assumed to be about H100's: not measured on this GPU",
)  # fmt: skip
_CONSUMER = Shares(
    matmul=0.85, attention_forward=0.7, attention_backward=0.6, elementwise=0.85,
    source="shares assumed: consumer cards reach more of their lower peak; not measured on this GPU",
)  # fmt: skip

#: What PCIe links of a generation give one GPU alone: 16 lanes, with the protocol's overhead.
_GEN4 = 25e9
_GEN5 = 55e9
_GEN4_SOURCE = "PCIe 4.0 x16: 25 GB/s of 31.5 reached"
_GEN5_SOURCE = "PCIe 5.0 x16: 54.7 GB/s measured on one H100 (benchmarks/results/links_h100.jsonl)"
_ALONE = "all GPUs of a node copying at once are assumed not to share a switch"


def _machine(
    name: str,
    device: str,
    memory_mib: int,
    *,
    memory_rate: float,
    links: tuple[float, float, float],
    shares: Shares,
    sources: tuple[str, ...],
) -> Machine:
    """``links``: (host link alone, host link when all copy, between GPUs)."""
    peak = peak_flops(device)
    assert peak is not None, f"{device} has a peak"
    return Machine(
        name=name,
        device=device,
        memory_bytes=memory_mib * MiB,
        peak_flops=peak.flops,
        memory_rate=memory_rate,
        link_rate=links[0],
        shared_link_rate=links[1],
        gpu_rate=links[2],
        shares=shares,
        sources=(f"dense bf16 peak: {peak.source}", shares.source, *sources),
    )


_NVLINK3 = "NVLink 3: 300 GB/s each way (A100 data sheet)"
_NVLINK4 = "NVLink 4: 450 GB/s each way (H100 data sheet)"
_A800_LINK = (
    "A800 nodes as in MEMO (arXiv 2407.12117): NVLink 200 GB/s each way, and 12 GB/s to the host per GPU when all "
    "eight copy, inferred from the paper's crossover at 192K tokens"
)
_SHARED = "two GPUs share a PCIe switch (DGX A100)"
_PCIE_ONLY = "no NVLink: GPUs talk over PCIe"

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _machine(
            "a800-80gb", "NVIDIA A800-SXM4-80GB", 81251, memory_rate=2039e9, links=(_GEN4, 12e9, 200e9),
            shares=_AMPERE, sources=("HBM 2,039 GB/s (A100 80GB data sheet)", _GEN4_SOURCE, _A800_LINK),
        ),
        _machine(
            "a100-40gb", "NVIDIA A100-SXM4-40GB", 40536, memory_rate=1555e9, links=(_GEN4, _GEN4 / 2, 300e9),
            shares=_AMPERE,
            sources=("HBM 1,555 GB/s (A100 data sheet)", _GEN4_SOURCE, _NVLINK3, _SHARED),
        ),
        _machine(
            "a100-80gb", "NVIDIA A100-SXM4-80GB", 81251, memory_rate=2039e9, links=(_GEN4, _GEN4 / 2, 300e9),
            shares=_AMPERE,
            sources=("HBM 2,039 GB/s (A100 data sheet)", _GEN4_SOURCE, _NVLINK3, _SHARED),
        ),
        _machine(
            "h100-80gb", "NVIDIA H100 80GB HBM3", 81079, memory_rate=3352e9, links=(_GEN5, _GEN5, 450e9),
            shares=_HOPPER, sources=("HBM 3,352 GB/s (H100 SXM data sheet)", _GEN5_SOURCE, _NVLINK4, _ALONE),
        ),
        _machine(
            "h200-141gb", "NVIDIA H200", 143156, memory_rate=4800e9, links=(_GEN5, _GEN5, 450e9),
            shares=_HOPPER, sources=("HBM 4,800 GB/s (H200 data sheet)", _GEN5_SOURCE, _NVLINK4, _ALONE),
        ),
        _machine(
            "b200-180gb", "NVIDIA B200", 183359, memory_rate=7700e9, links=(_GEN5, _GEN5, 900e9), shares=_BLACKWELL,
            sources=("HBM 7,700 GB/s (HGX B200 data sheet)", _GEN5_SOURCE, "NVLink 5: 900 GB/s each way", _ALONE),
        ),
        _machine(
            "rtx-3090", "NVIDIA GeForce RTX 3090", 24576, memory_rate=936e9, links=(_GEN4, _GEN4, _GEN4),
            shares=_CONSUMER, sources=("GDDR6X 936 GB/s (GA102 whitepaper)", _GEN4_SOURCE, _PCIE_ONLY),
        ),
        _machine(
            "rtx-4090", "NVIDIA GeForce RTX 4090", 24564, memory_rate=1008e9, links=(_GEN4, _GEN4, _GEN4),
            shares=_CONSUMER, sources=("GDDR6X 1,008 GB/s (Ada whitepaper)", _GEN4_SOURCE, _PCIE_ONLY),
        ),
        _machine(
            "rtx-5090", "NVIDIA GeForce RTX 5090", 32607, memory_rate=1792e9, links=(_GEN5, _GEN5, _GEN5),
            shares=_CONSUMER, sources=("GDDR7 1,792 GB/s (Blackwell RTX whitepaper)", _GEN5_SOURCE, _PCIE_ONLY),
        ),
    )
}  # fmt: skip


def find_machine(name: str) -> Machine:
    """The machine called ``name``; a name without its memory is enough where it is the only one.

    Raises:
        ArgumentError: no such machine, or several; names those that are near.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in MACHINES:
        return MACHINES[wanted]
    longer = [known for known in MACHINES if known.startswith(f"{wanted}-")]
    if len(longer) == 1:
        return MACHINES[longer[0]]
    near = longer or difflib.get_close_matches(wanted, MACHINES, n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ArgumentError(f"GPU {name!r} is unknown: {meant}there are {', '.join(MACHINES)}")
