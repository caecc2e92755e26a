"""Which modules of a model are its blocks: nested containers, stages, several stacks; each trains exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memo_runtime as memo
from memo_runtime.blocks.given import given_blocks
from memo_runtime.blocks.stack import find_blocks
from memo_runtime.errors import BlockListError, NoBlocksError
from tests.api.subjects import acted, assert_trains_as, refused
from tests.api.towers import HIDDEN, POLICIES, Block, Tower, signal
from tests.sharing import shared_work
from tests.tiny import few_samples

__all__ = ["few_samples", "shared_work"]


class MLP(nn.Module):
    """A residual MLP of some width, for stages of different shapes."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Shape(Tower):
    """A tower with another shape of stack; ``calls`` yields what is called, in order."""

    def __init__(self, layers: nn.Module, calls: Callable[[Any], Iterator[nn.Module]]) -> None:
        super().__init__(0)
        self.layers = layers  # type: ignore[assignment]
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for module in self.calls(self.layers):
            x = module(x)
        return self.last(x)


class Stage(nn.Module):
    """Blocks of one width, and a layer to the next."""

    def __init__(self, width: int, depth: int, then: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLP(width) for _ in range(depth))
        self.down = nn.Linear(width, then)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.down(x)


class Experts(nn.Module):
    """A layer with experts inside: those are part of the block."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([expert(x) for expert in self.experts]).mean(0)


def flat(layers: Any) -> Iterator[nn.Module]:
    for inner in layers:
        yield from inner


def pairs() -> nn.Module:
    return nn.ModuleList(nn.ModuleList([Block(), MLP()]) for _ in range(2))


def widths(*, as_lists: bool) -> list[nn.Module]:
    made: list[nn.Module] = []
    for width, depth, then in ((HIDDEN, 2, 16), (16, 3, 8), (8, 1, HIDDEN)):
        parts = [*(MLP(width) for _ in range(depth)), nn.Linear(width, then)]
        made.append(nn.ModuleList(parts) if as_lists else nn.Sequential(*parts))
    return made


def shared() -> nn.Module:
    block = Block()
    return nn.ModuleList([nn.ModuleList([block, MLP()]), nn.ModuleList([block, MLP()])])


#: What the stack is, how it is called, and the blocks of each stack that are to be found.
SHAPES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Iterator[nn.Module]], list[str]]] = {
    "lists of two parts": (pairs, flat, ["0.0 0.1 1.0 1.1"]),
    "lists of blocks": (
        lambda: nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2)), flat, ["0.0 0.1 1.0 1.1"]
    ),
    "lists of different depths": (
        lambda: nn.ModuleList(nn.ModuleList(Block() for _ in range(n)) for n in (2, 3)),
        flat,
        ["0.0 0.1", "1.0 1.1 1.2"],
    ),
    "lists of different widths": (lambda: nn.ModuleList(widths(as_lists=True)), flat, ["0.0 0.1", "1.0 1.1 1.2"]),
    "dicts of two parts": (
        lambda: nn.ModuleList(nn.ModuleDict({"attention": Block(), "mlp": MLP()}) for _ in range(2)),
        lambda layers: (part for layer in layers for part in layer.values()),
        ["0.attention 0.mlp 1.attention 1.mlp"],
    ),
    "a dict of blocks": (
        lambda: nn.ModuleDict({name: Block() for name in ("low", "middle", "high")}),
        lambda layers: iter(layers.values()),
        ["low middle high"],
    ),
    "a dict of stacks": (
        lambda: nn.ModuleDict({name: nn.ModuleList(Block() for _ in range(2)) for name in ("left", "right")}),
        lambda layers: flat(layers.values()),
        ["left.0 left.1", "right.0 right.1"],
    ),
    "a dict of everything": (
        lambda: nn.ModuleDict({"in": nn.Linear(HIDDEN, HIDDEN), "h": nn.ModuleList(Block() for _ in range(2))}),
        lambda layers: iter([layers["in"], *layers["h"]]),
        ["h.0 h.1"],
    ),
    "stages": (
        lambda: nn.ModuleList([Stage(HIDDEN, 2, 16), Stage(16, 3, 8), Stage(8, 1, HIDDEN)]),
        iter,
        ["0.blocks.0 0.blocks.1", "1.blocks.0 1.blocks.1 1.blocks.2", "2.blocks.0"],
    ),
    "stages in sequence": (
        lambda: nn.Sequential(*widths(as_lists=False)), lambda layers: iter([layers]), ["0.0 0.1", "1.0 1.1 1.2", "2.0"]
    ),
    "experts": (lambda: nn.ModuleList(Experts() for _ in range(2)), iter, ["0 1"]),
    "experts but for the first": (
        lambda: nn.ModuleList([Experts(0), *(Experts() for _ in range(2))]), lambda layers: iter(layers[1:]), ["1 2"]
    ),
    "one block in two places": (shared, flat, ["0.0 0.1 1.1"]),
}  # fmt: skip


def made(case: str) -> Shape:
    torch.manual_seed(0)
    layers, calls, _ = SHAPES[case]
    return Shape(layers(), calls).double()


def stacks_of(model: nn.Module, blocks: Any = None) -> list[str]:
    refs = find_blocks(model) if blocks is None else given_blocks(model, blocks)
    assert all(model.get_submodule(ref.name) is ref.module for ref in refs)
    count = max(ref.stack for ref in refs) + 1
    return [" ".join(ref.name.removeprefix("layers.") for ref in refs if ref.stack == stack) for stack in range(count)]


#: Whose blocks are managed once more, by another policy, after they were left alone.
AGAIN = ("lists of two parts", "stages", "one block in two places")


@pytest.mark.parametrize(("case", "policies"), [
    *((case, ("memo", "swap") if case in AGAIN else ("memo",)) for case in SHAPES),
    *(pytest.param(case, ("memo", "swap"), marks=pytest.mark.slow) for case in SHAPES if case not in AGAIN),
], ids=lambda value: value if isinstance(value, str) else " then ".join(value))  # fmt: skip
def test_the_blocks_of_a_shape_are_found_and_train_exactly(case: str, policies: tuple[str, ...]) -> None:
    model, plain = made(case), made(case)
    assert stacks_of(model) == SHAPES[case][2]
    for policy in policies:
        memo.wrap(model, **POLICIES[policy])
        for _ in range(2):
            assert_trains_as(model, plain, signal())
            # A block that is called twice moves twice what is planned for it.
            report = memo.report(model) if case == "one block in two places" else acted(model)
            assert report.totals.bytes_to_host > 0
        assert len(report.blocks) == len(find_blocks(plain))
        memo.unwrap(model)


def test_blocks_with_a_forward_of_the_instance_are_blocks() -> None:
    """A forward may be set on the instance of a class that has none."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP()

    torch.manual_seed(0)
    model = nn.Sequential(Bare(), Bare())
    assert refused(NoBlocksError, find_blocks, model)
    for bare in model:
        bare.forward = bare.inner.forward
    assert [ref.name for ref in find_blocks(model)] == ["0", "1"]


