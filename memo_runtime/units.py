"""Units: parsing and printing of bytes, tokens, FLOPs and seconds, and of what a user gave instead.

GB is 10^9 bytes and GiB is 2^30 bytes, for both reading and printing; for token counts K is 1024 and
M is 1024^2, which is how sequence lengths are named in the field. Nothing here imports anything else
of the project.
"""

from __future__ import annotations

import re
import reprlib
from numbers import Integral, Real

KiB = 1024
MiB = 1024**2
GiB = 1024**3

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "tib": 1024**4,
}
_TOKEN_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_NUMBER = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*$")


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = _NUMBER.match(text)
    if match is None or match.group(2).lower() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{show_value(text)} is not a {what}: write a number and a unit ({known}), such as {example}")
    number, unit = match.group(1), units[match.group(2).lower()]
    if number.isdecimal():
        return int(number) * unit  # a float would round beyond 2^53
    size = float(number) * unit
    if size == float("inf"):
        raise ValueError(f"{show_value(text)} is not a {what}: it is beyond any")
    if unit == 1 and size != int(size):
        raise ValueError(f"{show_value(text)} is not a {what}: a fraction of one needs a unit, as in {example}")
    return int(size)


def show_value(value: object) -> str:
    """``value`` as an error message quotes it: one short line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return " ".join(short.repr(value).split())


def parse_bytes(value: int | float | str) -> int:
    """Bytes of ``value``: a count, or text such as ``"70GiB"`` (2^30) or ``"80GB"`` (10^9).

    Raises:
        ValueError: negative, not finite, a fraction of a byte, no number at all, or text that names no known unit.
    """
    if isinstance(value, str):
        return _parse(value, _BYTE_UNITS, "size", "70GiB")
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf") or value != int(value):
        raise ValueError(
            f"{show_value(value)} is not a number of bytes: give a whole count >= 0 or text such as '70GiB'"
        )
    return int(value)


def parse_tokens(value: int | str) -> int:
    """Tokens of ``value``: a count, or text such as ``"128K"`` (131,072) or ``"1M"`` (1,048,576).

    Raises:
        ValueError: below 1, or text that names no known unit.
    """
    tokens = _parse(value, _TOKEN_UNITS, "token count", "128K") if isinstance(value, str) else value
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
        raise ValueError(f"{show_value(value)} is not a token count: give at least 1, or text such as '128K'")
    return int(tokens)


def format_bytes(count: int | float) -> str:
    """``count`` bytes with three significant digits in the largest binary unit that keeps it >= 1."""
    for unit, size in (("TiB", 1024**4), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} B"


def format_flops(count: int | float) -> str:
    """``count`` floating-point operations in the largest decimal unit that keeps it >= 1."""
    for unit, size in (("PFLOP", 10**15), ("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} FLOP"


def format_seconds(seconds: float) -> str:
    """``seconds`` in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.0f} us"
