"""``memo check``: losses and gradients of a wrapped model against the unwrapped one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from memo_runtime.cli.answering import answer
from memo_runtime.cli.exits import ExitCode

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def check(
    *,
    model: Annotated[
        str,
        typer.Option(
            help="llama, qwen3, gpt2 (tiny, random weights), or module:factory giving (model, batch)."
        ),
    ] = "llama",
    policy: Annotated[
        str | None,
        typer.Option(
            help="auto, none, memo, swap, recompute, replay or tiled; if not given, memo with half of the tokens "
            "swapped and half run again."
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Swap fraction for memo and replay: 0 recomputes, 1 swaps.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=" or ".join(_DTYPES) + ".")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seq_len: Annotated[
        str, typer.Option(help="Tokens of a sequence, such as 256 or 4K (tiny models).")
    ] = "192",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences (tiny models).")] = 2,
    keep_last: Annotated[
        int, typer.Option(min=0, help="Blocks at the end of the stack that keep their activations.")
    ] = 0,
    budget: Annotated[str | None, typer.Option(help="Device memory, such as 70GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Host memory, such as 200GiB.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and batch.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare one training step, wrapped against unwrapped.

    Exits with 0 where losses and gradients are within the bound, and with 1 where they are not. The answer says
    how much was moved to the host and computed again: what was not exercised was not checked.

    \b
    Examples:
      memo check
      memo check --model qwen3 --policy memo --alpha 0.37 --dtype float64
      memo check --model mypackage.mymodel:make --policy swap --device cuda
    """
    _validate(policy, alpha, budget, host_memory)
    import torch

    from memo_runtime import api
    from memo_runtime.arguments import check_shapes, check_weights
    from memo_runtime.cli.models import make_model
    from memo_runtime.cli.placing import find_device, place

    tokens = _tokens(seq_len)
    if dtype not in _DTYPES:
        raise typer.BadParameter(
            f"'{dtype}' is unknown; there are {', '.join(_DTYPES)}", param_hint="--dtype"
        )
    target = find_device(device)
    torch.manual_seed(seed)
    made, batch = make_model(model, sequences=batch_size, tokens=tokens)
    check_shapes(made)
    check_weights(made)
    made, batch = place(made, batch, target, getattr(torch, dtype))
    result = api.check(
        made, batch, policy=policy, alpha=alpha, budget=budget, host_budget=host_memory, keep_last=keep_last
    )
    answer(json.dumps(asdict(result)) if as_json else str(result))
    raise typer.Exit(ExitCode.OK if result.ok else ExitCode.BUG)


def _validate(policy: str | None, alpha: float | None, budget: str | None, host_memory: str | None) -> None:
    from memo_runtime.arguments import check_budgets
    from memo_runtime.config import make_settings

    try:
        check_budgets(make_settings(policy=policy or "memo", alpha=alpha, budget=budget, host_budget=host_memory))
    except ValueError as error:
        said = str(error).replace("host_budget=", "--host-memory ").replace("host_budget", "--host-memory")
        raise typer.BadParameter(said) from error


def _tokens(text: str) -> int:
    from memo_runtime.units import parse_tokens

    try:
        return parse_tokens(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--seq-len") from error
