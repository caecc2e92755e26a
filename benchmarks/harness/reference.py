"""What gradients are compared with: the same model on the same batch in a wider dtype, by plain PyTorch.

Weights and batch are made in the run's dtype and widened, so the distance of a contender's gradients is all that its
arithmetic has lost. Blocks are under a checkpoint, which repeats the same arithmetic, and the loss has its logits in
full. Attention has a key head for each query head: no kernel for wide numbers takes fewer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness.contenders.base import replace_forwards
from benchmarks.harness.contenders.checkpoint import checkpointed
from benchmarks.harness.job import WIDER, Job
from benchmarks.harness.sketch import encode, norm, sketch
from benchmarks.harness.subject import Subject

logger = logging.getLogger("benchmarks")

#: FLOPs of a step that is affordable: about a minute.
_AFFORDABLE = {"cuda": 1e15, "cpu": 2e12}
_ATTENTION = "harness_reference"


def refer(job: Job) -> dict[str, Any] | None:
    """Norm and sketch of the gradients of ``job``'s first length; None, and a warning: it is not affordable."""
    (tokens,), settings = job.lengths, job.settings
    subject = Subject(replace(settings, attention="auto"), longest=tokens, attention=_registered())
    if subject.shape.model_flops(tokens) > _AFFORDABLE[subject.device.type]:
        logger.warning("%s tokens in %s take too long: unwrapped is the reference", tokens, WIDER[settings.dtype])
        return None
    dtype = getattr(torch, WIDER[settings.dtype])
    subject.model.to(dtype)
    replace_forwards(subject.layers, lambda forward: partial(checkpointed, forward))
    batch = tuple(
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one
        for one in subject.batch(tokens)
    )
    facts: dict[str, Any] = {"status": "ok", "seq_len": tokens, "rehearsed": False}
    facts["details"] = {"dtype": WIDER[settings.dtype]}
    began = time.perf_counter()

    def look(gradients: Mapping[str, torch.Tensor]) -> None:
        facts["gradient_norm"] = norm(gradients.values())
        facts["gradient_sketch"] = encode(sketch(gradients))

    subject.backward((batch[0], batch[1]), look)
    return facts | {"first_step_seconds": time.perf_counter() - began}


def _registered() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    return _ATTENTION


def _attention(
    module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **options: Any
) -> tuple[torch.Tensor, None]:
    if mask is not None:
        raise ValueError("the reference knows causal attention only, and this model has a mask")
    shared = query.shape[1] // key.shape[1]
    keys, values = (one.repeat_interleave(shared, dim=1) for one in (key, value))
    found = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=options.get("scaling"))
    return found.transpose(1, 2).contiguous(), None
