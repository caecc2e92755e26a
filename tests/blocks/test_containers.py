"""What is opened of a call's arguments, and what stays a leaf."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from memo_runtime.blocks import containers
from memo_runtime.blocks.containers import flatten, leaves_of, mapped, text_of, unflatten

X = torch.ones(2)


@dataclass
class Plain:
    x: Any
    number: int = 1


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = None
    kept: str = field(default="kept", init=False)


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


class Named(NamedTuple):
    a: Any
    b: Any


def test_objects_in_objects_come_back_as_they_were() -> None:
    value = {"one": Frozen(X, [Plain(X), Slotted({"x": X})]), "two": (Named(X, Plain(X, 7)), OrderedDict(k=Frozen(X)))}
    leaves, spec = flatten(value)
    assert sum(isinstance(leaf, Tensor) for leaf in leaves) == 6
    again = unflatten(leaves, spec)
    assert again == value
    assert again["one"] is not value["one"]
    assert spec == flatten(value)[1]
    assert str(spec) == str(flatten(value)[1])


def test_a_shape_is_remembered_and_is_what_pytorch_makes_of_it() -> None:
    parameter = torch.nn.Parameter(X)
    trees: list[Any] = [
        ((X, None), {"a": [1, X], "b": {}}), ((X, None), {"b": {}, "a": [1, X]}), (((X,), [None]), {}),
        (([X], (None,)), {}), ((parameter, 2.5, "text"), {"mask": None}),
    ]  # fmt: skip
    for tree in trees:
        leaves, spec = flatten(tree)
        want, of_pytorch = torch.utils._pytree.tree_flatten(tree)
        assert all(one is other for one, other in zip(leaves, want, strict=True))
        assert spec == of_pytorch
        assert text_of(spec) == text_of(of_pytorch) == str(of_pytorch)
        assert flatten(tree)[1] is spec
        assert unflatten(leaves, spec) == tree
    assert len({text_of(flatten(tree)[1]) for tree in trees}) == len(trees)


def test_lists_of_numbers_of_any_length_are_not_remembered() -> None:
    before = len(containers._SPECS)
    for length in range(containers._MOST_PARTS, containers._MOST_PARTS + 5):
        leaves, spec = flatten(((X,), {"lengths": [*range(length)]}))
        assert (len(leaves), spec.num_leaves) == (length + 1, length + 1)
    assert len(containers._SPECS) == before


def test_mapped_changes_leaves_and_nothing_else() -> None:
    found = mapped(lambda leaf: leaf * 3 if isinstance(leaf, Tensor) else leaf, Frozen(X, Plain(X, 5)))
    assert found.x.sum() == found.y.x.sum() == 6
    assert (found.y.number, found.kept) == (5, "kept")


@dataclass
class Listed(list[Any]):
    x: Any = None


@dataclass
class Computed:
    x: Any

    def __post_init__(self) -> None:
        self.total = self.x.sum()


@dataclass
class Watched:
    x: Any

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass
class Lazy:
    x: Any

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Behind:
    """Gives and takes another value than is stored."""

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return owner.__dict__["_x"] if owner is not None else None

    def __set__(self, owner: Any, value: Any) -> None:
        owner.__dict__["_x"] = value


@dataclass
class Described:
    x: Any = Behind()


class Ordinary:
    def __init__(self, x: Any) -> None:
        self.x = x


CLOSED = [Listed(x=X), Computed(X), Watched(X), Lazy(X), Described(X), Ordinary(X), Plain(3), Frozen("x"), Plain]


@pytest.mark.parametrize("value", CLOSED, ids=lambda value: getattr(value, "__name__", type(value).__name__))
def test_what_is_more_than_its_fields_or_holds_no_tensor_stays_the_very_object(value: Any) -> None:
    leaves, spec = flatten((value, X))
    assert leaves[0] is value
    assert unflatten(leaves, spec)[0] is value


def test_an_attribute_that_was_added_or_removed_closes_an_object() -> None:
    more, less = Plain(X), Plain(X)
    more.other = 1  # type: ignore[attr-defined]
    del less.x
    assert leaves_of([more, less]) == [more, less]


def test_an_object_that_holds_itself_is_opened_once() -> None:
    value = Plain(X)
    value.number = value  # type: ignore[assignment]
    leaves, _ = flatten(value)
    assert leaves[0] is X
    assert leaves[1] is value
