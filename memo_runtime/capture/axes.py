"""Where the tokens of a captured value are.

A block is traced with one symbolic number of tokens, so the shape of every value says which dimensions grow with it.
A value has none (``None``), one (a ``TokenAxis``), or more (``SQUARE``: masks and position biases; such values exist
at full length only).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import sympy
import torch

from memo_runtime.records import TokenAxis


class Square(Enum):
    """The mark of values with two token dimensions or more."""

    SQUARE = "square"


SQUARE = Square.SQUARE
Axis = TokenAxis | Square | None
#: One axis, or those of the members of a tuple that an operator yields.
AxisTree = Axis | tuple[Axis, ...]


def at(dim: int, outer: int = 1, inner: int = 1) -> TokenAxis:
    """Tokens in dimension ``dim``."""
    return TokenAxis(dim=dim, outer=outer, inner=inner)


class NotTokenWiseError(Exception):
    """An operator does not treat tokens one by one; the message says in what way."""


class TokenSymbol:
    """The symbolic number of tokens, and arithmetic on sizes that contain it."""

    def __init__(self, symbol: sympy.Symbol) -> None:
        self.symbol = symbol
        #: What ``text`` has said: it is asked at every call of a block, and sympy is slow.
        self._texts: dict[sympy.Expr, str] = {}

    def expression(self, size: Any) -> sympy.Expr:
        """``size`` (an int or a SymInt) as an expression."""
        node = getattr(size, "node", None)
        return node.expr if node is not None else sympy.Integer(int(size))

    def text(self, size: Any) -> str:
        """``size`` in words that do not depend on what the symbol is called: it has another name in each trace."""
        if isinstance(size, int):
            return str(int(size))
        found = self.expression(size)
        if found not in self._texts:
            self._texts[found] = str(found.subs(self.symbol, sympy.Symbol("tokens")))
        return self._texts[found]

    def grows(self, size: Any) -> bool:
        """``size`` depends on the number of tokens."""
        return self.symbol in self.expression(size).free_symbols

    def factor(self, size: Any) -> int:
        """n where ``size`` is n times the number of tokens.

        Raises:
            NotTokenWiseError: it is something else.
        """
        factor = sympy.simplify(self.expression(size) / self.symbol)
        if not factor.is_Integer:
            raise NotTokenWiseError(f"a size is {self.expression(size)}, which is no multiple of the number of tokens")
        return int(factor)

    def at(self, size: Any, tokens: int) -> int | float | bool:
        """The value of ``size`` for a number of tokens."""
        node = getattr(size, "node", None)
        return _value(node.expr, self.symbol, tokens) if node is not None else int(size)

    def dims(self, value: torch.Tensor) -> list[int]:
        """Dimensions of ``value`` that grow with tokens."""
        return [dim for dim, size in enumerate(value.shape) if self.grows(size)]

    def plain_axis(self, value: Any) -> Axis:
        """The axis of a value of which nothing but its shape is known.

        Raises:
            NotTokenWiseError: one dimension holds several values for each token, and their order is not known.
        """
        if not isinstance(value, torch.Tensor):
            return None
        dims = self.dims(value)
        if len(dims) != 1:
            return SQUARE if dims else None
        if self.factor(value.shape[dims[0]]) != 1:
            raise NotTokenWiseError("tokens are merged with another dimension")
        return at(dims[0])

    def check(self, value: Any, axis: Axis) -> None:
        """Compare what was followed with what the shape says.

        Raises:
            NotTokenWiseError: they disagree.
        """
        dims = self.dims(value) if isinstance(value, torch.Tensor) else []
        if axis is SQUARE:
            if len(dims) < 2:
                raise NotTokenWiseError("a token dimension is lost")
        elif isinstance(axis, TokenAxis):
            if dims != [axis.dim]:
                raise NotTokenWiseError(f"tokens are expected in dimension {axis.dim} and found in {dims}")
            if self.factor(value.shape[axis.dim]) != axis.outer * axis.inner:
                raise NotTokenWiseError("the token dimension has another size than expected")
        elif dims:
            raise NotTokenWiseError("a value without tokens grows with them")


@lru_cache(maxsize=4096, typed=True)  # asked of few sizes, by everything that runs by tiles
def _value(expression: sympy.Expr, symbol: sympy.Symbol, tokens: int) -> int | float | bool:
    value = sympy.sympify(expression).subs(symbol, tokens)
    if value in (sympy.true, sympy.false):
        return bool(value)
    return int(value) if value.is_Integer else float(value)


def reshaped(before: Sequence[Any], axis: TokenAxis, after: Sequence[Any], token: TokenSymbol) -> TokenAxis:
    """Where the tokens are after a reshape from sizes ``before`` to sizes ``after``.

    Raises:
        NotTokenWiseError: they are no longer one run of one dimension.
    """
    outer = math.prod(int(size) for size in before[: axis.dim]) * axis.outer
    inner = math.prod(int(size) for size in before[axis.dim + 1 :]) * axis.inner
    dims = [dim for dim, size in enumerate(after) if token.grows(size)]
    if len(dims) != 1:
        raise NotTokenWiseError("a reshape splits the token dimension")
    (dim,) = dims
    factor = token.factor(after[dim])
    first = math.prod(int(size) for size in after[:dim])
    last = math.prod(int(size) for size in after[dim + 1 :])
    new_outer = outer // first if first and outer % first == 0 else 0
    if not new_outer or factor % new_outer or last * (factor // new_outer) != inner:
        raise NotTokenWiseError("a reshape moves tokens between dimensions")
    return at(dim, new_outer, factor // new_outer)


def rows(tensor: torch.Tensor, axis: TokenAxis, tokens: int, start: int, stop: int) -> torch.Tensor:
    """Tokens [start, stop) of ``tensor``, which has ``tokens``: a view with its token dimension split where it must."""
    if axis.outer == 1 and axis.inner == 1:
        return tensor.narrow(axis.dim, start, stop - start)
    split: torch.Tensor = tensor.unflatten(axis.dim, (axis.outer, tokens, axis.inner))
    return split.narrow(axis.dim + 1, start, stop - start)


def packed_rows(tensor: torch.Tensor, axis: AxisTree, tokens: int, start: int, stop: int) -> torch.Tensor:
    """The same with its token dimension in one piece; a tensor without tokens as it is."""
    if not isinstance(axis, TokenAxis):
        return tensor
    part = rows(tensor, axis, tokens, start, stop)
    return part if axis.outer == 1 and axis.inner == 1 else part.flatten(axis.dim, axis.dim + 2)
