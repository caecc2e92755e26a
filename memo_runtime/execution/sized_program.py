"""A program that TorchInductor compiled for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memo_runtime.execution.compilers import as_module, let_go_of_pinned_memory, through_inductor
from memo_runtime.execution.sized_graph import Line, Sized

#: PyTorch's symbols stand for numbers from here on.
LEAST = 2


class SizedProgram:
    """``sized``, compiled with ``tokens``, two or more, as the number that decides where the compiler has a choice.

    Raises:
        NotCompiledError: TorchInductor cannot compile it so.
    """

    def __init__(self, sized: Sized, tokens: int, tensors: Sequence[torch.Tensor]) -> None:
        self._sized = sized
        self._program, self._holds = _compile(sized, tokens, tensors)
        self._called = False

    def serves(self, tokens: int, sized: Sized) -> bool:
        """It does at ``tokens`` what the graph ``sized`` does."""
        mine = self._sized
        return self._holds(tokens) and (mine is sized or mine.at(tokens) == sized.at(tokens))

    def __call__(self, tokens: int, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """The results for ``tokens`` tokens."""
        results: tuple[Any, ...] = self._program(tokens, *tensors)
        if not self._called:
            self._called = True
            let_go_of_pinned_memory()
        return results


def _compile(
    sized: Sized, tokens: int, tensors: Sequence[torch.Tensor]
) -> tuple[Callable[..., tuple[Any, ...]], Callable[[int], bool]]:
    """(the program, which takes the number and the tensors; whether it may be called with a number)."""
    # They take a second to import, which only a GPU needs.
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv()
    source = ConstantSource("tokens")
    symbol = shapes.create_symbol(tokens, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    number: Any = shapes.create_symintnode(symbol, hint=tokens, source=source)
    with FakeTensorMode(shape_env=shapes):
        fakes = [
            torch.empty_strided(_sizes(shape, number), _sizes(stride, number), dtype=one.dtype, device=one.device)
            for (shape, stride, _), one in zip(sized.lines(), tensors, strict=True)
        ]
    program = through_inductor(as_module(sized.graph()), [number, *fakes])
    guards = shapes.produce_guards_expression([number])

    def holds(other: int) -> bool:
        return other >= LEAST and (not guards or bool(shapes.evaluate_guards_expression(guards, [other])))

    return program, holds


def _sizes(lines: Sequence[int | Line], number: Any) -> list[Any]:
    return [one.slope * number + one.offset if isinstance(one, Line) else one for one in lines]
