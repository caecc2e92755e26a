"""Measures the head and its loss on a GPU: all logits at once against tiles; appends one row per contender and length.

    python -m benchmarks.head_loss --out benchmarks/results/head_loss_h100.jsonl --commit HASH

Forward and backward of the head of ``llama-1b-d128`` (D 2048, V 128,256), bf16 operands. The floor is three matmuls,
``6*T*D*V`` FLOPs. ``grad_error`` is the relative L2 error of dX and dW together against float64, at 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memo_runtime as memo
from benchmarks.harness.provenance import gpu_facts, now, versions
from memo_runtime.losses.tiles import TILE_BYTES

HIDDEN, VOCABULARY = 2048, 128_256
LENGTHS = (8192, 32_768, 131_072)
ERROR_TOKENS = 2048
PEAK_FLOPS = 989.4e12

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What transformers does: logits upcast to float32, then cross entropy."""
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), target)


def tiled(tile: int | None) -> Loss:
    """memo's tiles of ``tile`` tokens; None is the default size."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return memo.linear_cross_entropy(hidden, weight, target, backend="tiled", tile=tile)

    return loss


def operands(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [T, D] and weight [V, D] in bf16 with grad, targets [T]."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, device="cuda", generator=generator) / HIDDEN**0.5).bfloat16()
    target = torch.randint(VOCABULARY, (tokens,), device="cuda", generator=generator)
    return hidden, weight.requires_grad_(), target


def gradients(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """dX and dW."""
    return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))


def error(loss: Loss) -> float:
    """Relative L2 error of both gradients together against float64."""
    hidden, weight, target = operands(ERROR_TOKENS)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = exact_hidden @ exact_weight.T
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), (exact_hidden, exact_weight))
    found = gradients(loss, hidden, weight, target)
    gap = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    return float((gap / sum(float(e.square().sum()) for e in exact)) ** 0.5)


def measure(loss: Loss, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds (median, p20, p80) and the peak above the operands; status ``oom`` where it does not fit."""
    hidden, weight, target = operands(tokens)
    before = torch.cuda.memory_allocated()
    seconds: list[float] = []
    try:
        for _ in range(steps + 2):
            torch.cuda.reset_peak_memory_stats()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            gradients(loss, hidden, weight, target)
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    except torch.cuda.OutOfMemoryError:
        return {"status": "oom"}
    steady = sorted(seconds[2:])
    quintiles = statistics.quantiles(steady, n=5)
    median = statistics.median(steady)
    return {
        "status": "ok",
        "step_seconds": median,
        "p20": quintiles[0],
        "p80": quintiles[3],
        "n": len(steady),
        "mfu": 6 * tokens * HIDDEN * VOCABULARY / median / PEAK_FLOPS,
        "peak_extra": torch.cuda.max_memory_allocated() - before,
    }


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file to append to")
    parser.add_argument("--commit", required=True, help="commit of the tree that runs")
    parser.add_argument("--steps", type=int, default=10, help="measured steps per row")
    options = parser.parse_args()
    default = TILE_BYTES["cuda"] // (2 * VOCABULARY) // 128 * 128
    contenders: dict[str, tuple[Loss, int | None]] = {"full-logits": (full_logits, None)}
    for tile in (default // 4, default // 2, default, default * 2, default * 4):
        contenders[f"memo-tiled-{tile}"] = (tiled(None if tile == default else tile), tile)
    provenance = {
        **gpu_facts(),
        "commit": options.commit,
        "date": now(),
        "versions": versions(),
    }
    for name, (loss, tile) in contenders.items():
        grad_error = error(loss)
        torch.cuda.empty_cache()
        for tokens in LENGTHS:
            row = {"run": "head_loss", "contender": name, "geometry": "llama-1b-d128", "seq_len": tokens, "tile": tile}
            row |= measure(loss, tokens, options.steps) | {"grad_error": grad_error, "budget": None} | provenance
            torch.cuda.empty_cache()
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = ("contender", "seq_len", "status", "step_seconds", "mfu", "peak_extra", "grad_error")
            print(*(row.get(key) for key in shown), flush=True)


if __name__ == "__main__":
    main()
