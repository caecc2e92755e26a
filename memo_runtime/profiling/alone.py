"""Whether an operator is token-wise, asked of that operator alone.

In half precision two runs of a block differ by rounding from the first matrix product on, so what an operator gives on
a slice can be compared only roughly with what it gave on the whole, and mixing of less than that hides. Alone, on its
own inputs cut to the slice, nothing before it matters: equal bits mean that it is token-wise, or mixes by less than
the last bit. Where bits differ, which sums of other lengths may explain, it is run again in float64 and has to agree
to 1e-9.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.operators import base_name, written_by
from memo_runtime.blocks.region import tail, take
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.profiling.bounds import check_bounds
from memo_runtime.profiling.compare import Lengths, growing_dims, match, splits
from memo_runtime.profiling.made_up import form, ways_to_ask
from memo_runtime.profiling.observe import OperatorRecord

#: Products of matrices: rows do not meet, and a contraction over tokens loses the token dimension, which shows.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_grouped_mm", "_scaled_mm")
#: What these give is what they are given.
_ITSELF = ("detach", "alias")
#: What these give is filled by others.
_UNFILLED = ("empty", "new_empty", "resize")
#: Running these once more would wait for other ranks.
_COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")


#: Forms of operators that are remembered: those of some hundred models.
_MOST_VERDICTS = 2**14


class Verdict(Enum):
    """What an operator is, by itself."""

    TOKEN_WISE = "token-wise"
    MIXES = "mixes tokens"
    UNKNOWN = "gives other bits on a slice, and does not run in a precision that would tell why"


_verdicts: dict[Hashable, Verdict] = {}


class Given(NamedTuple):
    """The arguments of one operator on the whole and on a slice, leaf by leaf."""

    whole: list[Any]
    part: list[Any]
    spec: _pytree.TreeSpec


def arguments_of(whole: OperatorRecord, part: OperatorRecord) -> Given | None:
    """What both were called with; None: they were called in different ways."""
    full, spec = _pytree.tree_flatten((whole.args, whole.kwargs))
    others, other_spec = _pytree.tree_flatten((part.args, part.kwargs))
    return Given(full, others, spec) if spec == other_spec else None


def judge(whole: OperatorRecord, part: OperatorRecord, lengths: Lengths) -> Verdict | None:
    """Run the operator of ``whole`` on inputs and on their tails, which have the shapes of ``part``'s.

    PyTorch's own are asked on made-up numbers (profiling/made_up.py), since the first batch may hide what they do.
    Those of others may take numbers of some kind only, and are asked on their own first. What these were may have been
    written to since: whether an operator is token-wise does not depend on values. One that is not asked, such as a
    collective, is taken for token-wise, as its result agreed so far. None: nor can it be on inputs of these shapes, and
    it may have others once more is pinned.
    """
    if not _can_be_asked(whole, part):
        return Verdict.TOKEN_WISE
    device = next(tensor.device.type for tensor in whole.inputs)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if whole.key[0].startswith("aten."):
            verdict = _known(whole, part, lengths)
            if verdict is None and not _is_view(whole):
                verdict = _on_its_own(whole, part, lengths)
            return verdict
        verdict = _on_its_own(whole, part, lengths)
        given = arguments_of(whole, part)
        if verdict in (Verdict.TOKEN_WISE, None) and given is not None:
            verdict = _on_made_up(whole, part, lengths, given, tokens_only=True) or verdict
        return verdict


def _known(whole: OperatorRecord, part: OperatorRecord, lengths: Lengths) -> Verdict | None:
    """As ``_on_made_up``, once for all operators of a name and form: a model has the same ones in every block."""
    given = arguments_of(whole, part)
    if given is None:
        return None
    made_of = form(given.whole, given.part, lengths)
    key = (whole.key[0], given.spec, made_of)
    verdict = _verdicts.get(key) if made_of is not None else None
    if verdict is None:
        verdict = _on_made_up(whole, part, lengths, given)
        if verdict is not None and made_of is not None:
            if len(_verdicts) >= _MOST_VERDICTS:
                _verdicts.clear()
            _verdicts[key] = verdict
    return verdict


def _on_its_own(whole: OperatorRecord, part: OperatorRecord, lengths: Lengths) -> Verdict | None:
    cut = _cut(whole, part, lengths)
    if cut is None:
        return None
    return _compared(whole, part, lengths, (_pytree.tree_leaves((whole.args, whole.kwargs)), cut))


def _on_made_up(
    whole: OperatorRecord, part: OperatorRecord, lengths: Lengths, given: Given, *, tokens_only: bool = False
) -> Verdict | None:
    """Token-wise if it is in one of the ways in which its inputs can be cut; None: it takes no such numbers."""
    first: Verdict | None = None
    try:
        for leaves in ways_to_ask(given.whole, given.part, lengths, tokens_only=tokens_only):
            verdict = _compared(whole, part, lengths, leaves)
            if verdict == Verdict.TOKEN_WISE:
                return verdict
            first = first or verdict
    except Exception as error:
        pass_on(error)
        return None
    return first


def _compared(
    whole: OperatorRecord, part: OperatorRecord, lengths: Lengths, leaves: tuple[list[Any], list[Any]]
) -> Verdict | None:
    """By the results on ``leaves``, arguments of the whole and of the slice; None: it does not run on them."""
    full, cut = leaves
    try:
        results = run_alone(whole, full), run_alone(part, cut)
    except Exception as error:
        pass_on(error)
        return None
    if _equal_bits(*results, lengths):
        return Verdict.TOKEN_WISE
    for wide in (torch.float64, torch.float32):
        try:
            results = run_alone(whole, widened(full, wide)), run_alone(part, widened(cut, wide))
        except Exception as error:
            pass_on(error)
            continue
        if all(t.dtype in (wide, torch.complex128) for t in results[0] if t.is_floating_point() or t.is_complex()):
            return Verdict.TOKEN_WISE if _agree(*results, lengths) else Verdict.MIXES
    return Verdict.UNKNOWN


def _can_be_asked(whole: OperatorRecord, part: OperatorRecord) -> bool:
    name = whole.key[0]
    base = base_name(name)
    if base in _PRODUCTS or base in _ITSELF or base.startswith(_UNFILLED) or name.startswith(_COLLECTIVES):
        return False
    if not hasattr(whole.func, "_schema"):
        return False
    if not whole.inputs or any(hasattr(tensor, "__tensor_flatten__") for tensor in whole.inputs):
        return False
    tensors = [value for value in whole.outputs if isinstance(value, torch.Tensor)]
    if _is_view(whole) and not name.startswith("aten."):
        return False
    grows = any(
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and len(growing_dims(a.shape, b.shape) or ()) == 1
        for a, b in zip(whole.outputs, part.outputs, strict=False)
    )
    return grows and any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors)


def _is_view(record: OperatorRecord) -> bool:
    tensors = (value for value in record.outputs if isinstance(value, torch.Tensor))
    return not record.mutable and any(storage_key(tensor) in record.input_storages for tensor in tensors)


def _cut(whole: OperatorRecord, part: OperatorRecord, lengths: Lengths) -> list[Any] | None:
    """The arguments of ``part``, its tensors replaced by the tails of those of ``whole``; None: they do not match."""
    given = arguments_of(whole, part)
    if given is None:
        return None
    cut: list[Any] = []
    for leaf, other in zip(given.whole, given.part, strict=True):
        if not isinstance(leaf, torch.Tensor) or not isinstance(other, torch.Tensor):
            cut.append(other)
            continue
        found = match(leaf, other, lengths)
        if not found.comparable or (len(found.dims) == 1 and found.axis is None):
            return None
        piece = tail(leaf, found.axis, found.dims, tokens=lengths.whole, start=lengths.start) if found.dims else leaf
        if piece.shape != other.shape:
            return None
        cut.append(piece)
    return cut


def run_alone(record: OperatorRecord, leaves: list[Any]) -> list[torch.Tensor]:
    """Results of the operator of ``record``, or what it wrote, which is a copy."""
    if record.mutable:
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    _, spec = _pytree.tree_flatten((record.args, record.kwargs))
    args, kwargs = _pytree.tree_unflatten(leaves, spec)
    check_bounds(record.func, args, kwargs)
    out = record.func(*args, **kwargs)
    if record.mutable:
        out = written_by(record.func, args, kwargs)
    return [leaf for leaf in _pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def widened(leaves: list[Any], wide: torch.dtype) -> list[Any]:
    """``leaves`` in the precision ``wide``, where they are real or complex numbers or their dtype."""

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            if leaf.is_complex():
                return leaf.to(torch.complex128)
            return leaf.to(wide) if leaf.is_floating_point() else leaf
        return wide if isinstance(leaf, torch.dtype) and leaf.is_floating_point else leaf

    return [widen(leaf) for leaf in leaves]


def _agree(whole: list[torch.Tensor], part: list[torch.Tensor], lengths: Lengths) -> bool:
    """Equal up to rounding; what has two token dimensions is saved whole and needs not."""
    found = [match(a, b, lengths) for a, b in zip(whole, part, strict=True)]
    return all(each.equal or len(each.dims) > 1 or not a.numel() for each, a in zip(found, whole, strict=True))


def _equal_bits(whole: list[torch.Tensor], part: list[torch.Tensor], lengths: Lengths) -> bool:
    for a, b in zip(whole, part, strict=True):
        dims = growing_dims(a.shape, b.shape)
        if not a.numel() or (dims is not None and len(dims) > 1):
            continue
        if not dims:
            equal = torch.equal(a, b)
        else:
            axes = splits(a.shape, b.shape, dims[0], lengths)
            equal = any(torch.equal(take(a, axis, lengths.whole, lengths.start, lengths.whole), b) for axis in axes)
        if not equal:
            return False
    return True
