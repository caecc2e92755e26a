"""The command line of the harness. Needs no torch."""

from __future__ import annotations

import argparse
import importlib.util
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.geometry import SHARES, Scope, UnknownGeometryError, check_geometry
from benchmarks.harness.job import Settings
from benchmarks.harness.names import WITHOUT_ADAPTERS, ContenderError, Entry, parse_contenders
from benchmarks.harness.provenance import allocator, commit, gpu_facts
from benchmarks.harness.rows import RowError, read_rows
from memo_runtime.units import parse_bytes, parse_tokens

ATTENTION = ("auto", "cudnn", "flash", "efficient", "math")
_HALF = ("bfloat16", "float16")
_WIDE = (*_HALF, "float32")
#: Device -> kernels of PyTorch's attention that it has, and the dtypes that they take.
_KERNELS: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(("flash", "math"), (*_WIDE, "float64")),
    "cuda": {"cudnn": _HALF, "flash": _HALF, "efficient": _WIDE, "math": (*_WIDE, "float64")},
}
#: Seeds that PyTorch takes, with room for a length, which is added to them.
_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure, under which conditions, and where rows go.

    Attributes:
        entries: contenders in the order in which they run. lengths: in tokens, shortest first.
        minutes: time for all of it; None: as long as it takes.
        traces: folder for a Chrome trace of one more step of each contender at each length; None: no traces.
        longest: contender -> the only length that it is measured at; empty: all are measured at ``lengths``.
        reference: gradients are compared with a wider dtype's where that is affordable, and not only with unwrapped's.
    """

    run: str
    out: Path
    entries: tuple[Entry, ...]
    lengths: tuple[int, ...]
    settings: Settings
    budget: int | None
    host_budget: int | None
    minutes: float | None
    commit: str
    traces: Path | None = None
    reference: bool = True
    longest: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """What all rows of a run have in common."""
        shared = {name: value for name, value in asdict(self.settings).items() if name not in _OWN_FIELDS}
        found = {**shared, "batch_size": 1, "budget": self.budget, "host_budget": self.host_budget}
        told = allocator()
        return found if told is None else {**found, "allocator": told}


#: Settings that are fields of a row.
_OWN_FIELDS = ("geometry", "scope", "blocks")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memo bench run",
        description="Measure contenders on one step, each in a process of its own, and print a table.",
        epilog="docs/benchmarks.md says what is measured. Exit codes: 0 done, 1 a contender failed, 2 usage, 4 not all "
        "done in --minutes, 130 interrupted (the same command goes on).",
    )
    add = parser.add_argument
    add("--run", default="bench", help="name of the run; the same name and --out go on where it stopped")
    add("--out", default=Path("bench.jsonl"), type=Path, help="JSON-lines file to append to; default: bench.jsonl")
    add("--geometry", default="llama-8b", help="a name (an unknown one lists them), or a config.json")
    add("--scope", default="blocks", choices=[scope.value for scope in Scope], help="what one step is")
    add("--blocks", type=int, help="number of blocks, if not the geometry's")
    add("--lengths", type=_lengths, help="such as 16K,32K; K = 1024")
    add("--confirm", metavar="RUN", help="instead of --lengths: a real step of each at the longest that RUN rehearsed")
    add("--contenders", required=True,
        help="such as kernels,unwrapped,selective,memo-auto@selective,memo-auto@24GiB,memo-auto")  # fmt: skip
    add("--budget-from", metavar="NAME", help="memo also runs with budget = the peak that NAME reached")
    add("--budget", type=_some, help="device budget of memo contenders without @")
    add("--host-budget", type=_size, help="host budget of all memo contenders")
    add("--memory", type=_some, help="what a contender may allocate, where it shall be less than there is")
    add("--host-memory", type=_some, help="what may be in use on the whole machine: beyond it a contender is ended")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--dtype", choices=["bfloat16", "float16", "float32", "float64"], help="default: bfloat16, float32 on the CPU")
    add("--attention", choices=ATTENTION, help="the kernel of all contenders; default: cudnn, auto on the CPU")
    add("--loss", default="auto", choices=["auto", "tiled", "native"], help="head and loss of all, scope step")
    add("--lora", type=int, metavar="RANK", help="train PEFT's adapters of this rank beside the blocks' products only")
    add("--steps", type=int, help="cap on steady and on warm-up steps")
    add("--seed", type=int, default=0)
    add("--traces", type=Path, metavar="FOLDER", help="one more step of each as a Chrome trace, and its copies' shares")
    add("--rehearse", action="store_true",
        help="find the longest length of each within --lengths FIRST,LAST, with stand-ins for attention")  # fmt: skip
    add("--reference", default="wider", choices=["wider", "unwrapped"],
        help="gradients are compared with a wider dtype's, where that is affordable, or with unwrapped's")  # fmt: skip
    add("--minutes", type=_minutes, help="time of the whole command: stop in time; the same command goes on")
    add("--commit", help="commit of the tree that runs, where it is no checkout")
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({_read(parse_tokens, part) for part in text.split(",")}))


def _size(text: str) -> int:
    return _read(parse_bytes, text)


def _some(text: str) -> int:
    """A size that is not 0: with none nothing could be measured."""
    size = _size(text)
    if size == 0:
        raise argparse.ArgumentTypeError(f"{text!r} leaves no memory: give a size such as 24GiB, or leave it out")
    return size


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give minutes, such as 90, or leave it out")
    return minutes


def _read(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _has_gpu() -> bool:
    try:
        gpu_facts()
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return False
    return True


def _not_rehearsed(entries: Sequence[Entry], lengths: Sequence[int], traces: Path | None) -> str:
    """What does not go with a search for the longest lengths; "": nothing."""
    if len(lengths) != 2:
        return f"--lengths has {len(lengths)}, and takes two: where the search begins, and where it ends at the latest"
    if any(entry.name == "kernels" for entry in entries):
        return "kernels trains nothing that could be rehearsed: leave it out"
    other = next((entry for entry in entries if entry.budget_from is not None), None)
    if other is not None:
        return f"{other.label} has a budget at the lengths of {other.budget_from} only: give bytes, {other.name}@24GiB"
    return "a trace of a rehearsed step would show no attention: leave --traces out" if traces is not None else ""


def _not_adapted(entries: Sequence[Entry], rank: int) -> str:
    """What does not go with adapters of ``rank``; "": nothing."""
    if rank < 1:
        return "a rank is 1 or more"
    if importlib.util.find_spec("peft") is None:
        return "adapters are PEFT's, which is not installed: pip install peft"
    other = next((entry.name for entry in entries if entry.name in WITHOUT_ADAPTERS), None)
    return "" if other is None else f"{other} has no layers that adapters could be beside: leave it out"


def _out_of_range(given: argparse.Namespace) -> str:
    """What is wrong with one option, and would be for every contender; "": nothing."""
    if not given.run.strip() or not given.run.isprintable():
        return f"--run {given.run!r} is no name of a run: give one line that is not empty"
    for name, count in (("steps", given.steps), ("blocks", given.blocks)):
        if count is not None and count < 1:
            return f"--{name} {count}: at least one {name[:-1]} is measured"
    if given.scope == Scope.STEP and min(given.lengths or (2,)) < 2:
        return "--lengths 1: in scope step tokens predict the next one, so there are 2 at least"
    if not 0 <= given.seed < _SEEDS:
        return f"--seed {given.seed}: PyTorch takes none; give a number from 0 to {_SEEDS - 1}"
    if given.traces is not None:
        there = next(path for path in (given.traces, *given.traces.absolute().parents) if path.exists())
        if not there.is_dir():
            return f"--traces {given.traces}: {there} is no folder; give one, which is made where it is not there"
    return ""


def _no_such_kernel(attention: str, device: str, dtype: str) -> str:
    """Why no contender can run ``attention``; "": all can."""
    there = [name for name, dtypes in _KERNELS[device].items() if dtype in dtypes]
    if attention == "auto" or attention in there:
        return ""
    return f"--attention {attention}: PyTorch has none on {device} in {dtype}; there are: auto, {', '.join(there)}"


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The options of ``arguments``; exits with 2 and what is wrong."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        check_geometry(given.geometry)
        entries = parse_contenders(given.contenders, budget_from=given.budget_from)
    except (ContenderError, UnknownGeometryError) as error:
        parser.error(str(error))
    device = given.device if given.device != "auto" else "cuda" if _has_gpu() else "cpu"
    if device == "cuda" and not _has_gpu():
        parser.error("--device cuda: nvidia-smi finds no GPU here; use --device cpu")
    if (given.lengths is None) == (given.confirm is None):
        parser.error("give --lengths, such as 16K,32K, or --confirm RUN with a rehearsed run of --out")
    if given.rehearse and given.confirm:
        parser.error("--confirm makes real steps: leave --rehearse out")
    if given.rehearse and (refused := _not_rehearsed(entries, given.lengths, given.traces)):
        parser.error(f"--rehearse: {refused}")
    if given.geometry in SHARES and given.scope == Scope.STEP:
        parser.error(f"--geometry {given.geometry} is {SHARES[given.geometry]}: give --scope blocks")
    dtype = given.dtype or ("bfloat16" if device == "cuda" else "float32")
    attention = given.attention or ("cudnn" if device == "cuda" else "auto")
    if refused := _out_of_range(given) or _no_such_kernel(attention, device, dtype):
        parser.error(refused)
    if given.lora is not None and (refused := _not_adapted(entries, given.lora)):
        parser.error(f"--lora {given.lora}: {refused}")
    found = given.commit or commit()
    if found is None:
        parser.error("this is no checkout, so nobody knows what runs: name it with --commit HASH")
    settings = Settings(
        geometry=given.geometry,
        scope=Scope(given.scope),
        blocks=given.blocks,
        device=device,
        dtype=dtype,
        attention=attention,
        loss=given.loss,
        memory=given.memory,
        host_memory=given.host_memory,
        steps=given.steps,
        seed=given.seed,
        lora=given.lora,
        rehearse=given.rehearse,
    )
    options = Options(
        run=given.run, out=given.out, entries=entries, lengths=given.lengths or (), settings=settings,
        budget=given.budget, host_budget=given.host_budget, minutes=given.minutes, commit=found, traces=given.traces,
        reference=given.reference == "wider",
    )  # fmt: skip
    if given.confirm is None:
        return options
    try:
        return confirming(options, given.confirm)
    except RowError as error:
        parser.error(str(error))


def confirming(options: Options, run: str) -> Options:
    """``options`` with one step of each contender at the longest length that ``run`` has rehearsed.

    Raises:
        RowError: there is no such run of rehearsals, it was another step, or a contender reached no length in it.
    """
    rows = [row for row in read_rows(options.out)[0] if row["run"] == run]
    if not rows or not rows[0].get("rehearsed"):
        raise RowError(f"--confirm {run}: {options.out} has no rehearsed run of that name")
    settings = options.settings
    asked = {"geometry": settings.geometry, "scope": settings.scope.value, "blocks": settings.blocks, "allocator": None}
    asked |= {name: value for name, value in options.config.items() if name not in ("rehearse", "steps")}
    for name, value in asked.items():
        there = rows[0][name] if name in ("geometry", "scope", "blocks") else rows[0]["config"].get(name)
        if there != value:
            raise RowError(f"--confirm {run}: it was rehearsed with {name} = {there!r}, here it is {value!r}")
    reached: dict[str, int] = {}
    for row in rows:
        if row["status"] == "ok":
            reached[row["contender"]] = max(int(row["seq_len"]), reached.get(row["contender"], 0))
    for entry in options.entries:
        if entry.label not in reached:
            raise RowError(f"--confirm {run}: {entry.label} reached no length there; {', '.join(reached)} did")
    longest = {entry.label: reached[entry.label] for entry in options.entries}
    lengths = tuple(sorted(set(longest.values())))
    return replace(options, longest=longest, lengths=lengths, settings=replace(settings, steps=1), reference=False)
