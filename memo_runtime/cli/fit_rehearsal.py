"""``memo fit --rehearse``: the longest length of a forecast, confirmed by rehearsals on the machine that is here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from memo_runtime.cli.offline_request import Request
from memo_runtime.cli.rehearsal_process import RehearsalProcess
from memo_runtime.cli.rehearsal_trial import REHEARSED, Trial
from memo_runtime.errors import ArgumentError
from memo_runtime.planning.rounding import GRANULE_TOKENS
from memo_runtime.rehearsal.nearby import Nearby, longest_near
from memo_runtime.rehearsal.record import Rehearsal
from memo_runtime.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memo_runtime.offline.fit import Reach
    from memo_runtime.offline.subject import Subject

#: Nothing longer than this many times the forecast is tried.
_MOST = 1.5
_NEARLY = 1.02
#: Seconds that a CPU may take for the products of one step.
_PATIENCE = 3600.0
#: Sides of the products that show its rate. The first is enough where it takes so many seconds: in half precision a
#: processor without instructions for it takes tens of times as long, three seconds for each of the second.
_SIDES, _LONG = (512, 1024), 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """The device of this machine that is rehearsed on."""

    device: str
    name: str
    memory_bytes: int | None = None

    @classmethod
    def found(cls) -> Here:
        """The first GPU, or the CPU; no context is made on the GPU, which is left to the rehearsals."""
        import torch

        if not torch.cuda.is_available():
            return cls(device="cpu", name="the CPU")
        facts = torch.cuda.get_device_properties(0)
        return cls(device="cuda", name=facts.name, memory_bytes=int(facts.total_memory))


def start(request: Request) -> Here:
    """Where ``request`` is rehearsed; what cannot be is refused before anything is forecast.

    Raises:
        ArgumentError: several GPUs, an optimizer that PyTorch does not have, a model with a batch of its own, or a
            machine with more memory than the GPU that is here.
    """
    if request.gpus != 1:
        raise ArgumentError(f"--rehearse runs on one GPU, and --gpus is {request.gpus}: leave one of them out")
    if request.optimizer_name not in (None, *REHEARSED):
        raise ArgumentError(
            f"--rehearse takes the optimizers of PyTorch, and {request.optimizer_name} is none: give --optimizer "
            f"{', '.join(REHEARSED)}, or call memo.rehearse(model, batch, optimizer=...) with yours"
        )
    if ":" in request.model:
        raise ArgumentError(
            f"--rehearse cannot make the batch of {request.model} longer without knowing where its tokens are: call "
            "memo.rehearse(model, batch) with a batch of the length that is asked"
        )
    here = Here.found()
    asked = request.settings.budget or request.machine.memory_bytes
    # Drivers keep a little of what a machine is said to have.
    if here.memory_bytes is not None and asked > _NEARLY * here.memory_bytes:
        raise ArgumentError(
            f"--rehearse: {format_bytes(asked)} are asked for, and {here.name} here has "
            f"{format_bytes(here.memory_bytes)}: give that machine with --gpu, or a smaller --budget"
        )
    return here


@contextlib.contextmanager
def running(here: Here | None, minutes: float | None, tell: Callable[[str], None]) -> Iterator[RehearsalProcess | None]:
    """The process that rehearses, under way while the forecast is made; None: nothing is rehearsed.

    ``minutes``: from now on. ``tell``: what it does is said with it, and when.
    """
    if here is None:
        yield None
        return
    began = time.monotonic()

    def progress(what: str) -> None:
        tell(f"[{time.monotonic() - began:.0f} s] {what}")

    with RehearsalProcess(progress=progress, deadline=None if minutes is None else began + 60 * minutes) as process:
        process.start()
        yield process


def check_rehearsable(subject: Subject, longest: Reach, here: Here) -> None:
    """Refuse what a CPU would take too long for: rehearsals lack attention alone.

    Raises:
        ArgumentError: a step takes more than an hour.
    """
    import torch
    from torch import nn

    if here.device != "cpu":
        return
    linears = [module.weight for module in subject.model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        return
    # Forward, and the gradients of inputs: of what is trained it is half as much again.
    flops = 4 * longest.tokens * sum(weight.numel() for weight in linears)
    for side in _SIDES:
        square = torch.ones(side, side, dtype=linears[0].dtype)
        square @ square
        began = time.perf_counter()
        square @ square
        took = time.perf_counter() - began
        if took > _LONG:
            break
    seconds = flops / (2 * side**3) * took
    if seconds > _PATIENCE:
        raise ArgumentError(
            f"--rehearse: there is no GPU here, and the matrix products of one step of {longest.tokens:,} tokens, the "
            f"longest that is forecast, would take {seconds / 3600:.1f} hours or more on this CPU: rehearse where a "
            "GPU is, give a --budget so small that the longest is short, or leave --rehearse out for the forecast"
        )


def rehearse_near(request: Request, longest: Reach, here: Here, process: RehearsalProcess) -> Nearby:
    """The longest length that fits on this machine, near the longest that was forecast.

    Raises:
        RehearsalError: a rehearsal could not be made.
    """
    from memo_runtime.offline.fit import Bound

    limits, settings = longest.plan.limits, request.settings
    trial = Trial(
        model=request.model, tokens=longest.tokens, device=here.device, policy=settings.policy.value,
        alpha=settings.alpha, keep_last=settings.keep_last, budget=limits.device_bytes, host_budget=limits.host_bytes,
        optimizer=request.optimizer_name or "adamw", lora=request.lora, trainable=request.trainable,
        max_positions=request.max_positions,
    )  # fmt: skip

    def planned(tokens: int) -> Rehearsal | None:
        process.progress(f"a plan for {tokens:,} tokens")
        return process.plan(replace(trial, tokens=tokens))

    def one(tokens: int) -> Rehearsal:
        process.progress(f"a rehearsal of {tokens:,} tokens")
        return process.rehearse(replace(trial, tokens=tokens))

    most = round(_MOST * longest.tokens) if longest.bound is not Bound.POSITIONS else longest.tokens
    return longest_near(longest.tokens, GRANULE_TOKENS, one, plan=planned, most=most)


def rehearse_apart(trial: Trial) -> Rehearsal:
    """``trial`` in a process of its own.

    Raises:
        RehearsalError: it could not be made; says why.
    """
    with RehearsalProcess() as process:
        return process.rehearse(trial)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is added to a frontier: lines behind its table, fields of its object.

    ``unconfirmed``: there was no time to confirm any length.
    """

    text: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    unconfirmed: bool = False


