"""How a block's profile changes with the number of sequences in a batch (its rows), measured and not assumed.

A profile is measured at some rows. Bytes that belong to a sequence grow with them, position biases and masks that the
batch shares do not, and which is which cannot be told from one point: so a block is calibrated at two more, and what
lies on one line through all of them is known at any number of rows. A single row is always measured itself: there
dimensions of size one broadcast and merge, and a block may save other storages than with many.

    profiled at 1:         1    2    3          the line of 2 and 3; 1 itself
    profiled at r > 1:     1    r    r + 1      the line of r and r + 1; 1 itself

Where a single row is not on the line, the next number after it is measured too, to see whether it is one.

Most runs see one batch size, so all this waits for a batch of another, whose own number is then measured as well. Only
where a forward is a collective of all ranks it cannot wait, since no rank may run one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.region import as_made
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.calibrate import calibrate_again
from memo_runtime.profiling.growth import line_through, times
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.trial import crop_tokens
from memo_runtime.records import (
    BlockProfile,
    Bundle,
    Growth,
    Moment,
    Pin,
    SavedTensor,
    Storage,
    TensorGroup,
    TiledProfile,
    TokenAxis,
)


@dataclass(frozen=True, slots=True)
class RowLaw:
    """One block at any number of rows.

    Attributes:
        row_dim: dimension of the input that counts sequences; None: it has none, and only tokens change.
        rows: of the profiled call.
        points: the block calibrated at other rows. line: two rows between and beyond which everything is linear.
        certain: every point that can be compared lies on the line; False: sizes at other rows are estimates.
        seen: other rows were looked at; False: not yet.
        dims: which dimension of which argument (leaf) has as many, where the profiled call has several and so tells.
    """

    row_dim: int | None = None
    rows: int = 1
    points: dict[int, BlockProfile] = field(default_factory=dict)
    line: tuple[int, int] | None = None
    certain: bool = False
    seen: bool = True
    dims: dict[int, int] = field(default_factory=dict)

    def at(self, profile: BlockProfile, rows: int) -> BlockProfile:
        """``profile``, which is of this law's rows, for a batch of ``rows``."""
        if rows == self.rows or not profile.tokens:
            return profile
        shares = {self.rows: profile, **self.points}
        sizes = shares.get(rows)
        if sizes is None and self.line is not None:
            sizes = on_line(shares, self.line, rows)
        if sizes is None:
            sizes = _in_proportion(profile, Fraction(rows, self.rows))
        ratio = Fraction(rows, self.rows)
        return replace(
            profile,
            saved=sizes.saved,
            groups=sizes.groups,
            pins=sizes.pins,
            forward_flops=sizes.forward_flops,
            rerun_flops=sizes.rerun_flops,
            recompute_flops=sizes.recompute_flops,
            forward_seconds=times(profile.forward_seconds, ratio),
            backward_seconds=times(profile.backward_seconds, ratio),
            rerun_seconds=times(profile.rerun_seconds, ratio),
            write_seconds=times(profile.write_seconds, ratio),
            forward_peak=times(profile.forward_peak, ratio),
            backward_peak=times(profile.backward_peak, ratio),
            rerun_peak=times(profile.rerun_peak, ratio),
            output=times(profile.output, ratio),
            tiled=tiled_at(profile.tiled, ratio),
        )


def row_dim_of(hidden: torch.Tensor, token_dim: int) -> int | None:
    """Dimension of an input hidden state that counts sequences: the first that is neither tokens nor features."""
    return next((dim for dim in range(hidden.dim() - 1) if dim != token_dim), None)


def later_rows(call: BlockCall, profile: BlockProfile) -> RowLaw:
    """The law of a block that was profiled on ``call``, of which only that number of rows is known so far."""
    hidden = call.leaves[profile.input_leaf] if profile.tokens else None
    row_dim = row_dim_of(hidden, profile.token_dim) if isinstance(hidden, torch.Tensor) else None
    if not isinstance(hidden, torch.Tensor) or row_dim is None:
        return RowLaw(certain=hidden is not None)
    rows = hidden.shape[row_dim]
    dims = next(_row_dims(call, profile, row_dim)) if rows > 1 else {}
    return RowLaw(row_dim, rows, seen=False, dims=dims)


