"""Training steps on PyTorch's allocator, with expandable segments, and by plan: one row each.

    python -m benchmarks.allocator --out benchmarks/results/allocator_h100.jsonl --commit HASH \\
        --geometry llama-8b --blocks 4 --lengths 64K --contenders checkpoint,selective --ways native,expandable,planned

Each has a process of its own. ``planned`` records three steps, plans the last, empties the cache and enables the plan;
the arena needs the allocator built (``python -m memo_runtime.allocator``). Peaks are those of the timed steps, so are
``retries`` (reorganisations), and ``device_allocs`` and ``device_frees`` (calls of the driver) a step. ``served_bytes``
and ``served_requests`` are shares of the timed steps; ``planned_requests_served`` is without the requests that the plan
leaves to PyTorch's allocator, ``reserved_over`` what is reserved over the arena and the bytes of those,
``host_seconds`` one allocation and its end. ``gradients_digest`` is over the sum of every gradient of one more step, in
float64.

Lengths such as 20000-128K are another one at every step, planned from a quarter and a half of the longest. What each
takes on an H200, estimated:

    --geometry llama-8b --blocks 4 --lengths 64K --contenders checkpoint                                       2 minutes
    --geometry llama-8b --blocks 4 --lengths 64K,128K --contenders selective,memo-replay,memo-tiled           18 minutes
    --geometry olmoe-1b-7b --blocks 4 --lengths 64K --contenders checkpoint                                    2 minutes
    --geometry llama-8b --blocks 4 --lengths 20000-128K --contenders checkpoint --steps 8                      4 minutes
    the same with --memory, 1 GiB above the arena and what is beside it in the row before                      4 minutes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job, Settings
from benchmarks.harness.memory import limit_memory
from benchmarks.harness.provenance import gpu_facts, now, versions
from benchmarks.harness.timing import percentiles
from memo_runtime.allocator.library import Counts
from memo_runtime.units import parse_bytes, parse_tokens

WAYS = ("native", "expandable", "planned")
_WARM, _SETTLE, _SOLVER_SECONDS = 2, 2, 10.0


def _timed(contender: Contender) -> float:
    begun = time.perf_counter()
    contender.step()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _enable(contender: Contender) -> dict[str, Any]:
    """Record, plan and enable; what the row says of the plan."""
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.arena.plan import enable, plan_arena
    from memo_runtime.recording.allocator import AllocatorRecorder
    from memo_runtime.traces.trace import Phase

    with AllocatorRecorder(measure=False) as recorder:
        for _ in range(3):
            recorder.begin(Phase.STEP)
            contender.step()
            recorder.end(Phase.STEP)
    plan = plan_arena(recorder.trace(), recorder.stream_handles, 0, seconds=_SOLVER_SECONDS, threads=None)
    enable(planned_allocator(), plan)
    return {
        "arena": plan.size, "bound": plan.lower_bound, "residents": plan.resident_bytes, "planned_requests":
        len(plan.rows), "plan_seconds": plan.seconds,
    }  # fmt: skip


def _fixed(contender: Contender, job: Job, way: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step of the one length, when it is steady, and what the row says of its plan."""
    from memo_runtime.allocator.library import planned_allocator

    contender.start(job.lengths[0])
    for _ in range(_WARM):
        contender.step()
    facts = _enable(contender) if way == "planned" else {}

    def one() -> float:
        if way != "planned":
            return _timed(contender)
        planned_allocator().begin_step(0)
        seconds = _timed(contender)
        planned_allocator().end_step(0)
        return seconds

    for _ in range(_SETTLE):
        one()
    return one, facts


