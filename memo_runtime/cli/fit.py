"""``memo fit``: how long a sequence trains on a machine, and what a step costs on the way there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memo_runtime.cli.answering import answer
from memo_runtime.cli.exits import ExitCode
from memo_runtime.cli.offline_request import (
    Alpha,
    Budget,
    Gpu,
    Gpus,
    HostMemory,
    KeepLast,
    Lora,
    MaxPositions,
    Model,
    OptimizerName,
    Output,
    PolicyName,
    Request,
    Trainable,
    read_request,
    teller,
)
from memo_runtime.errors import ArgumentError

if TYPE_CHECKING:
    from memo_runtime.offline.fit import Fit, Reach


_MOST_MINUTES = 7 * 24 * 60


def fit(
    *,
    model: Model,
    gpu: Gpu = "h100-80gb",
    gpus: Gpus = 1,
    budget: Budget = None,
    host_memory: HostMemory = None,
    policy: PolicyName = "auto",
    alpha: Alpha = None,
    keep_last: KeepLast = None,
    optimizer: OptimizerName = None,
    lora: Lora = None,
    trainable: Trainable = None,
    max_positions: MaxPositions = None,
    output: Output = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Confirm the longest by rehearsals on the GPU, or CPU, of this machine.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Time for a --rehearse: then what is confirmed by now is printed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """The longest sequence that trains, with the step time, MFU and memory of it and of shorter ones.

    Found without a GPU, by plans such as memo plan makes; the plan of the longest is saved with -o. The last column
    says what would make the step faster (HBM, host memory, or neither: time), and for the longest what keeps it from
    being longer. With --rehearse the longest is searched again near the forecast, by plans made on this machine and a
    whole step in which only attention is replaced.
    Exits with 3 where not even 1,024 tokens fit, saying what would, and which optimizers, and with 4 where no length
    was confirmed in --minutes.

    \b
    Examples:
      memo fit --model llama-1b-d128 --host-memory 118GiB --optimizer adamw-bf16
      memo fit --model llama-8b --gpu h100-80gb --lora 16 -o longest.json
      memo fit --model config.json --gpus 8 --gpu a100-80gb --optimizer adamw-8bit --json
    """
    request = read_request(
        model=model, gpu=gpu, gpus=gpus, budget=budget, host_memory=host_memory, policy=policy, alpha=alpha,
        keep_last=keep_last, optimizer=optimizer, lora=lora, trainable=trainable, max_positions=max_positions,
        output=output,
    )  # fmt: skip
    from memo_runtime.cli.fit_rehearsal import Told, check_rehearsable, rehearse_near, running, start, told_of

    check_minutes(minutes, rehearse=rehearse)
    here = start(request) if rehearse else None

    tell, told = teller(), Told()
    with running(here, minutes, tell) as process:
        from memo_runtime.offline.fit import fit as find
        from memo_runtime.offline.planning import with_placement
        from memo_runtime.offline.profile import study_model
        from memo_runtime.persist import save

        study = study_model(
            request.subject(), request.machine, gpus=gpus, optimizer=request.optimizer(), progress=tell
        )
        found = find(study, request.settings, host_bytes=request.host_bytes, progress=tell)
        longest = found.longest
        if here is not None:
            check_rehearsable(study.subject, longest, here)
        if output is not None:
            tell("the layout")
            save(with_placement(longest.plan, study.at(longest.tokens, host_bytes=request.host_bytes)), output)
        if here is not None and process is not None:
            told = told_of(rehearse_near(request, longest, here, process), longest.tokens, here)
    if as_json:
        answer(json.dumps(_as_json(found, request, study.subject.name) | told.fields, indent=2))
    else:
        answer(_as_text(found, request, study.subject.name) + told.text)
    if told.unconfirmed:
        raise typer.Exit(ExitCode.NOT_FOUND)


def check_minutes(minutes: float | None, *, rehearse: bool) -> None:
    """Refuse a time that is none.

    Raises:
        ArgumentError: it is.
    """
    if minutes is not None and not rehearse:
        raise ArgumentError("--minutes is the time of a --rehearse: give both, or none")
    if minutes is not None and not 0 < minutes <= _MOST_MINUTES:
        most = f"{_MOST_MINUTES:,} (a week) at most"
        raise ArgumentError(f"--minutes {minutes:g} is no time: give more than 0, and {most}")


def _as_text(found: Fit, request: Request, name: str) -> str:
    from memo_runtime.reporting.text_table import table
    from memo_runtime.units import format_bytes, format_seconds

    header = ("tokens", "step", "MFU", "HBM peak", "host memory", "executor", "bound by")
    rows = [
        (
            f"{reach.tokens:,}",
            format_seconds(reach.plan.forecast.step_seconds),
            f"{100 * reach.plan.forecast.mfu:.1f} %" if reach.plan.forecast.mfu else "",
            format_bytes(reach.plan.forecast.peak_bytes),
            format_bytes(reach.plan.forecast.host_bytes),
            reach.executors,
            str(reach.bound),
        )
        for reach in found.reaches
    ]
    longest, limits = found.longest, found.longest.plan.limits
    each = " of each GPU" if request.gpus > 1 else ""
    lines = [
        f"{name} on {request.gpus} x {request.machine.name}, optimizer {longest.plan.profile.states.optimizer_name}: "
        f"{longest.tokens:,} tokens at most",
        f"limits{each}: HBM {format_bytes(limits.device_bytes)} ({limits.device_source}), "
        f"host {format_bytes(limits.host_bytes)} ({limits.host_source})",
        "",
        table(header, rows, text_columns=(5, 6)),
        "",
        *(f"- {note}" for note in _notes(longest, name)),
    ]
    return "\n".join(lines)


def _notes(longest: Reach, name: str) -> tuple[str, ...]:
    from memo_runtime.offline.fit import Bound
    from memo_runtime.offline.positions import note_on_table

    ends = (note_on_table(name, longest.tokens),) if longest.bound is Bound.POSITIONS else ()
    return longest.plan.notes + ends + longest.plan.profile.notes


def _as_json(found: Fit, request: Request, name: str) -> dict[str, Any]:
    limits = found.longest.plan.limits
    return {
        "model": name,
        "gpu": request.machine.name,
        "gpus": request.gpus,
        "optimizer": found.longest.plan.profile.states.optimizer_name,
        "device_limit_bytes": limits.device_bytes,
        "host_limit_bytes": limits.host_bytes,
        "longest": found.longest.tokens,
        "lengths": [_reach(reach) for reach in found.reaches],
        "notes": list(_notes(found.longest, name)),
    }


def _reach(reach: Reach) -> dict[str, Any]:
    forecast = reach.plan.forecast
    return {
        "seq_len": reach.tokens,
        "step_seconds": forecast.step_seconds,
        "mfu": forecast.mfu,
        "peak_bytes": forecast.peak_bytes,
        "host_bytes": forecast.host_bytes,
        "executor": reach.executors,
        "bound": str(reach.bound),
    }
