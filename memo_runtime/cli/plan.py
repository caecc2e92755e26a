"""``memo plan``: a plan for a model, a length and a machine, without GPU or weights."""

from __future__ import annotations

from typing import Annotated

import typer

from memo_runtime.cli.answering import answer
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
    Trainable,
    read_request,
    read_tokens,
    teller,
)


def plan(
    *,
    model: Model,
    seq_len: Annotated[str, typer.Option(help="Tokens of one sequence, such as 128K or 1M.")],
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
      memo plan --model config.json --seq-len 128K --gpu a100-80gb --budget 70GiB --policy tiled
      memo plan --model mypackage.mymodel:make --seq-len 64K --policy replay --optimizer adamw-8bit
    """
    from memo_runtime.persist import save
    from memo_runtime.reporting.plan_table import plan_table

    tokens = read_tokens("--seq-len", seq_len)
    request = read_request(
        model=model, gpu=gpu, gpus=gpus, budget=budget, host_memory=host_memory, policy=policy, alpha=alpha,
        keep_last=keep_last, optimizer=optimizer, lora=lora, trainable=trainable, max_positions=max_positions,
        output=output,
    )  # fmt: skip

    from memo_runtime.offline.planning import plan_offline
    from memo_runtime.offline.positions import check_positions

    subject = request.subject()
    check_positions(subject, tokens, f"--seq-len {tokens:,}")
    made = plan_offline(
        subject,
        request.machine,
        request.settings,
        tokens=tokens,
        gpus=gpus,
        host_bytes=request.host_bytes,
        optimizer=request.optimizer(),
        progress=teller(),
    )
    if output is not None:
        save(made, output)
    answer(plan_table(made))