def _varied(contender: Contender, job: Job, way: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """A step of another length each time, and what the row says of its plan; by the path that ``memo.wrap`` takes."""
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.arena.steps import PlannedSteps

    shortest, longest = job.lengths
    draw, notes = random.Random(0), []
    planned = PlannedSteps(planned_allocator(), 0, notes.append) if way == "planned" else None

    def step(tokens: int) -> float:
        contender.start(tokens)
        if planned is None:
            return _timed(contender)
        planned.begin("varied", tokens)
        seconds = _timed(contender)
        planned.end()
        return seconds

    # Two that are as they are, two that are recorded, and the longest, which is placed of those.
    quarter, half = max(shortest, longest // 4), max(shortest, longest // 2)
    for tokens in (quarter, quarter, quarter, half, longest, longest):
        step(tokens)
        if planned is not None:
            planned.wait()
    report = planned.report() if planned is not None else None
    facts: dict[str, Any] = {"notes": notes}
    if report is not None:
        facts |= {
            "arena": report.planned_peak, "bound": report.lower_bound, "residents": report.resident_bytes,
            "plans": report.plans,
        }  # fmt: skip
    return lambda: step(draw.randint(shortest, longest)), facts


def _host_seconds(way: str) -> float:
    """What one ``torch.empty`` of 3 MiB and its end take on the host: the least of 20 times 100."""
    from memo_runtime.allocator.library import planned_allocator

    size, times, allocator = 3 << 20, 100, planned_allocator() if way == "planned" else None
    if allocator is not None:
        stream = torch.cuda.current_stream().cuda_stream
        allocator.arm(0, [(2 * at, 2 * at + 1, size, 0, stream) for at in range(times)], size)
    found = []
    for _ in range(20):
        if allocator is not None:
            allocator.begin_step(0)
        begun = time.perf_counter()
        for _ in range(times):
            torch.empty(size, dtype=torch.uint8, device="cuda")
        found.append(time.perf_counter() - begun)
        if allocator is not None:
            allocator.end_step(0)
    return min(found) / times


def work(job: Job, way: str, steps: int) -> dict[str, Any]:
    """The measurement of one process."""
    from benchmarks.harness.contenders import CONTENDERS
    from memo_runtime.allocator.library import planned_allocator

    if job.settings.memory is not None:
        limit_memory(job.settings.memory, torch.device("cuda", 0))
    if way == "planned":
        planned_allocator().install()  # before anything is allocated: what is resized later is ours too
    contender = CONTENDERS[job.contender](job)
    one, facts = (_varied if len(job.lengths) > 1 else _fixed)(contender, job, way)
    torch.cuda.reset_peak_memory_stats()
    start = planned_allocator().statistics(0).total if way == "planned" else None
    before = torch.cuda.memory_stats()
    seconds = [one() for _ in range(steps)]
    after = torch.cuda.memory_stats()
    digest = hashlib.sha256()

    def look(gradients: Mapping[str, torch.Tensor]) -> None:
        for gradient in gradients.values():
            digest.update(gradient.double().sum().cpu().numpy().tobytes())

    facts |= {
        **percentiles(seconds),
        "peak_allocated": after["allocated_bytes.all.peak"],
        "peak_reserved": after["reserved_bytes.all.peak"],
        "device_allocs": (after["num_device_alloc"] - before["num_device_alloc"]) / steps,
        "device_frees": (after["num_device_free"] - before["num_device_free"]) / steps,
        "retries": after["num_alloc_retries"] - before["num_alloc_retries"],
    }
    if start is not None:
        found = planned_allocator().statistics(0)
        facts |= _shares(start, found.total)
        facts |= {"last_step": asdict(found.last_step), "arena_bytes": found.arena_bytes}
        facts["reserved_over"] = facts["peak_reserved"] / (found.arena_bytes + facts["residents"])
        facts["arena_over_bound"] = facts["arena"] / max(1, facts["bound"])
    contender.step(look)
    facts["host_seconds"] = _host_seconds(way)
    return facts | {"status": "ok", "gradients_digest": digest.hexdigest()[:16]}


def _shares(before: Counts, after: Counts) -> dict[str, float]:
    """Of the requests and bytes of the timed steps, what was served by plan."""
    requests, size = after.requests - before.requests, after.bytes - before.bytes
    served, resident = after.served - before.served, after.resident - before.resident
    return {
        "served_requests": served / max(1, requests),
        "served_bytes": (after.served_bytes - before.served_bytes) / max(1, size),
        "planned_requests_served": served / max(1, requests - resident),
    }


def measure(job: Job, way: str, steps: int) -> dict[str, Any]:
    """The measurement, from a process of its own."""
    environment = dict(os.environ)
    if way == "expandable":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    command = [sys.executable, "-m", "benchmarks.allocator", "--worker", way, "--steps", str(steps)]
    done = subprocess.run(
        command, input=job.to_json(), stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"status": "error", "error": f"exit code {done.returncode}"}


def _worker(way: str, steps: int) -> int:
    from benchmarks.harness.worker import ran_out

    try:
        facts = work(Job.from_json(sys.stdin.read()), way, steps)
    except Exception as error:
        if not ran_out(error):
            raise
        facts = {"status": "oom", "error": str(error)[:600], "peak_reserved": torch.cuda.max_memory_reserved()}
    print(json.dumps(facts))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON-lines file, appended to")
    parser.add_argument("--commit", help="commit of the tree that runs")
    parser.add_argument("--geometry", default="llama-8b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--scope", default="blocks", choices=[scope.value for scope in Scope])
    parser.add_argument("--attention", default="cudnn", help="kernel of all contenders")
    parser.add_argument("--lengths", default="64K", help="tokens, separated by commas; 20000-128K: another each step")
    parser.add_argument("--memory", help="that each process may reserve, such as 40GiB")
    parser.add_argument("--contenders", default="checkpoint", help="those of benchmarks.harness")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for, a row each."""
    options = _options(arguments)
    if options.worker:
        return _worker(options.worker, options.steps)
    memory = parse_bytes(options.memory) if options.memory else None
    for lengths in (tuple(map(parse_tokens, text.split("-"))) for text in options.lengths.split(",")):
        for contender in options.contenders.split(","):
            settings = Settings(
                geometry=options.geometry, scope=Scope(options.scope), blocks=options.blocks, device="cuda",
                dtype="bfloat16", attention=options.attention, memory=memory,
            )  # fmt: skip
            for way in options.ways.split(","):
                facts = measure(Job(contender=contender, settings=settings, lengths=lengths), way, options.steps)
                row = {
                    "contender": contender, "way": way, "geometry": options.geometry, "scope": options.scope,
                    "blocks": options.blocks, "seq_len": lengths[-1], "shortest": lengths[0], "memory": memory,
                    **facts, **gpu_facts(), "commit": options.commit,
                    "date": now(), "versions": versions(),
                }  # fmt: skip
                print(json.dumps({name: row.get(name) for name in (
                    "contender", "way", "seq_len", "status", "step_seconds", "peak_allocated", "peak_reserved",
                    "device_allocs", "device_frees", "served_requests", "served_bytes", "planned_requests_served",
                    "reserved_over", "arena_over_bound", "host_seconds", "error")}), flush=True)  # fmt: skip
                if options.out is not None:
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
