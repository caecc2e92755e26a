"""The sections of the table: which instances, which contenders, which limits.

A job is one contender on one instance. Jobs are listed instance by instance, so that a section that is cut
short has still seen every contender on the instances it came to.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.solver.contenders import Contender, bare_cpsat, memo, omnimalloc, timed
from benchmarks.solver.layered import bilevel, level1
from benchmarks.solver.programs import STREAM_FILLS, STYLES, program
from benchmarks.solver.refused import refused
from memo_solver import Problem
from memo_solver.instances import planted_packing
from memo_solver.pipelined import pipelined_trace
from memo_solver.sections import split
from memo_solver.training import training_trace
from tests.solver.test_fuzz import run as fuzz

CONTENDERS: dict[str, Contender] = {
    "memo_solver": memo,
    "cp-sat": bare_cpsat,
    "omnimalloc supermalloc": omnimalloc("supermalloc"),
    "omnimalloc omni": omnimalloc("omni"),
}
TRACES = ((20_000, 1), (20_000, 4), (30_000, 5), (40_000, 2), (50_000, 6), (60_000, 3))
PIPELINES = ((40, 32, False), (40, 32, True), (32, 64, True))
"""Layers and micro-batches of a pipeline's stage, and whether experts make sizes vary."""
BILEVEL_SECONDS = 3.0
"""Well below what a step may take, so that a machine that is busy keeps the promise too."""
STEPS = ((1, 0), (2, 0), (3, 0), (1, 20))
"""Seed of a layered step and how many of its requests wrap round the boundary."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One contender on one instance; `run` gives the row."""

    section: str
    group: str
    instance: str
    contender: str
    limit_seconds: float
    run: Callable[[], dict[str, Any]]
    number: int = 0
    """Place of the instance in its group, from 0."""

    @property
    def is_rival(self) -> bool:
        """Whether somebody else is measured."""
        return not self.contender.startswith("memo_solver")

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        """What makes two rows answers to the same question."""
        return self.section, self.group, self.instance, self.contender, self.limit_seconds


def jobs_of(section: str, num_seeds: int | None) -> list[Job]:
    """Jobs of a section, at most `num_seeds` seeds of each group."""
    return list(SECTIONS[section](num_seeds))


def _planted(
    section: str, box: tuple[int, int], sizes: tuple[int, int], seeds: int
) -> Callable[[int | None], Iterator[Job]]:
    def jobs(num_seeds: int | None) -> Iterator[Job]:
        for seed in range(min(seeds, num_seeds or seeds)):
            num_requests = random.Random(seed).randint(*sizes)

            def make(num_requests: int = num_requests, seed: int = seed) -> Problem:
                return planted_packing(num_requests, seed=seed, width=box[0], height=box[1])

            group = f"planted {sizes[0]} to {sizes[1]}, box {box[0]} x {box[1]}"
            yield from _tight(section, group, seed, make, 15.0)

    return jobs


def _compiler(num_seeds: int | None) -> Iterator[Job]:
    for seed in range(num_seeds or 2):
        for style in (*STYLES, *STREAM_FILLS):

            def make(style: str = style, seed: int = seed) -> Problem:
                return program(style, seed)

            yield from _tight("compiler", style, seed, make, 30.0)


def _tight(section: str, group: str, seed: int, make: Callable[[], Problem], limit: float) -> Iterator[Job]:
    for name, contender in CONTENDERS.items():

        def run(name: str = name, contender: Contender = contender) -> dict[str, Any]:
            problem = make()
            # CP-SAT is always told the height. memo_solver finds that of planted packings by itself, and is
            # asked whether a program fits; omnimalloc knows no such question.
            told = name == "cp-sat" or section == "compiler"
            result = timed(contender, problem if told else Problem(requests=problem.requests), limit)
            solved = result["peak"] == problem.capacity and result["seconds"] <= limit
            return {"num_requests": len(problem.requests), "capacity": problem.capacity, "solved": solved, **result}

        yield Job(
            section=section, group=group, instance=f"seed {seed}", contender=name, limit_seconds=limit, run=run,
            number=seed,
        )  # fmt: skip


