"""A sketch of all gradients: small enough for a row, and enough to tell how far two runs are apart.

Every element gets a random sign and is added to one of ``BUCKETS`` sums. Signs and sums depend on the seed, the
name and the position alone, so the sketches of two processes can be subtracted, and the length of the difference
estimates the L2 distance of the gradients themselves (standard error of its square: sqrt(2 / BUCKETS), 9 %).
Unlike a sample, no element is left out.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUCKETS = 256
#: Elements at a time, so that signs and products stay small beside a model.
_CHUNK = BUCKETS * 65536


def sketch(gradients: Mapping[str, torch.Tensor]) -> list[float]:
    """The sums, over all ``gradients``, in float64."""
    import torch

    device = next(iter(gradients.values())).device
    sums = torch.zeros(BUCKETS, dtype=torch.float64, device=device)
    for name, gradient in gradients.items():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        for chunk in gradient.detach().reshape(-1).split(_CHUNK):
            signs = torch.randint(0, 2, chunk.shape, generator=generator, device=device, dtype=torch.int8)
            signed = chunk.to(torch.promote_types(chunk.dtype, torch.float32)) * (signs * 2 - 1)
            padded = torch.nn.functional.pad(signed, (0, -signed.numel() % BUCKETS))
            sums += padded.view(-1, BUCKETS).sum(0, dtype=torch.float64)
    return [float(value) for value in sums.cpu()]


def norm(gradients: Iterable[torch.Tensor]) -> float:
    """L2 norm of all gradients together."""
    squares = [gradient.detach().float().square().sum().item() for gradient in gradients]
    return float(sum(squares) ** 0.5)


def encode(sums: list[float]) -> str:
    """As text for a row."""
    return base64.b64encode(struct.pack(f"<{len(sums)}d", *sums)).decode("ascii")


def decode(text: str) -> tuple[float, ...]:
    """The sums of ``encode``."""
    data = base64.b64decode(text)
    return struct.unpack(f"<{len(data) // 8}d", data)


def relative_difference(text: str, reference: str) -> float:
    """Estimated relative L2 distance of the gradients behind two sketches."""
    ours, theirs = decode(text), decode(reference)
    apart = sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
    return float((apart / sum(b**2 for b in theirs)) ** 0.5)
