"""Model FLOPs and MFU: the share of a device's peak that training a model keeps busy.

MFU counts what the model needs and nothing that is done twice: recomputed FLOPs make a step longer, not more
useful. They are reported apart, as HFU. With N parameters that take part in matmuls (without the embedding
table, with the head), S tokens, L layers and d the width of attention (heads times head size), one sequence
costs, forward and backward together,

    6 N S  +  6 L d S^2        causal attention; 12 L d S^2 where every token sees every other

since each parameter and token is one multiplication and one addition in forward and two of each in backward,
and attention is two S x S x d matmuls per layer, half of which a causal mask leaves out. Parameters that are
frozen, as those beside adapters, have no gradient of their own: 4 N S for their part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeakFlops:
    """Dense bf16 peak of one device in FLOP/s, accumulating in fp32, and where the number is from."""

    pattern: str
    flops: float
    source: str


# Data sheets quote tensor peaks with 2:4 sparsity; these are without, half of that. The first pattern that
# matches the driver's name for the device counts, so special versions stand before the common one.
PEAKS = (
    PeakFlops(r"\bGB[23]00\b", 2500e12, "NVIDIA GB200/GB300 NVL72 data sheet, 5 PFLOP/s with sparsity"),
    PeakFlops(r"\bB[23]00\b", 2250e12, "NVIDIA HGX B200/B300 data sheet, 4.5 PFLOP/s with sparsity"),
    PeakFlops(r"\bB100\b", 1750e12, "NVIDIA Blackwell architecture brief, 3.5 PFLOP/s with sparsity"),
    PeakFlops(r"\bGH200\b", 989.4e12, "NVIDIA GH200 data sheet, 1,979 TFLOP/s with sparsity"),
    PeakFlops(r"\bH[128]00 NVL\b", 835.5e12, "NVIDIA H100/H200 NVL data sheet, 1,671 with sparsity"),
    PeakFlops(r"\bH[18]00 PCIe\b", 756.5e12, "NVIDIA H100 PCIe data sheet, 1,513 with sparsity"),
    PeakFlops(r"\bH[128]00\b", 989.4e12, "NVIDIA H100/H200 SXM data sheet, 1,979 with sparsity"),
    PeakFlops(r"\bH20\b", 148e12, "NVIDIA H20 data sheet"),
    PeakFlops(r"\bA[18]00\b", 312e12, "NVIDIA A100 data sheet (SXM and PCIe alike)"),
    PeakFlops(r"\bA30\b", 165e12, "NVIDIA A30 data sheet"),
    PeakFlops(r"\bA40\b", 149.7e12, "NVIDIA A40 data sheet"),
    PeakFlops(r"\bA10G\b", 70e12, "AWS G5 instance page, 70 TFLOP/s dense"),
    PeakFlops(r"\bA10\b", 125e12, "NVIDIA A10 data sheet"),
    PeakFlops(r"\bL40S\b", 362e12, "NVIDIA L40S data sheet, 362.05 dense"),
    PeakFlops(r"\bL40\b", 181e12, "NVIDIA L40 data sheet"),
    PeakFlops(r"\bL4\b", 121e12, "NVIDIA L4 data sheet, 242 with sparsity"),
    PeakFlops(r"\bRTX 6000 Ada\b", 364.2e12, "NVIDIA RTX 6000 Ada data sheet, 1,457 for FP8 with sparsity"),
    PeakFlops(r"\bRTX A6000\b", 154.8e12, "NVIDIA Ampere GA102 whitepaper, 309.7 with sparsity"),
    PeakFlops(r"\bRTX 5090$", 209.5e12, "NVIDIA Blackwell RTX whitepaper, FP32 accumulation"),
    PeakFlops(r"\bRTX 5080$", 112.6e12, "NVIDIA Blackwell RTX whitepaper, FP32 accumulation"),
    PeakFlops(r"\bRTX 4090$", 165.2e12, "NVIDIA Ada whitepaper, FP32 accumulation"),
    PeakFlops(r"\bRTX 4080$", 97.5e12, "NVIDIA Ada whitepaper, FP32 accumulation"),
    PeakFlops(r"\bRTX 3090$", 71e12, "NVIDIA Ampere GA102 whitepaper, FP32 accumulation"),
    PeakFlops(r"\bMI355X\b", 2500e12, "AMD Instinct MI355X data sheet"),
    PeakFlops(r"\bMI3(00|25)X\b", 1307.4e12, "AMD Instinct MI300X/MI325X data sheets"),
    PeakFlops(r"\bMI250X\b", 191.5e12, "AMD Instinct MI250X data sheet, one of its two dies"),
)

#: A slice of a device, or a device under a lower power limit, has another peak than its name says.
_OTHER_PEAK = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b", re.IGNORECASE)


def peak_flops(device_name: str) -> PeakFlops | None:
    """Dense bf16 peak of the device with this name (as the driver gives it); None where it is unknown."""
    if _OTHER_PEAK.search(device_name):
        return None
    return next((peak for peak in PEAKS if re.search(peak.pattern, device_name.strip())), None)


def model_flops(
    *,
    parameters: int,
    frozen: int = 0,
    layers: int,
    attention_width: int,
    tokens: int,
    sequences: int = 1,
    causal: bool = True,
) -> int:
    """FLOPs of one training step on ``sequences`` sequences of ``tokens`` tokens, nothing counted twice.

    ``parameters`` leaves out the embedding table and includes the head, tied or not; ``attention_width`` is
    the number of query heads times their size. ``frozen`` are those of ``parameters`` that are not trained.
    """
    attention = (6 if causal else 12) * layers * attention_width * tokens * tokens
    return sequences * ((6 * parameters - 2 * frozen) * tokens + attention)


def utilization(flops: float, seconds: float, device_name: str, *, devices: int = 1) -> float | None:
    """``flops`` done in ``seconds`` as a share of the peak of ``devices`` devices; None if that is unknown.

    Given model FLOPs this is MFU; given model and recomputed FLOPs together it is HFU.
    """
    peak = peak_flops(device_name)
    if peak is None or seconds <= 0:
        return None
    return flops / seconds / (peak.flops * devices)
