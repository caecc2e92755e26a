"""What the offline verbs are asked: their common options, read and checked before anything slow is imported.

Help needs none of what reads them, so that this is imported when there is something to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memo_runtime.errors import ArgumentError

if TYPE_CHECKING:
    from memo_runtime.config import Settings
    from memo_runtime.machines.machine import Machine
    from memo_runtime.offline.optimizers import Optimizer
    from memo_runtime.offline.subject import Subject

#: Of the largest machine whose GPUs share their links.
_MOST_GPUS = 72

Model = Annotated[
    str, typer.Option(help="A name (llama-8b, memo-7b, ...), a Hugging Face config.json, or module:factory.")
]
Gpu = Annotated[str, typer.Option("--gpu", "--machine", help="The kind of GPU, such as h100-80gb.")]
Gpus = Annotated[int, typer.Option(help="GPUs of one node that share the sequence.")]
Budget = Annotated[str | None, typer.Option(help="Device memory of each GPU; what it has, if not given.")]
HostMemory = Annotated[
    str | None, typer.Option(help="Host memory of the node for activations; 232GiB per GPU, if not given.")
]
PolicyName = Annotated[str, typer.Option("--policy", help="auto, tiled, replay, memo, swap, recompute or none.")]
Alpha = Annotated[float | None, typer.Option(help="Swap fraction for memo, replay and tiled.")]
KeepLast = Annotated[int | None, typer.Option(help="Blocks at the end that stay on the device.")]
OptimizerName = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        help="adamw, adamw-foreach, adamw-bf16, adamw-fp32, adamw-8bit, adafactor, sgd-momentum, sgd or none; adamw is "
        "assumed.",
    ),
]
Lora = Annotated[int | None, typer.Option(help="Train adapters of this rank beside every linear module of the blocks.")]
Trainable = Annotated[str | None, typer.Option(help="Train only parameters whose names have this regular expression.")]
MaxPositions = Annotated[
    str | None, typer.Option(help="Tokens that the model has positions for, whatever its config says.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Where the plan goes, as JSON.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options that were read; ``settings`` have no host budget: ``host_bytes`` is that of the node."""

    model: str
    machine: Machine
    gpus: int
    settings: Settings
    host_bytes: int | None
    optimizer_name: str | None
    lora: int | None
    trainable: str | None
    max_positions: int | None
    output: Path | None

    def subject(self) -> Subject:
        """The model on meta, with what is trained of it."""
        from memo_runtime.cli.offline_subject import make_subject
        from memo_runtime.offline.trainable import check_rank, trained_in_part

        check_rank(self.lora)
        subject = make_subject(self.model, self.max_positions)
        return trained_in_part(subject, lora=self.lora, trainable=self.trainable)

    def optimizer(self) -> Optimizer | None:
        """The optimizer that was named."""
        from memo_runtime.offline.optimizers import find_optimizer

        return None if self.optimizer_name is None else find_optimizer(self.optimizer_name)


def read_request(
    *,
    model: str,
    gpu: str,
    gpus: int,
    budget: str | None,
    host_memory: str | None,
    policy: str,
    alpha: float | None,
    keep_last: int | None,
    optimizer: str | None,
    lora: int | None,
    trainable: str | None,
    max_positions: str | None,
    output: Path | None,
) -> Request:
    """Check what can be checked at once.

    Raises:
        ArgumentError: an option that cannot be used as given. OutputError: the output cannot be written.
    """
    from memo_runtime.config import make_settings, read_size
    from memo_runtime.machines.catalogue import find_machine
    from memo_runtime.output import check_writable
    from memo_runtime.units import format_bytes

    machine = find_machine(gpu)
    settings = make_settings(
        policy=policy, alpha=alpha, budget=read_size("--budget", budget),
        host_budget=read_size("--host-memory", host_memory), keep_last=keep_last,
    )  # fmt: skip
    if settings.budget is not None and settings.budget > machine.memory_bytes:
        raise ArgumentError(
            f"--budget {format_bytes(settings.budget)} is more than the {format_bytes(machine.memory_bytes)} of one "
            f"{machine.name}: give less, or leave it out for 95 % of what there is"
        )
    if not 1 <= gpus <= _MOST_GPUS:
        raise ArgumentError(f"--gpus {gpus} is not a number of GPUs of one node: give 1 to {_MOST_GPUS}")
    if output is not None:
        check_writable(output)
    return Request(
        model=model,
        machine=machine,
        gpus=gpus,
        settings=replace(settings, host_budget=None),
        host_bytes=settings.host_budget,
        optimizer_name=optimizer,
        lora=lora,
        trainable=trainable,
        max_positions=None if max_positions is None else read_tokens("--max-positions", max_positions),
        output=output,
    )


def read_tokens(option: str, text: str) -> int:
    """The number of tokens given with ``option``.

    Raises:
        ArgumentError: it is none.
    """
    from memo_runtime.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise ArgumentError(f"{option} {error}") from None


def teller() -> Callable[[str], None]:
    """Says on stderr what is done next."""
    return lambda what: typer.echo(f"memo: {what} ...", err=True)
