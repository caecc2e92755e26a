"""What ``--model`` of the offline verbs names, on the meta device."""

from __future__ import annotations

import torch

from memo_runtime.api import as_batch
from memo_runtime.cli.models import model_from_factory
from memo_runtime.offline.subject import Subject, subject_named, subject_of


def make_subject(name: str, max_positions: int | None = None) -> Subject:
    """A known name, a config.json, or what a factory makes with the meta device as default.

    Raises:
        ArgumentError: none of them. typer.BadParameter: a factory that fails, with its own error.
    """
    if ":" in name:
        with torch.device("meta"):
            model, batch = model_from_factory(name)
        return subject_of(name, model, as_batch(batch), max_positions=max_positions)
    return subject_named(name, max_positions=max_positions)
