"""Hugging Face's own checkpointing with block inputs on the host: ``gradient_checkpointing_enable(offload=True)``.

``offload`` is an argument of its own: among ``gradient_checkpointing_kwargs`` 5.17 accepts it and does nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.harness.contenders.checkpoint import Checkpoint
from benchmarks.harness.contenders.packages import SkippedError, need_gpu
from benchmarks.harness.geometry import Scope

#: What the documentation of transformers enables it with.
_CHECKPOINTING = {"use_reentrant": False}
#: 5.24 has the first name, and the second as a deprecated alias; 5.17 only the second.
_ENABLERS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


class HfOffload(Checkpoint):
    """Full recomputation by the model's own public method, inputs of blocks on the host."""

    def install(self) -> None:
        """The model's own method in scope ``step``; in scope ``blocks``, a model's around these blocks.

        Raises:
            SkippedError: this transformers has no such argument, or there is no GPU.
        """
        need_gpu("hf-offload", self.device, "it pins host memory")
        self.subject.tile_loss()
        enable = _enabler(self._owner())
        first = next(iter(inspect.signature(enable).parameters))
        enable(**{first: _CHECKPOINTING}, offload=True)
        self.settings[enable.__name__] = {first: _CHECKPOINTING, "offload": True}

    def _owner(self) -> nn.Module:
        """The pretrained model whose blocks these are."""
        if self.subject.settings.scope == Scope.STEP:
            return self.subject.model
        from transformers import AutoModel

        # The method belongs to models: one without blocks is made, and given these. Nothing of it ever runs.
        config = type(self.subject.config).from_dict({**self.subject.config.to_dict(), "num_hidden_layers": 0})
        shell = AutoModel.from_config(config)
        shell.layers = self.subject.model.layers
        return shell


def _enabler(model: nn.Module) -> Callable[..., Any]:
    for name in _ENABLERS:
        method: Callable[..., Any] | None = getattr(model, name, None)
        if method is not None and "offload" in inspect.signature(method).parameters:
            return method
    raise SkippedError(
        "gradient_checkpointing_enable of this transformers takes no offload: pip install 'transformers>=5.17'"
    )
