"""Training steps on PyTorch's allocator, with expandable segments, and by plan: one row each.

    python -m benchmarks.allocator --out benchmarks/results/allocator_h100.jsonl --commit HASH \\
        --geometry llama-8b --blocks 4 --lengths 64K --contenders checkpoint,selective --ways native,expandable,planned

Each contender has a process for each way, which walks the lengths, and rows are written as they come. ``planned``
records the third step, plans it, empties the cache and enables the plan; the arena needs the allocator built
(``python -m memo_runtime.allocator``). Peaks are those of the timed steps, so are
``retries`` (reorganisations), and ``device_allocs`` and ``device_frees`` (calls of the driver) a step. ``served_bytes``
and ``served_requests`` are shares of the timed steps; ``planned_requests_served`` is without the requests that the plan
leaves to PyTorch's allocator, ``reserved_over`` what is reserved over the arena and the bytes of those,
``host_seconds`` one allocation and its end, ``native_host_seconds`` the same in that process before the planned
allocator is installed: between processes it differs by half. The policies of memo profile and plan in the first way;
the others carry out that plan.

``gradients_digest`` is over the sums of every gradient, in float64, of the step before those that are timed, the first
by plan. They are taken piece by piece, each a small request, so that nothing of them is in what is reserved: whole
gradients in float64 would stay in the caches of all ways, 2 to 4 GiB of them where the input has one. Giving caches
back behind that step would be no way out: what PyTorch's allocator has reserved after many steps is what is compared,
and after one in an empty cache it is less.

Lengths such as 20000-128K are another one at every step, planned from a quarter and a half of the longest, and once
more where that one says that something grows otherwise; with
``--memory``, 1 GiB above the arena and what is beside it in the row before, PyTorch's allocator may run out of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders.base import Contender
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job, Settings
from benchmarks.harness.memory import limit_memory, release
from benchmarks.harness.provenance import gpu_facts, now, versions
from benchmarks.harness.subject import OnGradients
from benchmarks.harness.timing import percentiles
from memo_runtime.rehearsal.failure import ran_out
from memo_runtime.units import parse_bytes, parse_tokens

WAYS = ("native", "expandable", "planned")
_WARM, _SOLVER_SECONDS = 2, 10.0
#: Elements of a piece of a gradient, which in float64 are the largest small request of PyTorch's allocator.
_PIECE = 1 << 17


def _timed(contender: Contender, look: OnGradients | None = None) -> float:
    begun = time.perf_counter()
    contender.step(look)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _enable(contender: Contender) -> dict[str, Any]:
    """Record, plan and enable; what the row says of the plan."""
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.arena.plan import enable, plan_arena
    from memo_runtime.recording.allocator import AllocatorRecorder
    from memo_runtime.traces.trace import Phase

    with AllocatorRecorder(measure=False) as recorder:
        recorder.begin(Phase.STEP)
        contender.step()
        recorder.end(Phase.STEP)
    plan = plan_arena(recorder.trace(), recorder.stream_handles, 0, seconds=_SOLVER_SECONDS, threads=None)
    enable(planned_allocator(), plan, lambda: _long_lived(contender))
    return {
        "arena": plan.size, "bound": plan.lower_bound, "residents": plan.resident_bytes, "planned_requests":
        len(plan.rows), "plan_seconds": plan.seconds,
    }  # fmt: skip


def _long_lived(contender: Contender) -> Iterator[torch.Tensor]:
    """What ``memo.wrap`` would move together before the arena is made."""
    from memo_runtime.arena.model import long_lived

    subject = getattr(contender, "subject", None)  # the kernels alone have no model
    return iter(()) if subject is None else long_lived(subject.model, subject.optimizer)


Step = Callable[[OnGradients | None], float]


def _fixed(contender: Contender, tokens: int, way: str) -> tuple[Step, dict[str, Any]]:
    """A step of ``tokens``, when it is steady, and what the row says of its plan."""
    from memo_runtime.allocator.library import planned_allocator

    contender.start(tokens)
    for _ in range(_WARM):
        contender.step()
    facts = {}
    if way == "planned":
        facts = _enable(contender)
    else:
        contender.step()  # as many as were recorded, so that weights are the same

    def one(look: OnGradients | None = None) -> float:
        if way != "planned":
            return _timed(contender, look)
        planned_allocator().begin_step(0)
        seconds = _timed(contender, look)
        planned_allocator().end_step(0)
        return seconds

    return one, facts


def _varied(contender: Contender, job: Job, way: str) -> tuple[Step, dict[str, Any]]:
    """A step of another length each time, and what the row says of its plan; by the path that ``memo.wrap`` takes."""
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.arena.steps import PlannedSteps

    shortest, longest = job.lengths
    draw, notes = random.Random(0), []
    planned = None
    if way == "planned":
        planned = PlannedSteps(planned_allocator(), 0, notes.append, long_lived=lambda: _long_lived(contender))

    def step(tokens: int, look: OnGradients | None = None) -> float:
        # The batch of hidden states before this one goes first: two of them would be what a step has beside its plan.
        contender.finish()
        contender.start(tokens)
        if planned is None:
            return _timed(contender, look)

        def behind(gradients: Mapping[str, torch.Tensor]) -> None:
            planned.end()  # what a look takes is none of the step
            assert look is not None, "it is called where there is a look"
            look(gradients)

        begun = time.perf_counter()
        planned.begin("varied", tokens, contender.batch())
        switching = time.perf_counter() - begun  # to the plan of another length, which is of the step
        seconds = _timed(contender, behind if look is not None else None)
        planned.end()
        return switching + seconds

    # Two as they are, two that are recorded, and the longest, which is placed of those, and again if it has to be.
    quarter, half = max(shortest, longest // 4), max(shortest, longest // 2)
    for tokens in (quarter, quarter, quarter, half, longest, longest, longest):
        step(tokens)
        if planned is not None:
            planned.wait()
    report = planned.report() if planned is not None else None
    facts: dict[str, Any] = {"notes": notes}
    if report is not None:
        facts |= {
            "arena": report.planned_peak, "bound": report.lower_bound, "plans": report.plans,
            # Weights and the batch, of the longest step.
            "residents": torch.cuda.memory_allocated(),
        }  # fmt: skip
    return lambda look=None: step(draw.randint(shortest, longest), look), facts


def _host_seconds(*, planned: bool) -> float:
    """What one ``torch.empty`` of 3 MiB and its end take on the host: the least of 100 times 100."""
    from memo_runtime.allocator.library import planned_allocator

    size, times, allocator = 3 << 20, 100, planned_allocator() if planned else None
    if allocator is not None:
        stream = torch.cuda.current_stream().cuda_stream
        allocator.arm(0, [(2 * at, 2 * at + 1, size, 0, stream) for at in range(times)], size)
    found = []
    for _ in range(100):
        if allocator is not None:
            allocator.begin_step(0)
        begun = time.perf_counter()
        for _ in range(times):
            torch.empty(size, dtype=torch.uint8, device="cuda")
        found.append(time.perf_counter() - begun)
        if allocator is not None:
            allocator.end_step(0)
    if allocator is not None:
        allocator.disarm(0)
    return min(found) / times


def work(job: Job, way: str, steps: int, *, varied: bool) -> Iterator[dict[str, Any]]:
    """The measurements of one process: one for each length, shortest first, or one where they vary."""
    from benchmarks.harness.contenders import CONTENDERS
    from memo_runtime.allocator.library import planned_allocator
    from memo_runtime.profiling.machine import settle_libraries

    if job.settings.memory is not None:
        limit_memory(job.settings.memory, torch.device("cuda", 0))
    host = {"host_seconds": _host_seconds(planned=False)}
    if way == "planned":
        torch.cuda.empty_cache()
        planned_allocator().install()  # before anything that stays is allocated: what is resized later is ours too
        host = {"native_host_seconds": host["host_seconds"], "host_seconds": _host_seconds(planned=True)}
    contender = CONTENDERS[job.contender](job)
    # As the profile of a wrapped model does; not all contenders are wrapped.
    settle_libraries(contender.device, getattr(torch, job.settings.dtype))
    for tokens in job.lengths[-1:] if varied else job.lengths:
        try:
            one, facts = _varied(contender, job, way) if varied else _fixed(contender, tokens, way)
            measured = _measured(one, steps, way, facts)
        except Exception as error:
            if not ran_out(error):
                raise
            oom = {"status": "oom", "error": str(error)[:600], "peak_reserved": torch.cuda.max_memory_reserved()}
            yield {"seq_len": tokens, **oom}
            return
        yield {"seq_len": tokens, "status": "ok", **host, **measured}
        contender.finish()
        if way == "planned":
            planned_allocator().disarm(0)
        release(contender.device)


def _measured(one: Step, steps: int, way: str, facts: dict[str, Any]) -> dict[str, Any]:
    """``facts`` and what ``steps`` of ``one`` take."""
    from memo_runtime.allocator.library import planned_allocator

    digest = hashlib.sha256()

    def look(gradients: Mapping[str, torch.Tensor]) -> None:
        for gradient in gradients.values():
            for piece in _pieces(gradient):
                digest.update(piece.double().sum().cpu().numpy().tobytes())

    one(look)
    torch.cuda.reset_peak_memory_stats()
    before, seconds, counts = torch.cuda.memory_stats(), [], Counter()
    for _ in range(steps):
        seconds.append(one(None))
        if way == "planned":
            counts.update(asdict(planned_allocator().statistics(0).last_step))
    after = torch.cuda.memory_stats()
    facts |= {
        **percentiles(seconds),
        "gradients_digest": digest.hexdigest()[:16],
        "peak_allocated": after["allocated_bytes.all.peak"],
        "peak_reserved": after["reserved_bytes.all.peak"],
        "device_allocs": (after["num_device_alloc"] - before["num_device_alloc"]) / steps,
        "device_frees": (after["num_device_free"] - before["num_device_free"]) / steps,
        "retries": after["num_alloc_retries"] - before["num_alloc_retries"],
    }
    if counts:
        found = planned_allocator().statistics(0)
        facts |= _shares(counts)
        facts |= {"timed_steps": dict(counts), "arena_bytes": found.arena_bytes}
        facts["reserved_over"] = facts["peak_reserved"] / (found.arena_bytes + facts["residents"])
        facts["arena_over_bound"] = facts["arena"] / max(1, facts["bound"])
    return facts


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of ``tensor``, of ``_PIECE`` elements at most."""
    if tensor.numel() <= _PIECE:
        yield tensor
        return
    longest = max(range(tensor.dim()), key=lambda dim: tensor.shape[dim])
    across = tensor.numel() // tensor.shape[longest]
    for part in tensor.split(max(1, _PIECE // across), dim=longest):
        yield from _pieces(part)


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Of the requests and bytes of the timed steps, what was served by plan."""
    return {
        "served_requests": counts["served"] / max(1, counts["requests"]),
        "served_bytes": counts["served_bytes"] / max(1, counts["bytes"]),
        "planned_requests_served": counts["served"] / max(1, counts["requests"] - counts["resident"]),
    }


def measure(job: Job, way: str, steps: int, *, varied: bool) -> Iterator[dict[str, Any]]:
    """The measurements, from a process of their own, as they come."""
    environment = dict(os.environ)
    if way == "expandable":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    command = [sys.executable, "-m", "benchmarks.allocator", "--worker", way, "--steps", str(steps)]
    command += ["--varied"] * varied
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None, "a pipe"
        assert process.stdout is not None, "a pipe"
        process.stdin.write(job.to_json())
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        yield {"status": "error", "seq_len": job.lengths[-1], "error": f"exit code {process.returncode}"}


def _worker(way: str, steps: int, *, varied: bool) -> int:
    for facts in work(Job.from_json(sys.stdin.read()), way, steps, varied=varied):
        print(json.dumps(facts), flush=True)
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
    parser.add_argument("--varied", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for, a row each."""
    options = _options(arguments)
    if options.worker:
        return _worker(options.worker, options.steps, varied=options.varied)
    memory = parse_bytes(options.memory) if options.memory else None
    varied = "-" in options.lengths
    lengths = tuple(sorted(map(parse_tokens, options.lengths.replace("-", ",").split(","))))
    settings = Settings(
        geometry=options.geometry, scope=Scope(options.scope), blocks=options.blocks, device="cuda",
        dtype="bfloat16", attention=options.attention, memory=memory,
    )  # fmt: skip
    asked = itertools.product(options.contenders.split(","), options.ways.split(","))
    with tempfile.TemporaryDirectory() as folder:
        for contender, way in asked:
            plans = None if varied else f"{folder}/{contender}"
            job = Job(contender=contender, settings=settings, lengths=lengths, plans=plans)
            for facts in measure(job, way, options.steps, varied=varied):
                row = {
                    "contender": contender, "way": way, "geometry": options.geometry, "scope": options.scope,
                    "blocks": options.blocks, "shortest": lengths[0] if varied else facts["seq_len"],
                    "memory": memory, **facts, **gpu_facts(), "commit": options.commit,
                    "date": now(), "versions": versions(),
                }  # fmt: skip
                _write(row, options.out)
    return 0


def _write(row: dict[str, Any], out: Path | None) -> None:
    """Append ``row``, and print what of it is read first."""
    print(json.dumps({name: row.get(name) for name in (
        "contender", "way", "seq_len", "status", "step_seconds", "peak_allocated", "peak_reserved",
        "device_allocs", "device_frees", "retries", "served_requests", "served_bytes", "planned_requests_served",
        "reserved_over", "arena_over_bound", "host_seconds",
        "native_host_seconds", "gradients_digest", "error")}), flush=True)  # fmt: skip
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
