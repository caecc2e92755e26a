"""Records whose numbers depend on a number of tokens, found from two that were made at two numbers.

A record is a dataclass; what it holds may be records, tuples of them, meta tensors (their sizes and strides), programs
(told by their number) and anything that is the same at every length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

#: What stands for a record among nested tuples, as its first item.
_RECORD, _TENSOR, _PROGRAM = "record", "tensor", "program"


def plain(value: Any, numbers: Mapping[int, int]) -> Any:
    """``value`` as nested tuples, which compare. ``numbers``: of programs, by identity."""
    if id(value) in numbers:
        return (_PROGRAM, str(numbers[id(value)]))
    if isinstance(value, torch.Tensor):
        return (_TENSOR, tuple(value.shape), tuple(value.stride()), value.dtype)
    if is_dataclass(value) and not isinstance(value, type):
        return (_RECORD, type(value), *(plain(getattr(value, one.name), numbers) for one in fields(value)))
    if isinstance(value, tuple):
        return ("tuple", *(plain(one, numbers) for one in value))
    return value


def back(value: Any, program: Callable[[int], Any]) -> Any:
    """What ``plain`` made a tuple of, with other programs."""
    if not isinstance(value, tuple):
        return value
    kind, *rest = value
    if kind == _PROGRAM:
        return program(int(rest[0]))
    if kind == _TENSOR:
        shape, strides, dtype = rest
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if kind == _RECORD:
        made, *values = rest
        return made(*(back(one, program) for one in values))
    return tuple(back(one, program) for one in rest)
