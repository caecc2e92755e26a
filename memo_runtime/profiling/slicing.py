"""Finding what must be pinned so that a block can be run again on a slice of its tokens.

The block is run on a whole (short) sequence and on its tail. An operator whose inputs agree on the tail and whose
output does not is one that mixes tokens, counts positions or draws random numbers: its result is pinned, and the
tail is run again. Operators that are known to (attention, dropout, top-k), and those that lose a token dimension
(a product over tokens, a mean), are pinned whatever their values. One whose result agrees is asked alone as well
(profiling/alone.py), since two runs of a block agree only roughly. In the end every tensor saved for backward must
agree; otherwise the block is not sliceable, and the reason names the operator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import dropwhile

import torch

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.blocks.operators import base_name, pin_kind
from memo_runtime.blocks.pins import PinKey, Value, Values, pin_values
from memo_runtime.blocks.region import tail
from memo_runtime.blocks.rerun import Forward, storage_key
from memo_runtime.profiling.alone import Verdict, judge
from memo_runtime.profiling.compare import Lengths, Match, growing_dims, match, tokens_hidden
from memo_runtime.profiling.observe import Observation, OperatorRecord, observe
from memo_runtime.profiling.origins import Origins
from memo_runtime.records import ArgumentAxes, PinKind, TokenAxis

logger = logging.getLogger("memo_runtime")

_MAX_ROUNDS = 8
_ATTENTION = "scaled_dot_product"
#: The first dimension of what attention yields, [B, H, S, D], that is no other sequence.
_HEADS = 1

#: Operators that only make room: what is wrong in their result was written by somebody else.
_UNFILLED = ("empty", "new_empty", "zeros", "new_zeros", "ones", "new_ones", "full", "new_full")


#: Of these, those whose result holds anything at all.
_RANDOM_MEMORY = ("empty", "new_empty")


@dataclass(slots=True)
class Slicing:
    """What a rerun on a slice needs, or why there is none; ``verdicts`` are of the operators that were asked alone.

    ``final``: pins that hold what the forward has made of a result by writing to views of it, which are pinned as well.
    """

    pins: dict[PinKey, PinKind] = field(default_factory=dict)
    final: frozenset[PinKey] = frozenset()
    axes: dict[tuple[PinKey, int], TokenAxis | None] = field(default_factory=dict)
    squares: dict[tuple[PinKey, int], tuple[int, ...]] = field(default_factory=dict)
    saved: list[Match] = field(default_factory=list)
    verdicts: dict[PinKey, Verdict] = field(default_factory=dict)
    reason: str = ""

    @property
    def mixes(self) -> bool:
        """An operator mixes tokens of the dimension that was sliced.

        Attention of sequences beside each other is pinned as well, and mixes other tokens than these.
        """
        return any(kind == PinKind.MIXER and not self._is_beside(key) for key, kind in self.pins.items())

    def values_of(self, record: OperatorRecord) -> dict[int, Value]:
        """What the pin of ``record`` holds."""
        return pin_values(record.key[0], record.outputs) if record.key in self.final else record.pin_values()

    def _is_beside(self, key: PinKey) -> bool:
        axis = self.axes.get((key, 0))
        return _ATTENTION in key[0] and axis is not None and axis.dim < _HEADS



def named_pins(observation: Observation) -> dict[PinKey, PinKind]:
    """Operator calls that are pinned by their name alone."""
    found = {record.key: pin_kind(record.key[0]) for record in observation.operators}
    return {key: kind for key, kind in found.items() if kind is not None}


def full_values(observation: Observation, slicing: Slicing) -> dict[PinKey, dict[int, Value]]:
    """The pins' values as the forward gave them, for a rerun at full length."""
    records = observation.by_key()
    return {key: slicing.values_of(records[key]) for key in slicing.pins if key in records}


