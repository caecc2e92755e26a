"""Batches that look alike to the model and not to its blocks: padded ones and others, say.

transformers gives blocks a mask where something is padded and none where nothing is; beyond its window a sliding layer
has one, below it none. Blocks save other tensors then, so each kind of calls is profiled and planned by itself. Which
kind a batch makes is looked at before its step, by a pass that stops at the last block and computes next to nothing:
once for all batches with sizes between the same powers of two, in whose masks something is left out, or nothing. What
that cannot tell (documents packed into one row, told by positions; a window that is no power of two) shows when the
first block is called. A kind that is known is planned then and there; where it is
not, the following batches are looked at until one makes it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memo_runtime.profiling.measured import Measured
from memo_runtime.profiling.reading import Reading, Shapes
from memo_runtime.recent import Recent
from memo_runtime.records import Profile

Batch = tuple[tuple[Any, ...], dict[str, Any]]
#: A kind of batch, and with a number behind it a kind of calls that it makes.
Key = tuple[Any, ...]
#: By block name, how a batch calls it.
Ways = Mapping[str, str]
#: Sees that, as far as it tells kinds that were measured apart; None where it cannot.
Look = Callable[[Batch, Sequence[Measured]], Ways | None]

#: Kinds of calls for one kind of batch: others run by the plan of one of these, as far as it goes.
_MOST_WAYS = 8
_MOST_PLACES = 256
#: How many batches of a kind are looked at for calls that came unforeseen, which need not come again.
_MOST_LOOKS = 16


class Kinds:
    """Which kinds of calls are known, and which one to expect.

    Args:
        model: the wrapped model. known: what was measured, by key.

    Attributes:
        shapes: of the batch that was asked for last.
    """

    def __init__(self, model: nn.Module, known: Recent[list[Reading]]) -> None:
        self._masks = [index for index, name in enumerate(_parameters(model.forward)) if "mask" in name]
        self._known = known
        self._expected: Recent[int] = Recent(_MOST_PLACES)
        self._latest: Recent[int] = Recent(_MOST_PLACES)
        self._looks: Recent[int] = Recent(_MOST_PLACES)
        #: Kinds of batches whose next one is looked at.
        self._unforeseen: set[Hashable] = set()
        self.shapes: Shapes = ()
        self._base: Key = ()
        self._place: Hashable = None

    def key(self, base: Key, shapes: Shapes, batch: Batch, look: Look | None) -> Key:
        """``base`` with the number of the calls that ``batch``, of ``shapes``, is expected to make."""
        self._base, self.shapes = base, shapes
        sizes = tuple(tuple(map(_doublings, shape)) for shape in shapes)
        self._place = base, sizes, tuple(self._marks(*batch))
        number = self._expected.get(self._place) if base not in self._unforeseen else None
        if number is None or not self._known.get((*base, number)):
            known = [readings[-1].measured for readings in self._readings(base) if readings]
            ways = look(batch, known) if known and look is not None else None
            number = self._number_of(base, ways) if ways is not None else self._latest.get(base) or 0
        self._expect(base, number)
        return *base, number

    def called_otherwise(self, name: str, way: str, *, first: bool) -> Key | None:
        """Block ``name`` was called in another way: the key of calls that begin so, if it is the ``first`` one.

        None: none are known; some of the next batches are looked at.
        """
        for number, readings in enumerate(self._readings(self._base) if first else ()):
            profile = readings[-1].measured.block(name) if readings else None
            if profile is not None and profile.way == way:
                self._expect(self._base, number)
                return *self._base, number
        if (self._looks.get(self._base) or 0) < _MOST_LOOKS:
            self._unforeseen.add(self._base)
        return None

    def profile(self, key: Key) -> tuple[Profile, dict[int, int]] | None:
        """(what was measured of ``key`` for the last batch, its tokens by stack); None: not enough is known."""
        for reading in self._known.get(key) or []:
            sizes = reading.sizes_of(self.shapes)
            if sizes is not None and reading.knows(sizes) and not reading.measured.left_for_later(sizes.rows):
                return reading.measured.at(sizes.rows, sizes.tokens), sizes.tokens
        return None

    def _expect(self, base: Key, number: int) -> None:
        self._expected.put(self._place, number)
        self._latest.put(base, number)

    def _number_of(self, base: Key, ways: Ways) -> int:
        """Which calls go these ``ways``; the number of a kind that is to be measured where none does."""
        if base in self._unforeseen:
            looks = (self._looks.get(base) or 0) + 1
            self._looks.put(base, looks)
            if looks >= _MOST_LOOKS:
                self._unforeseen.discard(base)
        free = None
        for number, readings in enumerate(self._readings(base)):
            if not readings:
                free = number if free is None else free
            elif _agree(readings[-1], ways):
                return number
        if free is None:
            return self._latest.get(base) or 0
        self._unforeseen.discard(base)
        return free

    def _readings(self, base: Key) -> Iterator[list[Reading] | None]:
        for number in range(_MOST_WAYS):
            yield self._known.get((*base, number))

    def _marks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[bool]:
        """For each mask in a batch, whether it leaves out anything: models look at that before they make theirs."""
        given = [args[index] for index in self._masks if index < len(args)]
        for named in (kwargs, *(one for one in args if isinstance(one, Mapping))):
            given += [value for name, value in named.items() if isinstance(name, str) and "mask" in name]
        for mask in given:
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.device.type != "meta":
                yield bool(mask.all())


def _doublings(size: int) -> int:
    """Doublings up to ``size``; 0 for the lengths of a nested tensor, which are no number."""
    return (size - 1).bit_length() if isinstance(size, int) else 0


def _parameters(forward: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):  # one that is not Python's
        return []


def _agree(reading: Reading, ways: Ways) -> bool:
    """Blocks that both have are called alike."""
    return all(ways.get(block.name, block.way) == block.way for block in reading.measured.profile.blocks)
