"""Finding other memory optimisers in the same step: two of them fight, silently. They are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.members import modules_of
from memo_runtime.errors import OffloaderActiveError

_WRAPPERS = {
    "CheckpointWrapper": "torch's checkpoint_wrapper (apply_activation_checkpointing)",
    "OffloadWrapper": "torch's offload_wrapper",
}
#: Of a module, by which transformers turns checkpointing on.
_SWITCH = "gradient_checkpointing"
_ADVICE = "memo plans swap and recompute itself"


def refuse_other_optimisers(modules: Sequence[nn.Module], blocks: set[int]) -> None:
    """Raise if gradient checkpointing or an offloader is switched on in a model.

    Args:
        modules: the wrapped model and all modules in it (``modules_of``). blocks: identities of its managed blocks.

    Raises:
        OffloaderActiveError: names the optimiser, where it is, and how to switch it off.
    """
    model = modules[0]
    for module in modules:
        if _checkpoints(module):
            raise OffloaderActiveError(
                f"gradient checkpointing is on in '{_name(model, module)}' ({type(module).__name__}): "
                f"{_ADVICE}. Call model.{_disabling(model)}(), and leave gradient_checkpointing=True "
                "(activation_checkpointing=True) out of the trainer's arguments, or do not wrap"
            )
        kind = type(module).__name__
        if kind in _WRAPPERS and _touches(module, blocks):
            around = f"{_WRAPPERS[kind]} is around '{_name(model, module)}'"
            raise OffloaderActiveError(f"{around}: {_ADVICE}. Remove that wrapper")
        hook = module.__dict__.get("_hf_hook")
        if hook is not None and getattr(hook, "offload", False):
            raise OffloaderActiveError(
                f"accelerate offloads the weights of '{_name(model, module)}' ({type(hook).__name__}): {_ADVICE}, and "
                "needs them on the device. Load the model without device_map offloading"
            )


def _checkpoints(module: nn.Module) -> bool:
    # A module is slow to say that it has no such attribute, and this is asked of each at every step.
    kind: Any = type(module)
    if _SWITCH in module.__dict__ or _has_switch(kind):
        return getattr(module, _SWITCH, False) is True
    return False


@lru_cache(maxsize=4096)
def _disabling(model: nn.Module) -> str:
    """The method that turns it off: transformers has another name for it since 5.24."""
    newer = "activation_checkpointing_disable"
    return newer if hasattr(model, newer) else "gradient_checkpointing_disable"


def _has_switch(kind: Any) -> bool:
    return hasattr(kind, _SWITCH)


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module) or type(model).__name__


def _touches(module: nn.Module, blocks: set[int]) -> bool:
    return any(id(inner) in blocks for inner in modules_of(module))


def active_hooks() -> Any:
    """The pair of saved-tensor hooks that is active on this thread, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def refuse_active_hooks() -> None:
    """Raise if saved-tensor hooks of somebody else surround the step.

    Raises:
        OffloaderActiveError: names the hook.
    """
    hooks = active_hooks()
    if not hooks:
        return
    pack = hooks[0]
    owner = getattr(pack, "__self__", None)
    name = type(owner).__name__ if owner is not None else getattr(pack, "__qualname__", repr(pack))
    module = getattr(pack, "__module__", "") or type(owner).__module__
    raise OffloaderActiveError(
        f"saved-tensor hooks of {module}.{name} are active around this step (torch.utils.checkpoint, save_on_cpu, or "
        f"an activation offloader such as TRL's): {_ADVICE}. Leave that context, or do not wrap"
    )


def refuse_backward(block: str) -> None:
    """Raise if ``block`` starts a forward inside a backward pass: somebody else runs it again.

    Raises:
        OffloaderActiveError: names the block.
    """
    if torch._C._current_graph_task_id() != -1:
        raise OffloaderActiveError(
            f"'{block}' is run again inside a backward pass (torch.utils.checkpoint with use_reentrant=True is around "
            f"it): {_ADVICE}. Call the block without checkpoint, or do not wrap"
        )
