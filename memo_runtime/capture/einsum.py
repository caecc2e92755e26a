"""Where ``torch.einsum`` leaves the token dimension, by its equation.

    btd, dhk -> bthk      tokens are t: each meets weights alone, and stays at its place
    bthk, bshk -> bhts    tokens are t and s: every one meets every other
    bt, td -> bd          t is summed over
"""

from __future__ import annotations

from collections.abc import Sequence

from memo_runtime.capture.axes import Axis, NotTokenWiseError, at
from memo_runtime.records import TokenAxis

#: What an ellipsis stands for, from its last dimension on; no letter of an equation.
_FURTHER = "αβγδεζηθικλμ"


def einsum_axis(equation: str, operands: Sequence[tuple[int, Axis]]) -> Axis:
    """Axis of the result; ``operands``: number of dimensions and axis of each.

    Raises:
        NotTokenWiseError: tokens are summed over, meet each other, or are in a diagonal.
    """
    terms, result = _letters(equation.replace(" ", ""), [count for count, _ in operands])
    found = set()
    for term, (_, axis) in zip(terms, operands, strict=True):
        if not isinstance(axis, TokenAxis):
            continue
        if term.count(term[axis.dim]) > 1:
            raise NotTokenWiseError("it takes the diagonal along tokens")
        found.add((term[axis.dim], axis.outer, axis.inner))
    if not found:
        return None
    if len(found) > 1:
        raise NotTokenWiseError("every token meets every other")
    ((letter, outer, inner),) = found
    if letter not in result:
        raise NotTokenWiseError("it sums over tokens")
    return at(result.index(letter), outer, inner)


def _letters(equation: str, counts: Sequence[int]) -> tuple[list[str], str]:
    """(one letter for each dimension of each operand, those of the result)."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    further = max([0, *(count - len(term) + 3 for term, count in zip(terms, counts, strict=True) if "..." in term)])
    whole = [term.replace("...", _dots(count - len(term) + 3)) for term, count in zip(terms, counts, strict=True)]
    if arrow:
        return whole, right.replace("...", _dots(further))
    named = "".join(terms).replace(".", "")
    return whole, _dots(further) + "".join(sorted(letter for letter in set(named) if named.count(letter) == 1))


def _dots(count: int) -> str:
    return "".join(reversed(_FURTHER[:count]))