GIVEN: dict[str, tuple[str, Any, list[str]]] = {
    "a list of lists": ("lists of two parts", "layers", ["0.0 0.1 1.0 1.1"]),
    "an inner list": ("lists of blocks", "layers.1", ["1.0 1.1"]),
    "two inner lists": ("lists of different depths", ["layers.1", "layers.0"], ["1.0 1.1 1.2", "0.0 0.1"]),
    "a dict": ("a dict of blocks", "layers", ["low middle high"]),
    "blocks one by one": ("lists of blocks", ["layers.0.0", "layers.1.1"], ["0.0 1.1"]),
    "a stage as a block": ("stages", ["layers.0", "layers.2"], ["0 2"]),
    "stages in sequence": ("stages in sequence", "layers", ["0 1 2"]),
}


@pytest.mark.parametrize("case", GIVEN)
def test_containers_that_are_given(case: str) -> None:
    shape, blocks, want = GIVEN[case]
    model, plain = made(shape), made(shape)
    assert stacks_of(model, blocks) == want
    memo.wrap(model, blocks=blocks, **POLICIES["memo"])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        acted(model)


def test_a_module_without_a_forward_is_no_block() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Block()

    model = made("lists of blocks")
    model.holder = Holder()
    message = refused(BlockListError, given_blocks, model, ["layers.0.0", "holder"])
    assert message.startswith("blocks holds 'holder' (Holder), which has no forward to manage")
    assert "part: Block" in message


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_torch_jit_has_compiled_is_no_block() -> None:
    """Found or given; and blocks beside it are found."""

    class Scriptable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(x)

    model = nn.Sequential(*[torch.jit.script(Scriptable()) for _ in range(3)])
    message = refused(NoBlocksError, find_blocks, model)
    assert message.endswith("cannot be blocks: wrap the model with those that they were made of.")
    assert "torch.jit" in refused(BlockListError, given_blocks, model, ["0", "1"])
    model.extend([Block(), Block()])
    assert [ref.name for ref in find_blocks(model)] == ["3", "4"]


def test_check_takes_blocks_as_modules_and_the_blocks_of_a_wrapped_model() -> None:
    """What is checked are copies: the modules that are given belong to the model."""
    model = made("lists of blocks")
    chosen = [model.layers[0][1], model.layers[1][0]]
    result = memo.check(model, signal(), blocks=chosen)
    assert result.ok
    assert [block.name for block in result.report.blocks] == ["layers.0.1", "layers.1.0"]
    memo.wrap(model, blocks=chosen, **POLICIES["swap"])
    assert [block.name for block in memo.check(model, signal()).report.blocks] == ["layers.0.1", "layers.1.0"]


class Group(nn.Module):
    """A group of layers, as ALBERT has it: one of them, called again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.members[0](x)


def test_one_block_called_many_times_has_a_ready_line() -> None:
    def calls(layers: Any) -> Iterator[nn.Module]:
        return iter([layers[0]] * 4)

    torch.manual_seed(0)
    model, plain = (Shape(nn.ModuleList([Group()]), calls).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    message = refused(NoBlocksError, memo.wrap, model)
    assert "memo.wrap(model, blocks='layers.0')" in message
    assert "weights shared over depth" in message
    memo.wrap(model, blocks="layers.0", **POLICIES["memo"])
    for _ in range(2):
        assert_trains_as(model, plain, signal())
        assert memo.report(model).totals.recomputed_flops > 0


def test_several_candidates_are_a_list_that_can_be_given() -> None:
    class Two(Tower):
        def __init__(self) -> None:
            super().__init__(0)
            self.one, self.other = Block(), MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(self.one(self.first(x))))

    model = Two().double()
    message = refused(NoBlocksError, memo.wrap, model)
    assert "blocks=['one', 'other'])" in message
    assert memo.check(model, signal(), blocks=["one", "other"]).ok