def measure_rows(
    block: nn.Module, forward: Forward, call: BlockCall, profile: BlockProfile, start: Start
) -> RowLaw:
    """The law of a block that was just profiled on ``call`` from ``start``; it is calibrated at other rows."""
    law = later_rows(call, profile)
    if law.row_dim is None:
        return law
    return _measured(_Bench(block, forward, call, profile, start, law.row_dim), law.rows, {law.rows: profile})


def measure_beside(
    block: nn.Module, forward: Forward, call: BlockCall, start: Start, *, known: BlockProfile, law: RowLaw
) -> RowLaw:
    """``law`` of a block whose profile is ``known``, measured with a ``call`` of another number of rows."""
    unknown = replace(law, seen=True)
    try:
        here = calibrate_again(block, forward, call, known, start)
    except Exception as error:
        pass_on(error)
        return unknown
    beside = later_rows(call, here) if here is not None else unknown
    if here is None or beside.row_dim is None:
        return unknown
    bench = _Bench(block, forward, call, here, start, beside.row_dim, law.dims)
    return _measured(bench, law.rows, {law.rows: known, beside.rows: here})


def _measured(bench: _Bench, rows: int, known: Mapping[int, BlockProfile]) -> RowLaw:
    """The law of a block that is profiled at ``rows``; what is not among ``known`` rows is looked at."""
    several = sorted(number for number in known if number > 1) or [2]
    line = (several[0], several[1] if len(several) > 1 else several[0] + 1)
    for at in sorted({1, *line} - known.keys()):
        bench.look(at)
    points = {**bench.points, **known}
    others = {number: point for number, point in points.items() if number != rows}
    if not on_one_line(points, *line):
        return RowLaw(bench.row_dim, rows, others, None)
    # Two points are always on a line: a third one tells.
    third = 1
    if not on_one_line(points, line[0], third):
        third = line[1] + 1
        bench.look(third)
        points = {**bench.points, **known}
    predicted = on_line(points, line, third) if third in points else None
    certain = bench.agreed and predicted is not None and same_sizes(predicted, points[third])
    others = {number: point for number, point in points.items() if number != rows}
    return RowLaw(bench.row_dim, rows, others, line, certain)


def on_one_line(points: Mapping[int, BlockProfile], *rows: int) -> bool:
    """The block is the same at all of ``rows`` but for its sizes."""
    return all(at in points and _shape_of(points[at]) == _shape_of(points[rows[0]]) for at in rows)


@dataclass(slots=True)
class _Bench:
    """The block under calibration; ``agreed``: at every number of rows it ran, and in one way."""

    block: nn.Module
    forward: Forward
    call: BlockCall
    profile: BlockProfile
    start: Start
    row_dim: int
    dims: Mapping[int, int] = field(default_factory=dict)
    points: dict[int, BlockProfile] = field(default_factory=dict)
    agreed: bool = True

    def look(self, rows: int) -> None:
        """Calibrate at ``rows``."""
        answers = self._answers(rows)
        if answers:
            self.points[rows] = answers[0]
        self.agreed = self.agreed and bool(answers) and all(same_sizes(answers[0], answer) for answer in answers[1:])

    def _answers(self, rows: int) -> list[BlockProfile]:
        """The profile at ``rows``, for every way to give the other arguments that many, the likeliest first.

        With several rows an argument has them or has not. A single row may be either, and all ways are tried.
        """
        hidden = self.call.leaves[self.profile.input_leaf]
        tokens = min(self.profile.tokens, crop_tokens(hidden.device.type))
        crop = self.call.cut(self.profile.arguments, 0, tokens)
        found: list[BlockProfile] = []
        ways = iter([dict(self.dims)]) if self.dims else _row_dims(crop, self.profile, self.row_dim)
        for dims in ways:
            other = crop.replaced({leaf: repeated(crop.leaves[leaf], dim, rows) for leaf, dim in dims.items()})
            try:
                answer = calibrate_again(self.block, self.forward, other, self.profile, self.start)
            except Exception as error:
                pass_on(error)
                continue
            if answer is not None:
                found.append(answer)
                if hidden.shape[self.row_dim] > 1:
                    break
        return found