def told_of(found: Nearby, forecast: int, here: Here) -> Told:
    """What the rehearsals have shown, beside the forecast."""
    by_plan = f", {found.planned} more by their plans alone" if found.planned else ""
    count = f"{found.rehearsed} length{'s' * (found.rehearsed != 1)}"
    lines = ["", "", f"rehearsed on {here.name}, {count}{by_plan}:"]
    if found.longest is None and found.cut:
        lines.append("  no length was confirmed in the time that --minutes gives")
    elif found.longest is None:
        lines.append(f"  no length fits, down to {found.short_at:,} tokens")
    else:
        one, off = found.longest, found.tokens / forecast - 1
        sizes = (("peak", one.peak_bytes), ("reserved", one.reserved_bytes), ("host", one.host_bytes))
        said = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes)
        took = format_seconds(one.seconds)
        lines.append(f"  {found.tokens:,} tokens fit ({off:+.1%} of the forecast): {said}, rehearsed in {took}")
    if found.short is not None:
        short = found.short
        lines.append(f"  {found.short_at:,} tokens do not: {short.phase}, {short.where}: {short.error}")
    if found.cut:
        known = f": {found.planned_at:,} tokens have a plan" if found.planned_at > found.tokens else ""
        lines.append(f"  cut: the time of --minutes was over before the search was{known}")
    fields = {
        "device": here.name,
        "longest": found.tokens,
        "rehearsal": None if found.longest is None else found.longest.to_dict(),
        "too_long": found.short_at or None,
        "short": None if found.short is None else found.short.to_dict(),
        "lengths": found.rehearsed,
        "planned_lengths": found.planned,
        "longest_planned": found.planned_at or None,
        "cut": found.cut,
    }
    return Told(text="\n".join(lines), fields={"rehearsed": fields}, unconfirmed=found.cut and found.longest is None)
