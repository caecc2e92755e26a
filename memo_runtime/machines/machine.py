"""A machine: one GPU of a node, its links, and which share of its peaks training reaches.

Peaks are data-sheet figures. Shares are what kernels reach of them: measured where a source says so, else carried
over from a measured machine of the same kind, which the plan's notes repeat. All rates are per GPU and direction, in
bytes or FLOPs per second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Tokens between which attention's forward gets slower, evenly with their logarithm.
NEAR, FAR = 1 << 17, 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of the peak: what matrix products, attention and element-wise operators reach.


    ``attention_far``: what attention's forward falls to over ``FAR`` tokens or more, from its share at
    ``NEAR`` or fewer; None: that is not known, and it does not.
    """

    matmul: float
    attention_forward: float
    attention_backward: float
    elementwise: float
    source: str
    attention_far: float | None = None

    def attention(self, tokens: int, *, backward: bool) -> float:
        """The share of attention over ``tokens`` tokens."""
        if backward or self.attention_far is None:
            return self.attention_backward if backward else self.attention_forward
        way = (math.log(max(tokens, NEAR)) - math.log(NEAR)) / (math.log(FAR) - math.log(NEAR))
        return self.attention_forward + min(1.0, way) * (self.attention_far - self.attention_forward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One kind of GPU in one kind of node.

    Attributes:
        name: what users call it. device: what the driver calls it. memory_bytes: what the driver reports as total.
        peak_flops: dense bf16. memory_rate: of HBM.
        link_rate: to host memory and back, of one GPU alone. shared_link_rate: when all GPUs of a node copy at once.
        gpu_rate: between GPUs of a node (NVLink, else PCIe).
        sources: who says so, one text per figure.
    """

    name: str
    device: str
    memory_bytes: int
    peak_flops: float
    memory_rate: float
    link_rate: float
    shared_link_rate: float
    gpu_rate: float
    shares: Shares
    sources: tuple[str, ...]

    def link_of(self, gpus: int) -> float:
        """Link rate of each of ``gpus`` that copy at the same time."""
        return self.link_rate if gpus == 1 else self.shared_link_rate
