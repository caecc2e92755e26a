"""How often the profile runs a block: the first step waits for every run, so their number is a promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.execution.install import original_forward
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling import timing
from tests.api.towers import HIDDEN, Block, signal
from tests.exactness.models import FAMILIES
from tests.seen import Seen

#: Calibrating the first block of a kind, and comparing another with it; GPT-2's has a dropout to find.
CALIBRATION = 9
COMPARISON = 3
#: Forwards and reruns of up to four samples at three lengths, and what pins hold there.
TIMING = 3 * (2 * timing._MOST_SAMPLES + 1)


class Runs:
    """Counts runs of blocks, by name and by length."""

    def __init__(self, model: nn.Module) -> None:
        wrapped = find_wrapped(model)
        assert wrapped is not None
        self._seen = Seen()
        for ref in wrapped.refs:
            inner = next(iter(ref.module.children()))
            inner.register_forward_pre_hook(self._counter(ref.name))

    def _counter(self, name: str) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen.add((name, [tuple(arg.shape) for arg in args[:1]]))

        return count

    def end(self) -> Runs:
        """All are counted."""
        seen = self._seen.taken()
        self.by_block = Counter(name for name, _ in seen)
        self.lengths = {shape for _, shapes in seen for shape in shapes}
        return self


class Tower(nn.Module):
    """Equal blocks, many or few."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, HIDDEN)
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def profiled(model: nn.Module, batch: Any) -> Runs:
    memo.wrap(model)
    runs = Runs(model)
    memo.profile(model, batch)
    return runs.end()


@pytest.mark.parametrize("count", [2, 16])
def test_equal_blocks_are_compared_and_not_calibrated_again(count: int) -> None:
    torch.manual_seed(0)
    runs = profiled(Tower([Block() for _ in range(count)]).double(), (signal(rows=2, tokens=300),))
    first, *others = runs.by_block.values()
    assert first <= CALIBRATION + TIMING + 1
    assert others == [2] * (count - 1)
    assert sum(tokens for _, tokens, _ in runs.lengths) < 1300, "a crop, a slice of it, half of it, three timed lengths"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_runs_per_block_of_a_family(family: str) -> None:
    model, batch = FAMILIES[family].make(), FAMILIES[family].batch(rows=2, tokens=45)
    runs = profiled(model, batch)
    counts = sorted(runs.by_block.values())
    assert counts[-1] <= CALIBRATION + TIMING + 1
    assert sum(count > COMPARISON for count in counts) <= 2, "one of each kind"


class Shifting(Block):
    """Reads its neighbours ``shift`` tokens back: a number that no parameter shows."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.roll(self.shift, 1))


class Choosing(Block):
    """Mixes tokens or not, by the value of a weight."""

    def __init__(self, choice: float) -> None:
        super().__init__()
        self.choice = nn.Parameter(torch.tensor(choice))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.stack([self.choice, 1 - self.choice]).repeat(HIDDEN, 1)[:, None]
        padded = nn.functional.pad(x.transpose(1, 2), (1, 0))
        return super().forward(nn.functional.conv1d(padded, kernel, groups=HIDDEN).transpose(1, 2))


@pytest.mark.parametrize(
    "blocks",
    [
        lambda: [Shifting(1), Shifting(3), Shifting(0)],
        lambda: [Choosing(0.0), Choosing(0.5), Choosing(1.0)],
        lambda: [Block(), Block().eval(), Block()],
        lambda: [Block(), Block().requires_grad_(requires_grad=False), Block()],
    ],
    ids=["numbers", "values", "modes", "frozen"],
)
def test_blocks_that_only_look_alike_have_profiles_of_their_own(blocks: Callable[[], list[nn.Module]]) -> None:
    """What a comparison gives is what calibrating each by itself gives."""
    torch.manual_seed(0)
    together = blocks()
    found = memo.profile(Tower(together).double(), (signal(rows=2, tokens=40),)).blocks
    for number, block in enumerate(found):
        alone = Tower([together[number], together[number]]).double()
        alone.layers[1] = nn.Identity()
        apart = memo.profile(alone, (signal(rows=2, tokens=40),), blocks=[together[number]]).blocks[0]
        for name in ("groups", "saved", "pins", "forward_flops", "rerun_flops", "recompute_flops", "sliceable"):
            assert getattr(block, name) == getattr(apart, name), (number, name)


def test_a_comparison_leaves_the_block_as_it_was() -> None:
    torch.manual_seed(0)
    model = Tower([Block() for _ in range(3)]).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = [original_forward(layer) for layer in model.layers]
    memo.profile(model, (signal(rows=2, tokens=40),))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [original_forward(layer) for layer in model.layers] == original
    assert all(parameter.grad is None for parameter in model.parameters())
