"""``memo profile``: measures a model of the user's and writes what was found, for planning later or elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memo_runtime.cli.answering import answer


def profile(
    *,
    model: Annotated[str, typer.Option(help="module:factory, or a tiny model: llama, qwen3, gpt2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the profile goes, as JSON.")],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; where the model is moved to.")] = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence for the tiny models.")] = 256,
) -> None:
    """Measure one forward and backward of every kind of block, without training.

    A factory is a function without parameters that returns (model, batch). The profile is planned from with
    memo.plan(memo_runtime.persist.load_profile(file), ...), on any machine.

    \b
    Examples:
      memo profile --model mypackage.mymodel:make --device cuda -o profile.json
      memo show profile.json
    """
    from memo_runtime.output import check_writable

    check_writable(output)

    import torch
    from torch.utils import _pytree

    from memo_runtime.api import profile as measure
    from memo_runtime.cli.models import make_model
    from memo_runtime.errors import DeviceUnavailableError
    from memo_runtime.persist import save
    from memo_runtime.reporting.profile_table import profile_table

    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"'{device}' is no device: give cpu, cuda or cuda:N", param_hint="--device") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailableError(f"there is no {device} here: {torch.cuda.device_count()} CUDA devices are seen")
    subject, batch = make_model(model, sequences=1, tokens=tokens)
    moved = _pytree.tree_map(lambda leaf: leaf.to(chosen) if isinstance(leaf, torch.Tensor) else leaf, batch)
    found = measure(subject.to(chosen), moved)
    save(found, output)
    answer(profile_table(found))
