"""Mixers of a captured block that run through autograd's graph: what they are called, and how they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from memo_runtime.blocks.ambient import AutocastState
from memo_runtime.capture.captured import Captured
from memo_runtime.capture.flash import OPERATOR as FLASH
from memo_runtime.capture.flash import FlashCall, flash_call
from memo_runtime.capture.rules import operator_name
from memo_runtime.capture.split import Mixer
from memo_runtime.execution.tiled_programs import run_node


def kernel_name(mixer: Mixer) -> str:
    """What reports call it: ``mylib::scan``."""
    if operator_name(mixer.node) == FLASH:
        return f"flash_attn.{_flash(mixer).function.__name__}"
    return str(mixer.node.target).rsplit(".", 1)[0].replace(".", "::")


def _flash(mixer: Mixer) -> FlashCall:
    key: Any = mixer.node.args[1]
    return flash_call(key)


def mixer_operator(
    captured: Captured, mixer: Mixer, tokens: int, autocast: AutocastState
) -> Callable[[Sequence[torch.Tensor]], Any]:
    """The operator of ``mixer`` as a function of its tensors, for ``tokens``, under the precision of the call."""

    def run(tensors: Sequence[torch.Tensor]) -> Any:
        values: dict[fx.Node, Any] = dict(zip(mixer.inputs, tensors, strict=True))
        with autocast.uncached().restored():
            if operator_name(mixer.node) == FLASH:
                given: Any = mixer.node.args[0]  # one tensor may be several of its arguments
                return _flash(mixer).run([values[one] for one in given])
            return run_node(mixer.node, values, lambda size: captured.size(size, tokens))

    return run
