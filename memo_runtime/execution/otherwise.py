"""A block that is called in another way than it was planned for: with a mask where it had none, or the reverse.

Its plan says where each saved tensor goes, and this call saves others. Where a plan for such calls is known it is
adopted before the first block runs. Where it is not, blocks are run again as a whole in this step, unless their policy
never runs anything again: that takes no more than their input to the host, and is right whatever they save.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from memo_runtime.blocks.call import NO_TENSOR, BlockCall
from memo_runtime.config import Policy
from memo_runtime.errors import BlockFallbackError
from memo_runtime.records import BlockPlan, BlockProfile, Executor

if TYPE_CHECKING:
    from memo_runtime.execution.session import Session

_REASON = "it was called with {now} where it was planned for {planned}, so in this step it is run again as a whole"
#: Policies that run nothing again: a call that was not foreseen is swapped whole, or kept.
_NEVER = (Policy.SWAP, Policy.NONE)
_NO_INPUT = "it was called without an input that has the dimension of its tokens, {dim}, as when it was profiled"
_NEXT = (
    "Batches that call it so are profiled and planned for themselves as soon as that can be told before their step, "
    "unless a plan was given (plan=; make it from a profile of a batch that is called so, as long as those to come) or "
    "parameters are sharded"
)


def plan_for_way(
    session: Session, name: str, call: BlockCall, profile: BlockProfile, plan: BlockPlan
) -> tuple[BlockProfile, BlockPlan]:
    """Profile and plan of block ``name`` for a call that goes another way than ``profile``.

    Raises:
        BlockFallbackError: there is none, and ``strict``.
        PlanInfeasibleError, HostLimitError: there is one that does not fit.
    """
    way = call.way()
    if session.adopts_other_way(name, way):
        found, planned = session.decision(name)
        if found is not None and planned is not None and found.way == way:
            return found, planned
    if profile.tokens:
        # Where its input is may be another place too.
        leaf = call.input_leaf
        if leaf is None or call.leaves[leaf].dim() <= profile.token_dim:
            reason = _NO_INPUT.format(dim=profile.token_dim)
            session.note_native(name, reason)
            return profile, replace(plan, executor=Executor.NATIVE, reason=reason)
        profile = replace(profile, input_leaf=leaf)
    managed = plan.executor in (Executor.RECOMPUTE, Executor.REPLAY, Executor.KEEP)
    if not managed or session.policy in _NEVER or not profile.rerunnable or not profile.tokens:
        return profile, plan
    reason = _REASON.format(now=_words(way, profile.way), planned=_words(profile.way, way))
    if session.strict:
        raise BlockFallbackError(f"strict=True and '{name}' cannot take its plan in this step: {reason}. {_NEXT}")
    session.note(f"a block was not called as it was planned: {reason}. {_NEXT}")
    cautious = replace(
        profile,
        sliceable=False, replayable=False, dynamic=True, random=True, stateful=True, draws=True, reason=reason,
    )  # fmt: skip
    return cautious, replace(plan, executor=Executor.RECOMPUTE, prefix=0, device_rows=0, reason=reason)


def _words(way: str, other: str) -> str:
    """What a call has where ``other`` has something else: 'bool[4d] as its value 1'."""
    mine, others = way.split(), other.split()
    if len(mine) != len(others):
        return f"{len(mine)} values"
    pairs = enumerate(zip(mine, others, strict=True))
    words = ((index, "no tensor" if one == NO_TENSOR else one) for index, (one, two) in pairs if one != two)
    return ", ".join(f"{word} as its value {index}" for index, word in words)
