"""Blocks by tiles against the kernels that they cannot do without, on one GPU, in one process.

    python -m benchmarks.tiled_probe                         # llama-8b, 4 blocks, 65,536 and 131,072 tokens
    python -m benchmarks.tiled_probe --ways kernels,alpha0   # fewer ways

Ways: ``kernels`` (alone), ``selective`` (checkpointing that saves attention), ``alpha0``, ``alpha0.5`` and ``alpha1``
(that share of tiles keeps its products), ``host0`` and ``host1`` (the same with inputs and attention results in host
memory, those of the last block aside).

Prints one line per way and length: seconds (median of the steady steps), share of the speed of kernels alone, peak of
allocated memory. A probe: rows for figures come from the harness.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.harness.contenders import CONTENDERS
from benchmarks.harness.contenders.base import Contender, Training
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job, Settings
from benchmarks.harness.memory import release
from memo_runtime.execution.compilers import compiled, run_eagerly
from memo_runtime.execution.install import install_forward, original_forward
from memo_runtime.execution.stash import Tools
from memo_runtime.execution.tiled import TiledBlock
from memo_runtime.execution.tiled_cache import ProgramCache
from memo_runtime.execution.tiled_swap import TiledSwap

_WARM = 2
_HOST_LIMIT = 96 << 30


class Tiled(Training):
    """Every block by tiles; ``alpha``: share of tiles whose products are kept; ``host``: with swap."""

    def __init__(self, job: Job, *, alpha: float, host: bool, options: argparse.Namespace) -> None:
        self.alpha, self.host, self.tile = alpha, host, options.tile
        self.programs = ProgramCache(run_eagerly if options.eager else compiled)
        self.blocks: list[TiledBlock] = []
        self.swap: TiledSwap | None = None
        super().__init__(job)

    def install(self) -> None:
        """Put tiles in place of every block's forward."""
        if self.host:
            tools = Tools(self.device, _HOST_LIMIT)
            self.swap = TiledSwap(self.device, tools.pool, tools.engine)
        for number, layer in enumerate(self.subject.layers, start=1):
            tiled = TiledBlock(
                layer,
                tile=self.tile,
                alpha=self.alpha,
                programs=self.programs,
                forward=original_forward(layer),
                swap=self.swap,
                to_host=number < len(self.subject.layers),
            )
            install_forward(layer, tiled)
            self.blocks.append(tiled)

    def start(self, tokens: int) -> None:
        """Pin what the swapped blocks need: x, o and the log-sum-exp, with room for alignment."""
        super().start(tokens)
        if self.swap is not None:
            shape = self.subject.shape
            block = tokens * (2 * shape.hidden * 2 + shape.heads * 4) + 2**20
            self.swap.pool.reserve((shape.blocks - 1) * block)

    def details(self) -> dict[str, object]:
        """Kernels of attention, how many programs there are, and pinned GiB."""
        last = self.blocks[-1]
        found: dict[str, object] = {"attention": last.kernels}
        found["programs"] = len(self.programs)
        if self.swap is not None:
            found["host GiB"] = round(self.swap.pool.reserved / 2**30, 2)
        return found


def _ways(options: argparse.Namespace) -> dict[str, Callable[[Job], Contender]]:
    def tiled(alpha: float, *, host: bool = False) -> Callable[[Job], Contender]:
        return lambda job: Tiled(job, alpha=alpha, host=host, options=options)

    return {
        "kernels": CONTENDERS["kernels"],
        "selective": CONTENDERS["selective"],
        "alpha0": tiled(0.0),
        "alpha0.5": tiled(0.5),
        "alpha1": tiled(1.0),
        "host0": tiled(0.0, host=True),
        "host1": tiled(1.0, host=True),
    }


def _measure(contender: Contender, tokens: int, steps: int) -> tuple[float, float, float]:
    """(median seconds, seconds of the first step, peak GiB)."""
    device, cuda = contender.device, contender.device.type == "cuda"

    def step() -> float:
        started = time.perf_counter()
        contender.step()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    contender.start(tokens)
    first = step()
    for _ in range(_WARM - 1):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = statistics.median(step() for _ in range(steps))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    contender.finish()
    return seconds, first, peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--lengths", default="65536,131072")
    parser.add_argument("--ways", default="kernels,alpha0,alpha1,host0")
    parser.add_argument("--tile", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--attention", default="auto", help="kernel for selective; tiles and kernels choose their own")
    parser.add_argument("--eager", action="store_true", help="programs as they are, not through torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    lengths = tuple(sorted(int(text) for text in options.lengths.split(",")))
    settings = Settings(
        geometry=options.geometry, scope=Scope.BLOCKS, blocks=options.blocks, device=options.device,
        dtype="bfloat16", attention=options.attention,
    )  # fmt: skip
    base: dict[int, float] = {}
    print(f"{'way':<10} {'tokens':>8} {'seconds':>9} {'of kernels':>10} {'peak GiB':>9} {'first':>7}  details")
    for name in options.ways.split(","):
        contender = _ways(options)[name](Job(contender=name, settings=settings, lengths=lengths))
        for tokens in lengths:
            try:
                seconds, first, peak = _measure(contender, tokens, options.steps)
            except torch.OutOfMemoryError:
                contender.finish()
                print(f"{name:<10} {tokens:>8,} {'out of memory':>9}", flush=True)
                break
            if name == "kernels":
                base[tokens] = seconds
            share = f"{base[tokens] / seconds:.3f}" if tokens in base else "-"
            said = contender.details()
            print(
                f"{name:<10} {tokens:>8,} {seconds:>9.3f} {share:>10} {peak:>9.2f} {first:>7.1f}  {said}",
                flush=True,
            )
        device = contender.device
        del contender
        release(device)


if __name__ == "__main__":
    main()