def _axes_of(
    value: Value, shape: torch.Size | None, lengths: Lengths
) -> tuple[TokenAxis | None, tuple[int, ...]]:
    """(token axis, token dimensions if there are two) of a pinned value.

    ``shape`` is what a run on the tail gave, where it is known.
    """
    if not isinstance(value, torch.Tensor) or value.numel() == 0 or shape is None:
        return None, ()
    dims = growing_dims(value.shape, shape)
    if not dims:
        return None, ()
    if len(dims) > 1:
        return None, tuple(dim for dim in dims if value.shape[dim] == lengths.whole)
    size, part = value.shape[dims[0]], shape[dims[0]]
    if size % lengths.whole or part % lengths.part or size // lengths.whole != part // lengths.part:
        return None, ()  # padded to a multiple: used whole
    factor = size // lengths.whole
    outer = lengths.batch if factor % lengths.batch == 0 else factor
    return TokenAxis(dim=dims[0], outer=outer, inner=factor // outer), ()


def _find_axes(
    whole: Observation, shapes: Mapping[PinKey, tuple[torch.Size | None, ...]], slicing: Slicing, lengths: Lengths
) -> None:
    """Learn where the tokens of every pinned value are."""
    records = whole.by_key()
    for key in slicing.pins:
        known = shapes.get(key, ())
        for index, value in slicing.values_of(records[key]).items():
            shape = known[index] if index < len(known) else None
            slicing.axes[key, index], slicing.squares[key, index] = _axes_of(value, shape, lengths)


def tail_values(whole: Observation, slicing: Slicing, lengths: Lengths) -> dict[PinKey, Values]:
    """The pins' values on tokens [start, whole), by the token axes that were found."""
    values: dict[PinKey, Values] = {}
    records = whole.by_key()
    for key in slicing.pins:
        parts: dict[int, Value] = {}
        for index, value in slicing.values_of(records[key]).items():
            if isinstance(value, torch.Tensor):
                value = tail(
                    value, slicing.axes.get((key, index)), slicing.squares.get((key, index), ()),
                    tokens=lengths.whole, start=lengths.start,
                )  # fmt: skip
            parts[index] = value
        values[key] = parts
    return values


def _shapes(observation: Observation) -> dict[PinKey, tuple[torch.Size | None, ...]]:
    return {
        record.key: tuple(value.shape if isinstance(value, torch.Tensor) else None for value in record.outputs)
        for record in observation.operators
    }


def _token_dims(whole: OperatorRecord, part: OperatorRecord) -> tuple[int, int]:
    """(most token dimensions of an input, most of an output)."""

    def most(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
        return max((len(growing_dims(a.shape, b.shape) or ()) for a, b in pairs), default=0)

    inputs = list(zip(whole.inputs, part.inputs, strict=False))
    outputs = [
        (a, b)
        for a, b in zip(whole.outputs, part.outputs, strict=False)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]
    return most(inputs), most(outputs)


def _pinnable(record: OperatorRecord) -> bool:
    """Integers found by value are an order of tokens or a count: cutting them would point past the slice.

    Booleans are not: a block that cuts its causal mask out of a buffer takes the wrong part of it on a slice. A
    ``detach`` makes nothing, and who watches a run detaches too: the n-th of a profile is another one in the step.
    """
    if record.func is torch.ops.aten.detach.default:
        return False
    tensors = [value for value in record.outputs if isinstance(value, torch.Tensor)]
    values = all(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in tensors)
    return not record.lists and (not record.inputs or values)


def _find_faults(
    whole: Observation, part: Observation, lengths: Lengths, verdicts: dict[PinKey, Verdict]
) -> tuple[dict[PinKey, PinKind], str]:
    """Operators whose inputs agree and whose outputs do not; or the one that cannot be pinned.

    ``verdicts``: what operators are by themselves, as far as they were asked.
    """
    records = whole.by_key()
    counts, part_counts = whole.counts(), part.counts()
    disagree: set[int] = set()
    spoiled: set[int] = set()  # storages into which something was written that does not agree
    faults: dict[PinKey, PinKind] = {}
    for record in part.operators:
        reference = records.get(record.key)
        if record.replaced:
            continue
        known = any(id(tensor) in disagree for tensor in record.inputs) or not spoiled.isdisjoint(record.input_storages)
        if reference is not None and _agrees(reference, record, lengths):
            if _alone(reference, record, lengths, verdicts) == Verdict.TOKEN_WISE:
                continue
            known = False  # by itself, whatever its inputs
        disagree.update(id(value) for value in record.outputs if isinstance(value, torch.Tensor))
        if record.mutable:
            spoiled.update(storage_key(value) for value in record.outputs if isinstance(value, torch.Tensor))
        if known:
            continue
        if reference is not None and _leads_to_scores(reference, record, part):
            continue
        name = record.key[0]
        if base_name(name).startswith(_UNFILLED):
            return {}, f"{name} is filled by a kernel or in-place operator that mixes tokens"
        if reference is None or record.mutable or not _pinnable(record) or part_counts[name] > counts[name]:
            return {}, f"{name} depends on data or on the order of tokens"
        faults[record.key] = PinKind.MIXER if record.inputs else PinKind.POSITION
    return faults, ""


def _written_views(
    whole: Observation, faults: Mapping[PinKey, PinKind], known: frozenset[PinKey]
) -> tuple[frozenset[PinKey], str]:
    """What is to be pinned as it is in the end since ``faults`` has views of it that are written to (``h[:, 0] = 0``).

    Replaced, a view is other memory, and what is written to it misses what it was a view of. So that has to be pinned
    too, with what was written, and nothing else may write to it. Or why that cannot be.
    """
    records, final = whole.by_key(), set(known)
    for key in faults:
        view = records[key]
        if not (view.is_view and view.then):
            continue
        shown = {storage_key(value) for value in view.outputs if isinstance(value, torch.Tensor)}
        maker = next((one for one in whole.operators if not one.mutable and not one.is_view
                      and any(isinstance(v, torch.Tensor) and storage_key(v) in shown for v in one.outputs)), None)
        if maker is not None and base_name(maker.key[0]).startswith(_UNFILLED):
            return known, f"{maker.key[0]} is filled by a kernel or in-place operator that mixes tokens"
        tensors = [value for value in maker.outputs if isinstance(value, torch.Tensor)] if maker is not None else []
        if maker is None or not all(any(same_view(saved, value) for saved in whole.saved) for value in tensors):
            return known, f"{key[0]} is a view of some of its tokens, and what it shows is written to afterwards"
        final.add(maker.key)
    return frozenset(final), ""


def same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Both are the same elements of the same memory."""
    return (
        storage_key(a) == storage_key(b)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.dtype == b.dtype
    )


def _leads_to_scores(reference: OperatorRecord, record: OperatorRecord, part: Observation) -> bool:
    """``record`` is a view of what has two token dimensions (``mask[0]``), and something is written to that memory.

    Replaced, it would be a view of other memory, and a rerun at full length would never write to its own mask. What is
    written on a slice does not matter: such values are saved whole. What comes of the view otherwise is compared.
    """
    if record.mutable or _token_dims(reference, record)[0] < 2:
        return False
    views = {storage_key(value) for value in record.outputs if isinstance(value, torch.Tensor)}
    views &= set(record.input_storages)
    later = dropwhile(lambda one: one is not record, part.operators) if views else ()
    written = {storage_key(value) for one in later if one.mutable for value in one.outputs
               if isinstance(value, torch.Tensor)}  # fmt: skip
    return bool(views & written)


def _alone(
    reference: OperatorRecord, record: OperatorRecord, lengths: Lengths, verdicts: dict[PinKey, Verdict]
) -> Verdict:
    known = verdicts.get(record.key)
    if known is not None:
        return known
    verdict = judge(reference, record, lengths)
    if verdict is None:
        return Verdict.TOKEN_WISE  # so far
    if verdict == Verdict.UNKNOWN:
        logger.info("memo: %s is taken for a mixer: it %s", record.key[0], verdict.value)
    verdicts[record.key] = verdict
    return verdict


def _agrees(reference: OperatorRecord, record: OperatorRecord, lengths: Lengths) -> bool:
    inputs, outputs = _token_dims(reference, record)
    if outputs >= 2:
        return True  # saved whole: what it holds on a slice does not matter
    if inputs > outputs and not record.mutable:
        return False
    if base_name(record.key[0]).startswith(_RANDOM_MEMORY) and reference.then and record.then:
        return True  # nobody has read it before an operator wrote there, which is judged by itself
    return all(
        not isinstance(value, torch.Tensor)
        or value.numel() == 0
        or (isinstance(other, torch.Tensor) and match(other, value, lengths).equal)
        for other, value in zip(reference.as_returned(), record.as_returned(), strict=False)
    )


def find_slicing(
    forward: Forward, call: BlockCall, whole: Observation, arguments: tuple[ArgumentAxes, ...], lengths: Lengths
) -> Slicing:
    """Pins with which ``forward`` on tokens [start, whole) of ``call`` saves the tail of what ``whole`` saved."""
    slicing = Slicing(pins=named_pins(whole))
    shapes: dict[PinKey, tuple[torch.Size | None, ...]] = {}
    tail_call = call.cut(arguments, lengths.start, lengths.whole)
    if slicing.pins:
        try:
            # The shapes of the pinned outputs on a slice, before anything is replaced.
            shapes = _shapes(observe(forward, tail_call, last=len(whole.saved) - 1))
        except Exception as error:
            pass_on(error)
            slicing.reason = f"a slice of its tokens does not run: {first_line(error)}"
            return slicing
    for _ in range(_MAX_ROUNDS):
        _find_axes(whole, shapes, slicing, lengths)
        values = tail_values(whole, slicing, lengths)
        try:
            part = observe(forward, tail_call, values, last=len(whole.saved) - 1)
        except Exception as error:
            pass_on(error)
            slicing.reason = f"a slice of its tokens does not run: {first_line(error)}"
            return slicing
        faults, slicing.reason = _find_faults(whole, part, lengths, slicing.verdicts)
        faults = {key: kind for key, kind in faults.items() if key not in slicing.pins}
        if not slicing.reason:
            slicing.final, slicing.reason = _written_views(whole, faults, slicing.final)
            faults |= dict.fromkeys(slicing.final - slicing.pins.keys(), PinKind.MIXER)
        if slicing.reason:
            return slicing
        if not faults:
            return _check_saved(slicing, whole, part, lengths)
        shapes.update({key: value for key, value in _shapes(part).items() if key in faults})
        slicing.pins.update(faults)
    slicing.reason = f"its operators still mixed tokens after {_MAX_ROUNDS} rounds of pinning"
    return slicing


def _needs_no_values(record: OperatorRecord) -> bool:
    """Shapes and numbers alone say whether this operator mixes tokens.

    With indices and masks their values do, and another library's operator may begin as the identity (a scan).
    """
    floats = all(tensor.is_floating_point() or tensor.is_complex() for tensor in record.inputs)
    return floats and record.key[0].startswith("aten.")


def slice_alike(
    forward: Forward,
    call: BlockCall,
    whole: Observation,
    *,
    known: Slicing,
    arguments: tuple[ArgumentAxes, ...],
    lengths: Lengths,
) -> Slicing | None:
    """What ``known`` says of a block whose operators are those of ``whole``, seen in one run; None: not of this one.

    An operator that was asked alone is not asked again where its values cannot matter: its arguments have the same
    shapes and numbers.
    """
    records = whole.by_key()
    verdicts = {key: verdict for key, verdict in known.verdicts.items() if _needs_no_values(records[key])}
    slicing = replace(known, saved=[], verdicts=verdicts)
    values = tail_values(whole, slicing, lengths)
    tail_call = call.cut(arguments, lengths.start, lengths.whole)
    part = observe(forward, tail_call, values, last=len(whole.saved) - 1, unwritten=slicing.final)
    faults, reason = _find_faults(whole, part, lengths, slicing.verdicts)
    if reason or faults.keys() - slicing.pins.keys():
        return None
    slicing = _check_saved(slicing, whole, part, lengths)
    return None if slicing.reason else slicing


def written_unseen(whole: Observation, pins: Iterable[PinKey]) -> str:
    """Why one of ``pins`` is not what its operator gave, and cannot be had either; "": all are."""
    records = whole.by_key()
    names = (key[0] for key in pins if records[key].is_written_unseen())
    return next((f"the result of {name} is written to by what PyTorch does not show" for name in names), "")


def _check_saved(slicing: Slicing, whole: Observation, part: Observation, lengths: Lengths) -> Slicing:
    slicing.reason = written_unseen(whole, slicing.pins)
    if slicing.reason:
        return slicing
    if len(whole.saved) != len(part.saved):
        slicing.reason = (
            f"it saves {len(whole.saved)} tensors on the whole sequence and {len(part.saved)} on a slice: "
            "what it saves depends on data"
        )
        return slicing
    origins: Origins | None = None
    for index, (full, cut) in enumerate(zip(whole.saved, part.saved, strict=True)):
        found = match(full, cut, lengths)
        slicing.saved.append(found)
        split = len(found.dims) <= 1
        if split and not found.equal and full.numel() and found.comparable:
            slicing.reason = f"saved tensor {index} {tuple(full.shape)} differs on a slice of its tokens"
            return slicing
        if found.equal and tokens_hidden(full, cut, lengths, found.axis):
            with torch.no_grad():
                origins = origins or Origins(whole, part, lengths)
                axis = origins.axis(full, cut)
            if axis is None:
                slicing.reason = f"saved tensor {index} {tuple(full.shape)} does not show where its tokens are"
                return slicing
            slicing.saved[-1] = replace(found, axis=axis)
        if not found.comparable and found.padded is None:
            slicing.reason = f"saved tensor {index} {tuple(full.shape)} has a size that depends on data"
            return slicing
    return slicing