def _row_dims(call: BlockCall, profile: BlockProfile, row_dim: int) -> Iterator[dict[int, int]]:
    """Dimensions of sequences by leaf, in every likely way: arguments of as many have them wherever that size is
    found, or in the input's dimension only, or not at all.
    """
    hidden = call.leaves[profile.input_leaf]
    rows = hidden.shape[row_dim]
    tokens = {axes.leaf: axes.dims for axes in profile.arguments}
    anywhere, beside = {profile.input_leaf: row_dim}, {profile.input_leaf: row_dim}
    for leaf, tensor in call.tensors():
        order = [row_dim, *range(tensor.dim())]
        dims = [d for d in order if d < tensor.dim() and tensor.shape[d] == rows and d not in tokens.get(leaf, ())]
        if leaf != profile.input_leaf and dims:
            anywhere[leaf] = dims[0]
            beside |= {leaf: row_dim} if dims[0] == row_dim else {}
    ways = [anywhere, beside, {profile.input_leaf: row_dim}]
    yield from (way for number, way in enumerate(ways) if way not in ways[:number])


def repeated(tensor: torch.Tensor, dim: int, rows: int) -> torch.Tensor:
    """``tensor`` with ``rows`` along ``dim``, its own taken in turn; the memory order of dimensions stays."""
    detached, needs_grad = tensor.detach(), tensor.requires_grad
    if detached.stride(dim) == 0 or detached.shape[dim] == rows:
        made = detached.narrow(dim, 0, 1).expand(*(rows if d == dim else -1 for d in range(detached.dim())))
        return (detached if detached.shape[dim] == rows else made).requires_grad_(needs_grad)
    order = sorted(range(detached.dim()), key=detached.stride, reverse=True)
    index = torch.arange(rows, device=detached.device) % detached.shape[dim]
    made = detached.permute(order).index_select(order.index(dim), index)
    made = made.permute([order.index(d) for d in range(detached.dim())])
    return as_made(made, detached.shape, detached.stride(), dim).requires_grad_(needs_grad)


# ---- lines


def _shape_of(profile: BlockProfile) -> tuple[object, ...]:
    """What two points of one line have in common."""
    return (
        tuple((one.role, one.saved, one.splits, one.size.multiple, _number(one.storage)) for one in profile.groups),
        tuple((saved.index, saved.group, _dim(saved.axis)) for saved in profile.saved),
        tuple(replace(pin, axis=None, number=None) for pin in profile.pins),
        tuple((_dim(pin.axis), pin.number is None) for pin in profile.pins),
        profile.dynamic,
        profile.random,
        profile.replayable,
    )


def _number(storage: Storage | None) -> int | None:
    return None if storage is None else storage.number


def _dim(axis: TokenAxis | None) -> int | None:
    return None if axis is None else axis.dim


def same_sizes(a: BlockProfile, b: BlockProfile) -> bool:
    """The same bytes, axes and FLOPs."""
    names = ("saved", "groups", "pins", "forward_flops", "rerun_flops", "recompute_flops")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def on_line(points: Mapping[int, BlockProfile], line: tuple[int, int], rows: int) -> BlockProfile | None:
    """The point at ``rows`` of the line through two of ``points``; None where a count would be no whole number."""
    a, b = points[line[0]], points[line[1]]
    share = Fraction(rows - line[0], line[1] - line[0])

    def whole(x: int, y: int) -> int:
        value = x + (y - x) * share
        if value.denominator != 1 or value < 0:
            raise _NoLineError
        return int(value)

    def axis(x: TokenAxis | None, y: TokenAxis | None) -> TokenAxis | None:
        if x is None or y is None:
            return None
        outer, inner = whole(x.outer, y.outer), whole(x.inner, y.inner)
        if outer < 1 or inner < 1:
            raise _NoLineError
        return TokenAxis(dim=x.dim, outer=outer, inner=inner)

    def group(x: TensorGroup, y: TensorGroup) -> TensorGroup:
        bundle = _bundle(partial(line_through, share=share), x.bundle, y.bundle)
        size = line_through(x.size, y.size, share)
        storage = _storage(partial(line_through, share=share), x.storage, y.storage)
        return replace(x, size=size, bundle=bundle, estimated=x.estimated or y.estimated, storage=storage)

    def saved(x: SavedTensor, y: SavedTensor) -> SavedTensor:
        return replace(x, axis=axis(x.axis, y.axis))

    def pin(x: Pin, y: Pin) -> Pin:
        number = None if x.number is None or y.number is None else whole(x.number, y.number)
        return replace(x, axis=axis(x.axis, y.axis), number=number)

    try:
        return replace(
            a,
            groups=tuple(map(group, a.groups, b.groups)),
            saved=tuple(map(saved, a.saved, b.saved)),
            pins=tuple(map(pin, a.pins, b.pins)),
            forward_flops=line_through(a.forward_flops, b.forward_flops, share),
            rerun_flops=line_through(a.rerun_flops, b.rerun_flops, share),
            recompute_flops=line_through(a.recompute_flops, b.recompute_flops, share),
        )
    except _NoLineError:
        return None


