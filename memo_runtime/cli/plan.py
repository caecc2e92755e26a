"""``memo plan``: a plan for a model, a length and a machine, without GPU or weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    *,
    model: Annotated[
        str, typer.Option(help="A name (llama-8b, memo-7b, ...), a Hugging Face config.json, or module:factory.")
    ],
    seq_len: Annotated[str, typer.Option(help="Tokens of one sequence, such as 128K or 1M.")],
    gpu: Annotated[str, typer.Option(help="The kind of GPU, such as h100-80gb.")] = "h100-80gb",
    gpus: Annotated[int, typer.Option(help="GPUs of one node that share the sequence.")] = 1,
    budget: Annotated[str | None, typer.Option(help="Device memory of each GPU; what it has, if not given.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory of the node for activations; 232GiB per GPU, if not given.")
    ] = None,
    policy: Annotated[str, typer.Option(help="auto, replay, memo, swap, recompute or none.")] = "auto",
    alpha: Annotated[float | None, typer.Option(help="Swap fraction for memo and replay.")] = None,
    keep_last: Annotated[int | None, typer.Option(help="Blocks at the end that stay on the device.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where the plan goes, as JSON.")] = None,
) -> None:
    """Plan a training step for a machine that need not be there.

    Nothing is downloaded and no GPU is used: sizes come from meta tensors, times from what the machine is known to
    reach; the notes of the plan say so. With --gpus the sequence, the weights and the optimizer are shared out, and
    the plan is that of one GPU. A factory is a function without parameters that returns (model, batch), with a batch
    of a few hundred tokens; it is called with the meta device as default.
    Exits with 3 where nothing fits, saying what would.

    \b
    Examples:
      memo plan --model llama-8b --seq-len 1M --gpus 8 --gpu h100-80gb --host-memory 2TB -o plan.json
      memo plan --model config.json --seq-len 128K --gpu a100-80gb --budget 70GiB
      memo plan --model mypackage.mymodel:make --seq-len 64K --policy replay
    """
    # Sizes and names are looked at before anything slow is imported.
    from memo_runtime.config import Policy, make_settings
    from memo_runtime.errors import ArgumentError
    from memo_runtime.machines.catalogue import find_machine
    from memo_runtime.output import check_writable
    from memo_runtime.persist import save
    from memo_runtime.reporting.plan_table import plan_table
    from memo_runtime.units import format_bytes, parse_tokens

    machine = find_machine(gpu)
    settings = make_settings(policy=policy, alpha=alpha, budget=budget, host_budget=host_memory, keep_last=keep_last)
    try:
        tokens = parse_tokens(seq_len)
    except ValueError as error:
        raise ArgumentError(f"--seq-len {error}") from None
    if settings.policy is Policy.TILED:
        raise ArgumentError(
            "--policy tiled cannot be planned offline: what tiles take is measured with their compiled segments, "
            "on the device; there are auto, replay, memo, swap, recompute, none"
        )
    if settings.budget is not None and settings.budget > machine.memory_bytes:
        raise ArgumentError(
            f"--budget {format_bytes(settings.budget)} is more than the {format_bytes(machine.memory_bytes)} of one "
            f"{machine.name}: give less, or leave it out for 95 % of what there is"
        )
    if gpus < 1:
        raise ArgumentError(f"--gpus {gpus} is not a number of GPUs: give 1 or more")
    if output is not None:
        check_writable(output)

    from dataclasses import replace

    from memo_runtime.cli.offline_subject import make_subject
    from memo_runtime.offline.planning import plan_offline

    made = plan_offline(
        make_subject(model, tokens),
        machine,
        replace(settings, host_budget=None),
        tokens=tokens,
        gpus=gpus,
        host_bytes=settings.host_budget,
        progress=lambda what: typer.echo(f"memo: {what} ...", err=True),
    )
    if output is not None:
        save(made, output)
    typer.echo(plan_table(made))
