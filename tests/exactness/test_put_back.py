"""What a profile's pass puts back in objects of odd classes, and what it leaves as it is."""

from __future__ import annotations

import copy
import threading
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import memo_runtime as memo
from tests.exactness.compare import SWAP
from tests.exactness.hand_written import WIDTH, sequence

COUNTER = Counter[str]({"steps": 10})
OUTPUT = ModelOutput(steps=1.0)
USER, CHAIN, LISTED = UserDict[str, int](), ChainMap[str, int]({}), UserList[int]()
PAST = torch.zeros(3)


class Refuses(dict[str, float]):
    """As frozen ones do, but for single items."""

    def clear(self) -> None:
        raise TypeError("no clear")

    def update(self, *_: Any, **__: Any) -> None:
        raise TypeError("no update")


class Ordered(OrderedDict[str, float]):
    """Notes what it is given."""

    given = 0

    def __setitem__(self, key: str, value: float) -> None:
        Ordered.given += 1
        super().__setitem__(key, value)


REFUSES, ORDERED = Refuses(steps=1.0), Ordered()


def counts(_: Model) -> float:
    COUNTER["steps"] += 1
    COUNTER["new"] += 1
    return float(COUNTER["steps"] + COUNTER["new"])


def outputs(_: Model) -> float:
    OUTPUT["steps"] = OUTPUT["steps"] + 1.0
    return float(OUTPUT["steps"])


def refuses(_: Model) -> float:
    REFUSES["steps"] += 1.0
    return REFUSES["steps"]


def orders(_: Model) -> float:
    ORDERED["steps"] = ORDERED.get("steps", 0.0) + 1.0
    return ORDERED["steps"]


def wraps(_: Model) -> float:
    USER["steps"] = USER.get("steps", 0) + 1
    CHAIN["steps"] = CHAIN.get("steps", 0) + 1
    LISTED.append(1)
    return float(USER["steps"] + CHAIN["steps"] + len(LISTED))


def past_autograd(_: Model) -> float:
    PAST.data += 1
    PAST.numpy()[0] += 1
    return float(PAST.sum())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, does: Callable[[Model], float]) -> None:
        super().__init__()
        self.does, self.layers = does, nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.does(self)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def three_steps(model: nn.Module) -> list[Tensor]:
    """Losses, from the same state of everything above."""
    for held, start in ((COUNTER, {"steps": 10}), (USER, {}), (CHAIN.maps[0], {})):
        held.clear()
        dict.update(held, start) if isinstance(held, dict) else held.update(start)
    OUTPUT["steps"], Ordered.given = 1.0, 0
    REFUSES["steps"] = 1.0
    OrderedDict.clear(ORDERED)
    LISTED.clear()
    PAST.zero_()
    found = []
    for _ in range(3):
        loss = model(sequence())
        loss.backward()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("does", [counts, outputs, refuses, orders, wraps, past_autograd])
def test_containers_of_odd_classes_hold_what_they_held(does: Callable[[Model], float]) -> None:
    torch.manual_seed(0)
    model = Model(does).double()
    plain = copy.deepcopy(model)
    want = three_steps(plain)
    left = Counter(COUNTER), dict(OUTPUT), dict(REFUSES), dict(ORDERED), dict(USER), dict(CHAIN), [*LISTED]
    given = Ordered.given
    SWAP.wrap(model)
    got = three_steps(model)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert left == (Counter(COUNTER), dict(OUTPUT), dict(REFUSES), dict(ORDERED), dict(USER), dict(CHAIN), [*LISTED])
    # The pass itself calls it once more, and what puts back does not.
    assert Ordered.given - given in (0, 1)


THREAD: threading.Thread | None = None
#: Nobody looks into it, and so nobody puts it back.
STARTED: SimpleQueue[int] = SimpleQueue()


def starts_a_thread(_: Model) -> float:
    global THREAD
    if THREAD is None:
        THREAD = threading.Thread(target=STARTED.put, args=(1,))
        THREAD.start()
        THREAD.join()
    return 1.0


def test_what_goes_on_by_itself_is_begun_once() -> None:
    model = memo.wrap(Model(starts_a_thread).double(), policy="swap")
    for _ in range(2):
        model(sequence()).backward()
    assert isinstance(THREAD, threading.Thread)
    assert STARTED.qsize() == 1


class Tries(nn.Module):
    """Catches what its blocks raise, and says where."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            try:
                x = layer(x)
            except Exception as error:
                raise RuntimeError(f"layer {number} failed") from error
        return x.square().mean()


def test_the_end_of_a_pass_is_no_failure_of_a_block() -> None:
    torch.manual_seed(0)
    model = Tries().double()
    plain = copy.deepcopy(model)
    SWAP.wrap(model)
    for one in (model, plain):
        one(sequence()).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert memo.report(model).totals.bytes_to_host > 0
