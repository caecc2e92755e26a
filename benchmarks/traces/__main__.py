"""Records training steps on a GPU, one file per case.

    python -m benchmarks.traces --out benchmarks/traces/h100 --commit HASH

Each case has a process of its own, so that it begins with an empty allocator; processes are forked, so that libraries
are imported once. What is in the folder already is not recorded again. ``--only`` takes parts of names.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.provenance import gpu_facts, now, versions
from benchmarks.traces.cases import Case, all_cases, shrunk
from benchmarks.traces.recording import record
from memo_runtime.traces.trace_file import save_trace

#: A child cannot use CUDA, because a library asked for it before the fork.
_SPOILED = 75


def main(arguments: list[str] | None = None) -> int:
    """Record what is asked for; exit code 1 if a case failed, 4 if the time was over before all were done."""
    options = _options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [case for case in all_cases() if not options.only or any(o in case.name for o in options.only.split(","))]
    # Libraries ask whether there is a device when they are imported; through the driver that would spoil forks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    importlib.import_module("transformers")  # before forking, once
    method = "fork"
    begun, failed = time.monotonic(), []
    for case in wanted:
        target = options.out / f"{case.name}.json.gz"
        if target.exists():
            continue
        if time.monotonic() - begun > options.seconds:
            print(f"{case.name} and what follows it were left: {options.seconds} s are over", file=sys.stderr)
            return 4
        code = _run(method, case, target, options)
        if code == _SPOILED:
            print("a library used CUDA before the fork: processes are started anew from here on", file=sys.stderr)
            method = "spawn"
            code = _run(method, case, target, options)
        if code:
            failed.append(case.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(method: str, case: Case, target: Path, options: argparse.Namespace) -> int | None:
    """Exit code of a process that records ``case``, forked or spawned."""
    context: Any = multiprocessing.get_context(method)
    child = context.Process(target=_record, args=(case, target, options.device, options.commit))
    child.start()
    child.join()
    code: int | None = child.exitcode
    return code


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the traces")
    parser.add_argument("--commit", required=True, help="commit of the tree that runs")
    parser.add_argument("--only", default="", help="parts of names of cases, separated by commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny shapes, to try it")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this many seconds")
    return parser.parse_args(arguments)


def _record(case: Case, target: Path, device: str, commit: str) -> None:
    begun = time.monotonic()
    cuda = device == "cuda"
    if cuda and torch.cuda._is_in_bad_fork():
        sys.exit(_SPOILED)
    if not cuda:
        torch.set_num_threads(1)  # the others of a pool that was there before the fork are not here
    facts = gpu_facts() if cuda else {}
    words = {**facts, "commit": commit, "date": now(), **versions(("transformers",))}
    trace = record(case if cuda else shrunk(case), torch.device(device), words)
    save_trace(trace, target)
    measured = trace.measured
    peaks = f"allocated {measured.allocated_peak} reserved {measured.reserved_peak}" if measured else "no allocator"
    size = target.stat().st_size
    print(f"{case.name}: {len(trace.requests)} requests, {len(trace.spans)} spans, {peaks}, {size} bytes, "
          f"{time.monotonic() - begun:.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
