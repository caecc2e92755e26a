"""How a block's profile changes with the length of another stack's sequence that it is given: cross-attention.

A decoder's block is calibrated at its own lengths, with the encoder's states as they came. What it saves of those grows
with their number, and bytes for each pair of tokens with both. When a batch comes in which the other stack has another
length, the block is calibrated there and at a third length, and where all three lie on a line every pair of lengths is
known from then on. Batches that change the number of sequences as well are profiled anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction

from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.calibrate import calibrate_again
from memo_runtime.profiling.growth import times
from memo_runtime.profiling.rows import on_line, on_one_line, repeated, same_sizes
from memo_runtime.profiling.start import Start
from memo_runtime.records import BlockProfile

#: Fewer tokens of the other stack are no length to learn from: a single one broadcasts.
_MIN_LENGTH = 4


@dataclass(frozen=True, slots=True)
class PairLaw:
    """One block at any length of another stack.

    Attributes:
        stack: the other stack; None: it cannot be told which, and the law stays unknown.
        length: of the other stack's sequence in the profiled call.
        points: the block calibrated at other lengths. line: two lengths through which everything is linear.
        certain: a third length lies on the line. seen: other lengths were looked at.
    """

    stack: int | None
    length: int = 0
    points: dict[int, BlockProfile] = field(default_factory=dict)
    line: tuple[int, int] | None = None
    certain: bool = False
    seen: bool = False

    def at(self, profile: BlockProfile, length: int) -> BlockProfile:
        """``profile``, which is of this law's length, where the other stack has ``length`` tokens."""
        if length == self.length or self.line is None:
            return profile
        shares = {self.length: profile, **self.points}
        sizes = shares.get(length) or on_line(shares, self.line, length)
        if sizes is None:
            return profile
        # More than they need where they hold little of the other sequence.
        ratio = max(Fraction(1), Fraction(length, self.length))
        return replace(
            profile,
            saved=sizes.saved,
            groups=sizes.groups,
            pins=sizes.pins,
            forward_flops=sizes.forward_flops,
            rerun_flops=sizes.rerun_flops,
            recompute_flops=sizes.recompute_flops,
            forward_peak=times(profile.forward_peak, ratio),
            backward_peak=times(profile.backward_peak, ratio),
            rerun_peak=times(profile.rerun_peak, ratio),
        )


def pair_law(call: BlockCall, profile: BlockProfile, others: Iterable[BlockProfile]) -> PairLaw | None:
    """The law of a block that is given what blocks of ``others`` (other stacks) made; None: it is given nothing.

    Only its own length is known so far.
    """
    lengths = {other.tokens: other.stack for other in others if other.tokens and other.stack != profile.stack}
    handed = [tensor for leaf, tensor in call.tensors() if leaf != profile.input_leaf]
    found = {size for tensor in handed for size in tensor.shape if size in lengths}
    if not found:
        return None
    length = found.pop()
    if found or length == profile.tokens or length < _MIN_LENGTH:
        return PairLaw(None)
    return PairLaw(lengths[length], length)


def measure_pairs(
    block: nn.Module, forward: Forward, call: BlockCall, start: Start, *,
    known: BlockProfile, law: PairLaw, length: int,
) -> PairLaw:  # fmt: skip
    """``law`` of a block whose profile is ``known``, measured with a ``call`` in which the other has ``length``."""
    unknown = replace(law, seen=True)
    dims = _dims(call, known, length)
    if not dims or length < _MIN_LENGTH:
        return unknown
    # All of the other's tokens and some of them twice: where padding is cut away, masks do not do what they do.
    third = length + length // 3
    third += third == law.length
    longer = call.replaced({leaf: repeated(call.leaves[leaf], dim, third) for leaf, dim in dims.items()})
    points: dict[int, BlockProfile] = {}
    for at, other in ((length, call), (third, longer)):
        try:
            found = calibrate_again(block, forward, other, known, start)
        except Exception as error:
            pass_on(error)
            return unknown
        if found is None:
            return unknown
        points[at] = found
    at_all, line = {law.length: known, **points}, (law.length, length)
    if not on_one_line(at_all, *line, third):
        return unknown
    predicted = on_line(at_all, line, third)
    certain = predicted is not None and same_sizes(predicted, points[third])
    return replace(unknown, points=points, line=line if certain else None, certain=certain)


def _dims(call: BlockCall, profile: BlockProfile, length: int) -> dict[int, int]:
    """Dimension of the other stack's tokens by leaf; empty where it cannot be told from others."""
    own = {axes.leaf: axes.dims for axes in profile.arguments}
    if length == call.leaves[profile.input_leaf].shape[profile.token_dim]:
        return {}
    found: dict[int, int] = {}
    for leaf, tensor in call.tensors():
        dims = [d for d, size in enumerate(tensor.shape) if size == length and d not in own.get(leaf, ())]
        if len(dims) > 1:
            return {}
        if dims and leaf != profile.input_leaf:
            found[leaf] = dims[0]
    return found
