"""What gradients are compared with: the same model on the same batch in a wider dtype, by plain PyTorch.

Weights and batch are made in the run's dtype and widened, so the distance of a contender's gradients is all that its
arithmetic has lost. Blocks are under a checkpoint, which repeats the same arithmetic, and the loss has its logits in
full. Attention has a key head for each query head: no kernel for wide numbers takes fewer. Where the model has a mask,
as for windows, it is transformers' own, and attention goes by chunks of queries, with the keys that they see.

Plain PyTorch in the run's own dtype is one step of the same process: how far that is from the reference is what
rounding does to this model, in whatever order contenders run. Where no wider dtype is affordable it is the reference.
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
from benchmarks.harness.geometry import UnknownGeometryError
from benchmarks.harness.job import WIDER, Job
from benchmarks.harness.memory import release
from benchmarks.harness.sketch import encode, norm, relative_difference, sketch
from benchmarks.harness.subject import Subject
from memo_runtime.rehearsal.failure import ran_out

logger = logging.getLogger("benchmarks")

#: FLOPs of a step that is affordable: about a minute.
_AFFORDABLE = {"cuda": 1e15, "cpu": 2e12}
_ATTENTION = "harness_reference"
#: Queries at a time where there is a mask.
_ROWS = 1024
#: Options of attention that are arithmetic, and that the reference does not do; ``sdpa`` refuses the first two itself.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def refer(job: Job) -> dict[str, Any] | None:
    """Norm and sketch of the gradients of ``job``'s first length; None, and a warning: it is not affordable.

    ``details`` has their dtype and, of a wider one, how far plain PyTorch in the run's dtype is from it (``rounding``).

    Raises:
        UnknownGeometryError: no contender could be measured either.
    """
    (tokens,), dtype = job.lengths, job.settings.dtype
    subject = Subject(job.settings, longest=job.model_length)
    wider = WIDER.get(dtype) if job.wider else None
    if wider is not None and subject.shape.model_flops(tokens) > _AFFORDABLE[subject.device.type]:
        logger.warning("%s tokens in %s take too long: unwrapped is the reference", tokens, wider)
        wider = None
    if wider is None and not job.plain:
        return None
    plain = _plain(subject, tokens, needed=wider is None)
    device = subject.device
    del subject
    release(device)
    if wider is None:
        return plain
    try:
        found = _wide(job, tokens, wider)
    except Exception as error:
        if plain is None or not ran_out(error):
            raise
        logger.warning("%s tokens in %s do not fit: unwrapped is the reference", tokens, wider)
        plain["details"]["wider"] = f"{type(error).__name__}: {str(error)[:200]}"
        return plain
    if plain is not None:
        found["details"]["rounding"] = relative_difference(plain["gradient_sketch"], found["gradient_sketch"])
    return found


def _plain(subject: Subject, tokens: int, *, needed: bool) -> dict[str, Any] | None:
    """The step of plain PyTorch with the run's attention; where it is not ``needed`` and fails: None, and a warning."""
    try:
        subject.tile_loss()
        return _gradients(subject, subject.batch(tokens), tokens) | {"details": {"dtype": subject.settings.dtype}}
    except Exception as error:
        if needed:
            raise
        logger.warning("plain PyTorch in %s does not run here: %s", subject.settings.dtype, error)
        return None


def _wide(job: Job, tokens: int, wider: str) -> dict[str, Any]:
    settings, dtype = replace(job.settings, attention="auto"), getattr(torch, wider)
    subject = Subject(settings, longest=job.model_length, attention=_registered())
    subject.model.to(dtype)
    plain_experts(subject.model)
    batch = tuple(
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one
        for one in subject.batch(tokens)
    )
    return _gradients(subject, (batch[0], batch[1]), tokens) | {"details": {"dtype": wider}}


def plain_experts(model: torch.nn.Module) -> None:
    """Experts one after the other: the grouped product that transformers take for them knows no float64."""
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"


def _gradients(subject: Subject, batch: tuple[torch.Tensor, torch.Tensor], tokens: int) -> dict[str, Any]:
    replace_forwards(subject.layers, lambda forward: partial(checkpointed, forward))
    facts: dict[str, Any] = {"status": "ok", "seq_len": tokens, "rehearsed": False}
    began = time.perf_counter()

    def look(gradients: Mapping[str, torch.Tensor]) -> None:
        facts["gradient_norm"] = norm(gradients.values())
        facts["gradient_sketch"] = encode(sketch(gradients))

    subject.backward(batch, look)
    return facts | {"first_step_seconds": time.perf_counter() - began}


def _registered() -> str:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(_ATTENTION, _attention)
    # Attention without a function for its masks would be given none, whatever the model's windows are.
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return _ATTENTION


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if unknown or (mask is None and not causal) or (mask is not None and mask.dtype != torch.bool):
        what = unknown[0] if unknown else "attention that is not causal" if mask is None else f"a mask of {mask.dtype}"
        raise UnknownGeometryError(f"this model has {what}: the reference knows causal attention and boolean masks")
    shared = query.shape[1] // key.shape[1]
    keys, values = (one.repeat_interleave(shared, dim=1) for one in (key, value))
    scale = options.get("scaling")
    if mask is None:
        found = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    else:
        parts = [
            _masked(rows, keys, values, seen, scale)
            for rows, seen in zip(query.split(_ROWS, dim=2), mask.split(_ROWS, dim=2), strict=True)
        ]
        found = torch.cat(parts, dim=2)
    return found.transpose(1, 2).contiguous(), None


def _masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention of some queries, to those keys that one of them sees."""
    there = mask.flatten(0, 2).any(dim=0).nonzero()
    part = slice(int(there[0]), int(there[-1]) + 1)
    return scaled_dot_product_attention(
        query, keys[:, :, part], values[:, :, part], attn_mask=mask[..., part], scale=scale
    )
