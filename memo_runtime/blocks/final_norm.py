"""The norm behind a stack: which module that is, and from what size on it runs by tiles.

As it is, a norm in half precision takes twelve times its input while it goes backward, since it works in float32 on
all tokens at once: at a million tokens more than all blocks keep. By tiles (``execution/norm.py``) it takes its input,
its result and their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from memo_runtime.units import GiB

#: Bytes of a hidden state from which it does.
LONG_BYTES = GiB


def can_run_by_tiles(norm: nn.Module) -> bool:
    """No forward of the instance's own is in the way, but what a wrapped model has put there."""
    own = vars(norm).get("forward")
    return own is None or getattr(own, "runs_by_tiles", False)


def final_norm(model: nn.Module, blocks: Sequence[str]) -> nn.Module | None:
    """The one module called a norm beside the container of ``blocks`` (names); None: there is none, or several."""
    stacks = {name.rpartition(".")[0] for name in blocks}
    owners = {stack.rpartition(".")[0] for stack in stacks}
    if len(stacks) != 1 or "" in stacks:
        return None
    owner = model.get_submodule(owners.pop())
    found = [child for child in owner.children() if "norm" in type(child).__name__.lower()]
    return found[0] if len(found) == 1 and next(found[0].parameters(), None) is not None else None
