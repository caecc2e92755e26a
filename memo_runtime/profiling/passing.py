"""What a block hands on in a pass over a model, told from a run of it on a crop.

Such a pass needs a tensor like the block's result, and nothing of what is in it. To make it by the block's own forward
at full length takes its attention there (half a minute at two million tokens), and an MLP that no plan would hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.reach import reach
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.start import Roots, Start, cut_graphs, is_like
from memo_runtime.profiling.trial import crop_tokens
from memo_runtime.records import BlockProfile

#: Crops in a call for which this pays: shorter ones are run as they are.
_LONG = 8


def passed_on(
    forward: Forward, call: BlockCall, profile: BlockProfile, start: Start, roots: Roots
) -> torch.Tensor | None:
    """A result like that of ``forward`` on ``call``: its input's values, with a gradient where the result has one.

    None where a crop does not tell: it yields something else than a tensor like its input, or leaves something behind
    for the blocks above.

    Args:
        start: where the run begins, and what is put back behind it. roots: all that a run may change.
    """
    hidden: torch.Tensor = call.leaves[profile.input_leaf]
    few = crop_tokens(hidden.device.type)
    changes = profile.stateful or profile.draws or profile.inner_autograd
    if changes or not profile.sliceable or profile.tokens < _LONG * few or not hidden.is_contiguous():
        return None
    crop = call.cut(profile.arguments, 0, few).detached(fresh=(profile.input_leaf,))
    args, kwargs = crop.arguments()
    watched = [*roots, ("its arguments", (args, kwargs))]
    with start.kept(), torch.enable_grad(), saved_tensors_hooks(lambda _: None, _never):
        before = reach(watched)
        try:
            output = start.every_time(forward)(*args, **kwargs)
        except Exception as error:
            pass_on(error)
            return None
        left = cut_graphs(before, watched) or bool(start.left_outside())
    given = crop.leaves[profile.input_leaf]
    if left or start.wrote or start.drew or not (is_like(output, given) and output.is_contiguous()):
        return None
    alias = hidden.detach()
    # No leaf where it has a gradient: what comes behind may write into it.
    return (alias.requires_grad_() if output.requires_grad else alias).clone()


def _never(_: Any) -> torch.Tensor:
    raise AssertionError("the graph of a run on a crop is never walked backward")
