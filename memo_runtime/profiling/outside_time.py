"""Seconds of what lies outside the blocks: embeddings, the final norm, the head and the loss, forward and backward.

They are run on as many tokens as are affordable before the first step, one behind the other, as in a step. What they
are given is like what a norm yields, and targets and tokens are random: products of numbers that are small or alike,
as the first hidden states of a fresh model are, draw less power, and a GPU at its power limit runs them faster.

Nothing of the model runs here, but its weights: a forward of the user's might write, count or draw.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.final_norm import final_norm
from memo_runtime.blocks.stopwatch import typical
from memo_runtime.losses import liger, linear_cross_entropy, tiles
from memo_runtime.profiling.growth import fit_seconds, times
from memo_runtime.profiling.outside import around_blocks, heads_of
from memo_runtime.records import BlockProfile, Growth

logger = logging.getLogger("memo_runtime")

#: Most tokens on which they are timed.
_MOST_TOKENS = {"cuda": 8192, "cpu": 256}
#: Where embeddings are timed: a gradient as large as the table takes a processor a second.
_EMBEDDINGS_ON = ("cuda",)
#: What can be multiplied.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Run = Callable[[], object]
#: A run on so many tokens.
_Make = Callable[[int], _Run]


def outside_seconds(
    model: nn.Module, profiles: Sequence[BlockProfile], rows: int, hidden: torch.Tensor | None, *, tiled_loss: bool
) -> Growth:
    """Seconds of all that by tokens of one of ``rows`` sequences.

    ``hidden``, the input of the first block, says on how many tokens it is timed at most, and of which kind. Head and
    loss are timed where the runtime itself runs them, by tiles; otherwise, and where the head cannot be run alone, it
    is taken to run at the rate that the blocks' own products reached.
    """
    heads = list(heads_of(model, profiles))
    measured, with_loss = Growth(), False
    if hidden is not None and hidden.is_floating_point():
        around = _around(model, profiles, hidden)
        head = max(heads, key=lambda linear: linear.out_features, default=None) if tiled_loss else None
        loss = None if head is None or not _fits(head, hidden) else partial(_head_and_loss, head, like=hidden)
        points, makes = _timed([*around, *([] if loss is None else [loss])], hidden)
        with_loss = loss is not None and loss in makes
        measured = times(fit_seconds(points, curved=False), Fraction(rows))
    if with_loss:
        return measured
    guessed = _at_the_rate_of_blocks(heads, profiles, rows)
    return Growth(constant=measured.constant, linear=measured.linear + guessed)


def _timed(makes: Sequence[_Make], like: torch.Tensor) -> tuple[list[tuple[int, float]], list[_Make]]:
    """(seconds of a run of each of ``makes`` by tokens, those that can be run)."""
    most = min(_MOST_TOKENS.get(like.device.type, _MOST_TOKENS["cpu"]), like.numel() // like.shape[-1])
    points: list[tuple[int, float]] = []
    for tokens in sorted({max(1, most // 2), most}):
        if not points:
            makes = [make for make in makes if _runs(make, tokens)]
        try:
            runs = [make(tokens) for make in makes]
            points.append((tokens, sum(typical(runs, like.device, range(len(runs)))) if runs else 0.0))
        except torch.OutOfMemoryError as error:
            logger.info("memo: what is around the blocks is not timed on %s tokens: %s", f"{tokens:,}", error)
    return points, list(makes)


def _at_the_rate_of_blocks(heads: Sequence[nn.Linear], profiles: Sequence[BlockProfile], rows: int) -> float:
    """Seconds of the products of ``heads`` for a token."""
    timed = [p for p in profiles if p.timed_tokens and p.forward_seconds.exact(p.timed_tokens) > 0]
    if not timed:
        return 0.0
    flops = timed[0].forward_flops.exact(timed[0].timed_tokens)
    seconds = timed[0].forward_seconds.exact(timed[0].timed_tokens)
    weights = sum(head.in_features * head.out_features for head in heads)
    return 6 * rows * weights * seconds / max(flops, 1.0)


def _around(model: nn.Module, profiles: Sequence[BlockProfile], like: torch.Tensor) -> Iterator[_Make]:
    """Runs of the embeddings and of the final norm."""
    for module in around_blocks(model, profiles) if like.device.type in _EMBEDDINGS_ON else ():
        if isinstance(module, nn.Embedding) and _weight(module, like) is not None:
            yield partial(_embedding, module, like=like)
    norm = final_norm(model, [profile.name for profile in profiles])
    weight = None if norm is None else _weight(norm, like)
    if weight is not None and tuple(weight.shape) == like.shape[-1:]:
        yield partial(_norm, weight, like=like)


def _weight(module: nn.Module, like: torch.Tensor) -> torch.Tensor | None:
    """Its weight, without hooks; None: it is sharded, freed, quantised, or made of others at each call."""
    weight = module._parameters.get("weight")
    usable = (
        weight is not None
        and not hasattr(weight, "_local_tensor")
        and weight.dtype in _DTYPES
        and weight.device == like.device
        and weight.untyped_storage().nbytes() > 0
    )
    return weight.detach().requires_grad_(weight.requires_grad) if usable and weight is not None else None


def _runs(make: _Make, tokens: int) -> bool:
    """Whether such a run does; where it does not, it has no room beside the model, or its weights are odd."""
    try:
        make(tokens)()
    except torch.OutOfMemoryError as error:
        logger.info("memo: a part of what is around the blocks is not timed: %s", error)
        return False
    except Exception as error:
        pass_on(error)
        logger.info("memo: a part of what is around the blocks is not timed: %s", error)
        return False
    return True


def _normal(*shape: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As behind a norm; PyTorch's own generators stay where they are."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty(shape, dtype=dtype, device=like.device).normal_(generator=generator)


def _classes(tokens: int, count: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randint(count, (tokens,), device=like.device, generator=generator)


def _gradients(made: torch.Tensor, wanted: Sequence[torch.Tensor], tangent: torch.Tensor | None = None) -> None:
    wanted = [tensor for tensor in wanted if tensor.requires_grad]
    if wanted:
        torch.autograd.grad(made, wanted, tangent)


def _embedding(module: nn.Embedding, tokens: int, like: torch.Tensor) -> _Run:
    weight = _weight(module, like)
    assert weight is not None, "it was there"
    ids = _classes(tokens, weight.shape[0], like)
    tangent = _normal(tokens, weight.shape[1], like=like, dtype=weight.dtype)

    def run() -> None:
        with torch.enable_grad():
            # Without ``max_norm``, which writes to the weight.
            _gradients(functional.embedding(ids, weight, sparse=module.sparse), [weight], tangent)

    return run


def _norm(weight: torch.Tensor, tokens: int, like: torch.Tensor) -> _Run:
    """As Hugging Face's RMSNorm, which works in float32 and takes the most of those that there are."""
    hidden = _normal(1, tokens, like.shape[-1], like=like, dtype=weight.dtype).requires_grad_()
    tangent = hidden.detach().flip(-1)

    def run() -> None:
        with torch.enable_grad():
            wide = hidden.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            _gradients(weight * wide.to(hidden.dtype), [hidden, weight], tangent)

    return run


def _fits(head: nn.Linear, like: torch.Tensor) -> bool:
    """Whether ``head`` can be run alone on such states."""
    weight = _weight(head, like)
    return weight is not None and tuple(weight.shape) == (head.out_features, like.shape[-1])


def _head_and_loss(head: nn.Linear, tokens: int, like: torch.Tensor) -> _Run:
    weight, bias = _weight(head, like), None if head.bias is None else head.bias.detach()
    assert weight is not None, "it was there"
    # Whoever runs it at the whole length: a short one may be another's.
    at_once = (like.numel() // head.in_features, head.in_features, head.out_features, weight.dtype)
    backend = "auto" if liger.chunk_bytes(*at_once) <= tiles.largest_bytes(*at_once[2:]) else "tiled"
    hidden = _normal(tokens, head.in_features, like=like, dtype=weight.dtype).requires_grad_()
    target = _classes(tokens, head.out_features, like)

    def run() -> None:
        with torch.enable_grad():
            _gradients(linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend), [hidden, weight])

    return run