def _traces(num_seeds: int | None) -> Iterator[Job]:
    makers: dict[str, Callable[[], Problem]] = {
        f"{num_requests} requests, seed {seed}": functools.partial(training_trace, num_requests, seed=seed)
        for num_requests, seed in TRACES[:num_seeds]
    }
    makers |= {
        f"1F1B, {layers} layers, {micro} micro-batches{', experts' if routed else ''}": functools.partial(
            pipelined_trace, layers, micro, seed=1, routed=routed
        )
        for layers, micro, routed in PIPELINES[:num_seeds]
    }
    for number, (label, make) in enumerate(makers.items()):
        for name, limit in (("memo_solver", 9.0), ("omnimalloc omni", 60.0)):

            def run(
                name: str = name, limit: float = limit, make: Callable[[], Problem] = make
            ) -> dict[str, Any]:
                problem = make()
                bound = max(max(s.loads()) * s.unit for s in split(problem))
                result = timed(CONTENDERS[name], problem, limit)
                waste = None if result["peak"] is None else result["peak"] / bound - 1
                return {"num_requests": len(problem.requests), "lower_bound": bound, "waste": waste, **result}

            yield Job(
                section="traces", group="trace", instance=label, contender=name, limit_seconds=limit, run=run,
                number=number,
            )  # fmt: skip


def _layered(num_seeds: int | None) -> Iterator[Job]:
    for seed, num_wrapping in STEPS[:num_seeds]:

        def run(seed: int = seed, num_wrapping: int = num_wrapping) -> dict[str, Any]:
            return bilevel(52_000, seed, num_wrapping, BILEVEL_SECONDS)

        label = f"80 layers, seed {seed}, {num_wrapping} wrapping"
        yield Job(
            section="layered", group="step", instance=label, contender="memo_solver bi-level",
            limit_seconds=BILEVEL_SECONDS, run=run,
        )  # fmt: skip
    for num_requests, seed in ((52_000, 1), (3_000, 2)):
        for number in (0, 1):

            def run_block(num_requests: int = num_requests, seed: int = seed, number: int = number) -> dict[str, Any]:
                return level1(num_requests, seed, number, 40.0)

            yield Job(
                section="layered", group="block", instance=f"block {'fb'[number]}0 of seed {seed}",
                contender="memo_solver and MIP", limit_seconds=40.0, run=run_block,
            )  # fmt: skip


def _refused(num_seeds: int | None) -> Iterator[Job]:
    seeds = num_seeds or 20
    yield Job(
        section="refused", group="one unit below the load", instance=f"{seeds} seeds", contender="memo_solver",
        limit_seconds=30.0, run=lambda: refused(seeds),
    )  # fmt: skip


def _fuzz(num_seeds: int | None) -> Iterator[Job]:
    num_files = 1000 * (num_seeds or 100)

    def run() -> dict[str, Any]:
        start = time.monotonic()
        num_read, num_refused = fuzz(0, num_files)  # raises at the first crash
        seconds = round(time.monotonic() - start, 1)
        return {"num_read": num_read, "num_refused": num_refused, "num_crashed": 0, "seconds": seconds}

    yield Job(
        section="fuzz", group="mutated files", instance=f"{num_files} mutated CSV and JSON files",
        contender="memo_solver readers", limit_seconds=180.0, run=run,
    )  # fmt: skip


SECTIONS: dict[str, Callable[[int | None], Iterator[Job]]] = {
    "refused": _refused,
    "fuzz": _fuzz,
    "layered": _layered,
    "traces": _traces,
    "planted-small": _planted("planted-small", (1000, 4096), (100, 200), 100),
    "planted-large": _planted("planted-large", (1000, 4096), (250, 300), 100),
    "planted-coarse": _planted("planted-coarse", (60, 100), (100, 200), 20),
    "compiler": _compiler,
}
