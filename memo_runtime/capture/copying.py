"""A copy of a block's structure over other parameters and buffers.

Hooks of the block itself, a forward installed over its own, and what FSDP makes of its class are left out: the copy is
the block as its author wrote it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.failures import first_line
from memo_runtime.blocks.names import AS_IT_IS
from memo_runtime.errors import CaptureRefusedError

#: Where modules keep their hooks; ``HOOK_TABLES`` are those that run something.
HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TABLES = (
    *HOOK_TABLES, "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
#: Attributes that are not the author's: a forward that we installed, and what hides it from copies
#: (execution/install.py), or ``Module.compile``. Another forward on an instance has been refused before.
_INSTALLED = ("forward", "__getstate__", "_compiled_call_impl")
#: What ``torch.distributed`` keeps its own state under, on a module.
_DISTRIBUTED = "__composable_api_state_key"


def plain_class(block: nn.Module) -> type[nn.Module]:
    """The class of ``block`` beneath the one that ``fully_shard`` puts over it."""
    found: type[nn.Module] = type(block)
    return next(base for base in found.__mro__ if issubclass(base, nn.Module) and not _is_sharded(base))


def _is_sharded(one: type) -> bool:
    sharded = getattr(torch.distributed, "fsdp", None)
    marker = getattr(sharded, "FSDPModule", None)
    return marker is not None and issubclass(one, marker)


def structural_copy(block: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """A copy of ``block`` in which ``tensors[id(one)]`` stands for parameter or buffer ``one``.

    Raises:
        CaptureRefusedError: something in it cannot be copied.
    """
    memo: dict[Any, Any] = {**tensors, AS_IT_IS: True}
    modules = list(block.modules())
    for one in modules:
        made = plain_class(one)
        memo[id(one)] = made.__new__(made)
    for one in modules:
        for name, value in _state(one).items():
            try:
                memo[id(one)].__dict__[name] = copy.deepcopy(value, memo)
            except Exception as error:
                what = f"the block cannot be copied: '{name}' of its {type(one).__name__}: {first_line(error)}"
                raise CaptureRefusedError("copy.deepcopy", what) from error
    copied: nn.Module = memo[id(block)]
    return copied


def _state(module: nn.Module) -> dict[str, Any]:
    """What belongs to the module itself.

    Not by ``__getstate__``: parametrised modules refuse to be copied by it.
    """
    own = (name for name in module.__dict__ if name not in _INSTALLED and not name.startswith(_DISTRIBUTED))
    state = {name: module.__dict__[name] for name in own}
    state.update({table: type(state[table])() for table in _TABLES if table in state})
    return state
