"""The walk over what a block can change: everything is found once and written back as it was, and it is bounded."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.reach import reach
from memo_runtime.blocks.state import StateWatch
from memo_runtime.errors import StateChangedError


@dataclass(frozen=True, slots=True)
class Frozen:
    values: list[int] = field(default_factory=lambda: [1, 2])
    number: int = 3


class Named:
    def __init__(self) -> None:
        self.inner: Any = None
        self.number = 1


def everything() -> tuple[nn.Module, Named]:
    module, named = nn.Linear(2, 2), Named()
    module.named, named.inner = named, Frozen()
    module.own = {
        "list": [1, [2]], "set": {1}, "deque": deque([1, 2]), "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, a=[1]), "array": np.arange(4), "tuple": ([1],), "module": nn.Dropout(0.1),
    }  # fmt: skip
    named.cycle = module
    return module, named


def shown(module: nn.Module) -> str:
    named, own = module.named, module.own
    return str([
        list(vars(module)), {k: v if k != "module" else (v.p, v.training) for k, v in own.items()},
        named.number, named.inner.values, named.inner.number, sorted(vars(named)), module.weight is module.kept,
    ])  # fmt: skip


def change(module: nn.Module) -> None:
    named, own = module.named, module.own
    own["list"][1].append(3)
    own["list"].insert(0, 9)
    own["set"].add(2)
    own["deque"].appendleft(5)
    own["ordered"].move_to_end("a")
    own["ordered"]["c"] = 3
    own["default"]["b"].append(4)
    own["array"][2] = 7
    own["tuple"][0].clear()
    own["module"].p = 0.5
    own["module"].eval()
    named.number += 1
    named.new = 1
    named.inner.values.append(5)
    object.__setattr__(named.inner, "number", 4)
    del own["list"]
    own["list"] = 0
    module.weight = nn.Parameter(torch.zeros(2, 2))
    module.extra = 1


def test_everything_is_found_and_written_back():
    module, _ = everything()
    module.__dict__["kept"] = module.weight
    before, found = shown(module), reach([("block", module)])
    assert found.changed() == []
    change(module)
    changed = shown(module)
    assert changed != before
    for index in found.changed():
        found.cells[index].write(found.contents[index])
    assert shown(module) == before
    assert found.changed() == []


def test_a_state_is_installed_and_what_was_there_comes_back():
    module, _ = everything()
    module.__dict__["kept"] = module.weight
    before = shown(module)
    state = StateWatch("block", module).take(BlockCall.of((torch.zeros(1),), {}), draws=False)
    change(module)
    after = shown(module)
    with state.restored("block"):
        assert shown(module) == before
        module.weight = nn.Parameter(torch.ones(2, 2))
        module.own["list"].append(1)
    assert shown(module) == after


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_version_that_moved_is_an_error(name):
    module = nn.Linear(2, 2)
    state = StateWatch("block", module).take(BlockCall.of((torch.zeros(1),), {}), draws=False)
    with torch.no_grad():
        getattr(module, name).add_(1)
    with pytest.raises(StateChangedError, match=rf"block\.{name}"), state.restored("block"):
        pass


def test_a_walk_is_bounded_and_nearest_first():
    module = nn.Linear(2, 2)
    module.chain = [Named()]
    last = module.chain[0]
    for _ in range(30_000):
        last.inner = Named()
        last = last.inner
    module.data = list(range(1_000_000))
    found = reach([("block", module)])
    assert len(found.cells) <= 8200
    assert {label for label, _ in found.tensors} == {"block.weight", "block.bias"}
    assert all(cell.holder is not module.data for cell in found.cells)


def test_engines_and_the_library_are_not_entered():
    class Engine(DistributedDataParallel):
        """Never started: only its class counts."""

        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    Engine.__module__ = DistributedDataParallel.__module__
    inner = nn.Linear(2, 2)
    inner.device, inner.function = torch.device("cpu"), test_engines_and_the_library_are_not_entered
    engine = Engine(inner)
    holders = [cell.holder for cell in reach([("block", engine)]).cells]
    assert all(holder is not vars(engine) for holder in holders)
    assert any(holder is vars(inner) for holder in holders)


def test_a_gathered_parameter_that_was_freed_is_left_to_its_engine():
    module = nn.Linear(2, 2)
    found = reach([("block", module)])
    gathered, sharded = module.weight, nn.Parameter(torch.ones(1, 2))
    module.weight = sharded
    gathered.untyped_storage().resize_(0)
    for index in found.changed():
        found.cells[index].write(found.contents[index])
    assert module.weight is sharded
