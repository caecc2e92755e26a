"""Names that a forward computes: whatever such code reaches is looked at with all that it holds."""

from __future__ import annotations

import sys
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memo_runtime.blocks.outside import Outside
from memo_runtime.blocks.spelled import ANY, spelled

scale_x = 1.0
PLACE = SimpleNamespace(scale_x=1.0, table={"a": 1.0}, other=SimpleNamespace(scale_x=1.0))


class Block(nn.Module):
    scale_x = 1.0
    kind = "x"


class ByItsClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, f"scale_{self.kind}")


class ByAnObject(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(PLACE, f"scale_{self.kind}")


class ByAnObjectInside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(PLACE.other, f"scale_{self.kind}")


class ByADictionary(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * PLACE.__dict__[f"scale_{self.kind}"] * vars(PLACE)[f"scale_{self.kind}"]


class ByItsTable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(PLACE, "tab" + "le"[: len(self.kind) + 1])["a"]


class ByGlobals(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * globals()[f"scale_{self.kind}"]


class ByAModule(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(HERE, f"scale_{self.kind}")


class ByAGetter(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * attrgetter(f"scale_{self.kind}")(PLACE)


class ByAConstant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(PLACE, "scale_x")  # noqa: B009


HERE = sys.modules[__name__]


def run(block: nn.Module) -> Outside:
    outside = Outside(block)
    with outside:
        block(torch.ones(2))
    assert outside.written() == ""
    return outside.settle()


@pytest.mark.parametrize(("kind", "holder", "name", "value"), [
    (ByItsClass, Block, "scale_x", 2.0), (ByAnObject, PLACE, "scale_x", 2.0),
    (ByAnObjectInside, PLACE.other, "scale_x", 2.0), (ByADictionary, PLACE, "scale_x", 2.0),
    (ByItsTable, PLACE, "table", {"a": 2.0}), (ByGlobals, HERE, "scale_x", 2.0), (ByAModule, HERE, "scale_x", 2.0),
    (ByAGetter, PLACE, "scale_x", 2.0), (ByAConstant, PLACE, "scale_x", 2.0),
])  # fmt: skip
def test_what_they_stand_for_is_seen(
    kind: type[Block], holder: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = run(kind())
    assert outside.changed() == ""
    monkeypatch.setattr(holder, name, value)
    assert name in outside.changed()


def test_members_of_what_they_stand_for_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = run(ByItsTable())
    monkeypatch.setitem(PLACE.table, "a", 2.0)
    assert "table" in outside.changed()


def test_a_write_by_one_is_seen_and_undone() -> None:
    class Counts(Block):
        def forward(self, x: Tensor) -> Tensor:
            setattr(PLACE, f"scale_{self.kind}", 5.0)
            return x

    outside, block = Outside(Counts()), Counts()
    with outside:
        block(torch.ones(2))
    assert "scale_x" in outside.written()
    outside.put_back()
    assert PLACE.scale_x == 1.0


def test_a_name_that_was_not_there_is_seen_and_taken_away() -> None:
    class Stores(Block):
        def forward(self, x: Tensor) -> Tensor:
            setattr(PLACE, f"stored_{self.kind}", 5.0)
            return x

    outside, block = Outside(Stores()), Stores()
    with outside:
        block(torch.ones(2))
    assert "stored_x" in outside.written()
    outside.put_back()
    assert not hasattr(PLACE, "stored_x")
    assert outside.settle().changed() == ""


def test_code_that_computes_no_name_is_looked_at_by_those_that_it_spells() -> None:
    """What stands beside them may change at every step."""
    assert ANY not in spelled(ByAConstant.forward.__code__)
    assert ANY in spelled(ByAnObject.forward.__code__)
    without_source: dict[str, Any] = {}
    exec("def get(thing): return getattr(thing, 'scale')", without_source)
    assert spelled(without_source["get"].__code__)[-1] == ANY
