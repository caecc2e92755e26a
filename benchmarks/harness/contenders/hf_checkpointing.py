"""Checkpointing by the public method of Hugging Face models, with and without its host offload.

``offload`` is an argument of its own: among ``gradient_checkpointing_kwargs`` 5.17 accepts it and does nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.harness.contenders.packages import SkippedError
from benchmarks.harness.geometry import Scope
from benchmarks.harness.subject import Subject

#: What the documentation of transformers enables it with.
_CHECKPOINTING = {"use_reentrant": False}
#: 5.24 has the first name, and the second as a deprecated alias; 5.17 only the second.
_ENABLERS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


def enable_checkpointing(subject: Subject, *, offload: bool = False) -> dict[str, Any]:
    """Checkpoint the subject's blocks by a model's own method; the settings, as a row says them.

    Raises:
        SkippedError: this transformers has no ``offload``.
    """
    enable = _enabler(owner(subject))
    first = next(iter(inspect.signature(enable).parameters))
    enable(**{first: _CHECKPOINTING}, offload=offload)
    return {enable.__name__: {first: _CHECKPOINTING, "offload": offload}}


def owner(subject: Subject) -> nn.Module:
    """The pretrained model whose blocks these are, for what others do to models."""
    if subject.settings.scope == Scope.STEP:
        return subject.model
    from transformers import AutoModel

    # The method belongs to models: one without blocks is made, and given these. Nothing of it ever runs.
    config = type(subject.config).from_dict({**subject.config.to_dict(), "num_hidden_layers": 0})
    shell = AutoModel.from_config(config)
    shell.layers = subject.model.layers
    return shell


def _enabler(model: nn.Module) -> Callable[..., Any]:
    for name in _ENABLERS:
        method: Callable[..., Any] | None = getattr(model, name, None)
        if method is not None and "offload" in inspect.signature(method).parameters:
            return method
    raise SkippedError(
        "gradient_checkpointing_enable of this transformers takes no offload: pip install 'transformers>=5.17'"
    )
