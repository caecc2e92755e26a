"""Integers as files write them, of any length.

Python refuses to convert more than a few thousand digits, and a number that long fits in no 64 bits
anyway: the digits that show this are enough.
"""

from __future__ import annotations

import re

DIGITS = 24
"""Digits that are read of a number; 2^63 has 19."""
_INTEGER = re.compile(r"[+-]?[0-9]+\Z")


def is_integer(text: str) -> bool:
    """Whether the text is a plain decimal integer: no blanks, underscores, exponents, or digits of other scripts."""
    return _INTEGER.match(text) is not None


def read_integer(text: str) -> int:
    """The number; of one with more than `DIGITS` digits only the first, which is still far beyond 64 bits."""
    if len(text) <= DIGITS:
        return int(text)
    value = int(text.lstrip("+-").lstrip("0")[:DIGITS] or "0")
    return -value if text.startswith("-") else value


def shown(value: int) -> str:
    """The number for a message; dots where there may be more digits."""
    return f"{value}..." if abs(value) >= 10 ** (DIGITS - 1) else str(value)