def _bundle(change: Callable[..., Growth], *bundles: Bundle | None) -> Bundle | None:
    """``change`` of each part of ``bundles``; None where they are none."""
    if None in bundles:
        return None
    names = [part.name for part in fields(Bundle)]
    return Bundle(**{name: change(*(getattr(bundle, name) for bundle in bundles)) for name in names})


def _storage(change: Callable[..., Growth], *storages: Storage | None) -> Storage | None:
    """``change`` of the sizes of ``storages``, which are one at several numbers of rows; None where there is none."""
    first, *_ = storages
    if first is None or None in storages:
        return None
    return replace(first, size=change(*(storage.size for storage in storages if storage is not None)))


class _NoLineError(Exception):
    """A count would be no whole number."""


def _in_proportion(profile: BlockProfile, ratio: Fraction) -> BlockProfile:
    """Every size in proportion to the rows, marked as an estimate; a call that saves something else is stored whole."""

    def group(known: TensorGroup) -> TensorGroup:
        bundle = _bundle(partial(times, ratio=ratio), known.bundle)
        storage = _storage(partial(times, ratio=ratio), known.storage)
        return replace(known, size=times(known.size, ratio), bundle=bundle, estimated=True, storage=storage)

    return replace(
        profile,
        groups=tuple(map(group, profile.groups)),
        forward_flops=times(profile.forward_flops, ratio),
        rerun_flops=times(profile.rerun_flops, ratio),
        recompute_flops=times(profile.recompute_flops, ratio),
    )


def tiled_at(tiled: TiledProfile | None, ratio: Fraction) -> TiledProfile | None:
    """What a block takes by tiles for ``ratio`` times as many sequences."""
    if tiled is None:
        return None

    def moment(one: Moment) -> Moment:
        return replace(
            one, full=times(one.full, ratio), tile=times(one.tile, ratio), missing=times(one.missing, ratio),
            kept=times(one.kept, ratio), own=times(one.own, ratio), part=times(one.part, ratio),
            alone=times(one.alone, ratio),
        )  # fmt: skip

    return replace(
        tiled,
        stash=tuple(times(size, ratio) for size in tiled.stash),
        resident=times(tiled.resident, ratio),
        products=tuple(times(size, ratio) for size in tiled.products),
        forward=tuple(map(moment, tiled.forward)),
        backward=tuple(map(moment, tiled.backward)),
        result=tuple(map(moment, tiled.result)),
        result_flops=times(tiled.result_flops, ratio),
        again_flops=times(tiled.again_flops, ratio),
        saved_flops=times(tiled.saved_flops, ratio),
        forward_seconds=times(tiled.forward_seconds, ratio),
        backward_seconds=times(tiled.backward_seconds, ratio),
        saved_seconds=times(tiled.saved_seconds, ratio),
        product_seconds=times(tiled.product_seconds, ratio),
        forward_by_groups=tuple(map(moment, tiled.forward_by_groups)),
        backward_by_groups=tuple(map(moment, tiled.backward_by_groups)),
        group_flops=times(tiled.group_flops, ratio),
        mixer_inputs=times(tiled.mixer_inputs, ratio),
        mixer_input_flops=times(tiled.mixer_input_flops, ratio),
        forward_with_inputs=tuple(map(moment, tiled.forward_with_inputs)),
        backward_with_inputs=tuple(map(moment, tiled.backward_with_inputs)),
        elements=times(tiled.elements, ratio),
    )
