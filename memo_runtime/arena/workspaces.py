"""Workspaces of cuBLAS in segments of their own, made before a step has filled the cache.

PyTorch allocates one (32 MiB on a Hopper) in the first product of each thread on each stream, and keeps it where it is.
Made in the middle of a step it takes the front of whatever large segment is free, which can then never be given back:

    segment  [ workspace |              free              ]

Training has two such threads: that of the forward, and autograd's for the device.
"""

from __future__ import annotations

import logging

import torch
from torch.nn.functional import linear

logger = logging.getLogger("memo_runtime")

_SIZE = 16


def make_workspaces(device: int) -> None:
    """Make those of the current stream of CUDA device ``device``, by a product forward and backward.

    Where that fails, they come in the step as they would have.
    """
    if not torch.cuda.is_initialized():
        return
    torch.cuda.empty_cache()  # a segment that is cached would be taken
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            factor = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=f"cuda:{device}", requires_grad=True)
            # With a bias: cuBLAS's other interface, which may have workspaces of its own.
            result = linear(factor, factor, factor[0])
            torch.autograd.grad(result, factor, torch.ones_like(result))
    except RuntimeError as error:
        logger.info("memo: no workspace of cuBLAS was made before the first step: %s", error)
