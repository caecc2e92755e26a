"""A state key that is kept is the one that would be made anew."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from memo_runtime.capture import watch as watching
from memo_runtime.capture.key import state_key
from memo_runtime.capture.watch import StateWatch


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Holder:
    """As anybody writes one."""

    def __init__(self) -> None:
        self.heads = 4


class Other(nn.Linear):
    pass


class Name(StrEnum):
    """Equal to its value."""

    B = "b"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.table = nn.Buffer(torch.zeros(2))
        self.rate = 0.1
        self.config = SimpleNamespace(heads=4, deep=SimpleNamespace(kinds=["full", "sliding"]))
        self.members = [1, {"a": 2.5, "b": 1}]
        self.act = nn.ReLU()
        self.opts = self.act._buffers
        self.names = {"one", "two"}
        self.recent = deque([1, 2])
        self.nothing: dict[str, int] = {}
        self.array = numpy.zeros(3)
        self.slotted = Slotted()
        self.pair = (SimpleNamespace(depth=1), 2)
        self.holder = Holder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.rate


def _replace_key(block: Block) -> None:
    block.members[1]["b"] = block.members[1].pop("a")


def _array(block: Block) -> None:
    block.array[1] = 1.0


CHANGES = {
    "a number": lambda block: setattr(block, "rate", 0.2),
    "a number of another kind": lambda block: setattr(block, "rate", True),
    "a new attribute": lambda block: setattr(block, "more", 1),
    "an attribute that goes": lambda block: delattr(block, "rate"),
    "a mode": lambda block: block.inner.eval(),
    "an object": lambda block: setattr(block.config, "heads", 8),
    "an object in an object": lambda block: block.config.deep.kinds.append("none"),
    "a member of a list": lambda block: block.members.__setitem__(0, 3),
    "a value in a dictionary": lambda block: block.members[1].update(a=3.5),
    "a name in a dictionary": _replace_key,
    "a set": lambda block: block.names.add("three"),
    "a deque": lambda block: block.recent.rotate(),
    "what was empty": lambda block: block.nothing.update(one=1),
    "an element of an array": _array,
    "a slot": lambda block: setattr(block.slotted, "scale", 2.0),
    "an object in a tuple": lambda block: setattr(block.pair[0], "depth", 2),
    "a class": lambda block: setattr(block.inner, "__class__", Other),
    "a hook": lambda block: block.inner.register_forward_hook(lambda *_: None),
    "a frozen parameter": lambda block: block.inner.weight.requires_grad_(False),
    "another dtype": lambda block: block.inner.to(torch.bfloat16),
    "another shape": lambda block: setattr(block.inner.weight, "data", torch.zeros(8, 4)),
    "another module": lambda block: setattr(block, "inner", nn.Linear(4, 4, bias=False)),
    "a module that comes": lambda block: block.inner.add_module("adapter", nn.Identity()),
    "a buffer that comes": lambda block: block.register_buffer("mask", torch.zeros(1)),
    "a dictionary of an object": lambda block: setattr(block.holder, "__dict__", {"heads": 5}),
    "a dictionary of a module": lambda block: setattr(block.inner, "__dict__", {**block.inner.__dict__, "k": 1}),
    "an object that goes": lambda block: setattr(block, "config", None),
    "an equal name of another kind": lambda block: block.members[1].update({Name.B: block.members[1].pop("b")}),
    "what was a table of the module": lambda block: setattr(block, "opts", {"approx": "tanh"}),
    "a forward that is installed": lambda block: setattr(block.inner, "forward", lambda x: x),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_makes_another_key(change) -> None:
    block = Block()
    watch = StateWatch(block)
    before = watch.key()
    assert before == state_key(block)
    change(block)
    assert watch.key() == state_key(block) != before
    assert watch.key() is watch.key()


class Mapped(Mapping):
    """One that cannot tell how much it has."""

    def __getitem__(self, key):
        return 1

    def __iter__(self):
        return iter(["one"])

    def __len__(self):
        raise NotImplementedError


class Named(dict):
    """One that yields something else than it holds."""

    scale = 1

    def items(self):
        return [("scale", self.scale)]


class Key:
    """What a weak dictionary can have."""


ODD = {
    "weak values": lambda: weakref.WeakValueDictionary({"one": KEPT}),
    "weak keys": lambda: weakref.WeakKeyDictionary({KEPT: 1}),
    "a mapping without a length": Mapped,
    "a dictionary of its own kind": lambda: Named(a=1),
    "a list of its own kind": lambda: type("Own", (list,), {"__len__": lambda self: 0})([1]),
    "a weak reference": lambda: weakref.ref(KEPT),
}
KEPT = Key()


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_cannot_be_watched_is_read_every_time(make) -> None:
    block = Block()
    block.odd = make()
    watch = StateWatch(block)
    assert watch.key() == state_key(block)
    if isinstance(block.odd, Named):
        block.odd.scale = 2
    block.rate = 0.5
    assert watch.key() == state_key(block)
    assert watch._there is None


def test_what_changes_at_every_call_is_watched_no_more_for_a_while(monkeypatch) -> None:
    block = Block()
    watch = StateWatch(block)
    looks = []
    monkeypatch.setattr(watching._There, "of", lambda *args: looks.append(args))
    for number in range(40):
        block.rate = float(number)
        assert watch.key() == state_key(block)
    assert 1 <= len(looks) <= 4


def test_modules_that_were_exchanged_go_at_once() -> None:
    block = Block()
    watch = StateWatch(block)
    watch.key()
    gone = weakref.ref(block.inner.weight)
    block.inner = nn.Linear(4, 4)
    gc.collect()
    assert gone() is None
    assert watch.key() == state_key(block)


@pytest.mark.parametrize("hold", [lambda t: (t, 1), lambda t: [(t, 1)], lambda t: {t: 1}], ids=["tuple", "list", "key"])
def test_no_tensor_in_a_tuple_is_held(hold) -> None:
    block, last = Block(), torch.zeros(3)
    block.last = hold(last)
    watch, gone = StateWatch(block), weakref.ref(last)
    watch.key()
    del block.last, last
    gc.collect()
    assert gone() is None
    assert watch.key() == state_key(block)


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2"])
def test_blocks_of_hugging_face_are_watched(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}  # fmt: skip
    kind = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    names = ("n_embd", "n_layer", "n_head", "vocab_size") if family == "GPT2" else [*sizes][:6]
    config = getattr(transformers, kind)(**{name: sizes[name] for name in names})
    model = transformers.AutoModelForCausalLM.from_config(config)
    block = next(module for name, module in model.named_modules() if name.endswith(("layers.0", "h.0")))
    watch = StateWatch(block)
    assert watch.key() is watch.key()


def test_nothing_is_read_again_while_nothing_changes(monkeypatch) -> None:
    block = Block()
    watch = StateWatch(block)
    before = watch.key()
    reads = []
    monkeypatch.setattr(watching, "state_key", lambda *args: reads.append(args) or state_key(*args))
    block(torch.zeros(1, 4)).sum().backward()
    with torch.no_grad():
        block.inner.weight.add_(1.0)
    assert watch.key() is before
    assert not reads
    block.rate = 0.3
    assert watch.key() != before
    assert len(reads) == 1


@pytest.mark.parametrize("where", ["attribute", "list", "object"])
def test_it_holds_no_tensor(where: str) -> None:
    block = Block()
    last = torch.zeros(3)
    if where == "attribute":
        block.last = last
    elif where == "list":
        block.members.append(last)
    else:
        block.config.deep.last = last
    watch = StateWatch(block)
    assert watch.key() == state_key(block)
    gone = weakref.ref(last)
    del last
    if where == "attribute":
        del block.last
    elif where == "list":
        block.members.pop()
    else:
        del block.config.deep.last
    gc.collect()
    assert gone() is None
    assert watch.key() == state_key(block)


def test_it_holds_no_parameter_that_was_exchanged() -> None:
    block = Block()
    watch = StateWatch(block)
    before = watch.key()
    gone = weakref.ref(block.inner.weight)
    block.inner.weight = nn.Parameter(torch.ones(4, 4))
    gc.collect()
    assert gone() is None
    assert watch.key() == before
