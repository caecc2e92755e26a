"""Which gradients a segment hands on, where nothing was made of some of its outputs.

Programs are traced for gradients of all outputs, with zeros for one that has none. What those zeros alone reach would
get a gradient of zeros where autograd leaves ``None``, and optimisers tell the two apart: of zeros they decay weights
and go on with momentum. So it is kept by source which outputs' gradients come to it, as autograd's own graph says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def reaching(outputs: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> tuple[frozenset[int], ...]:
    """By source: the numbers of those ``outputs`` whose gradient comes to it. Sources are leaves, or want none."""
    places = {id(one): place for place, one in enumerate(sources)}
    found: list[set[int]] = [set() for _ in sources]
    for number, output in enumerate(outputs):
        seen: set[Any] = set()
        pending: list[Any] = [output.grad_fn] if output.grad_fn is not None else []
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            place = places.get(id(getattr(node, "variable", None)))
            if place is not None:
                found[place].add(number)
            pending.extend(one for one, _ in node.next_functions if one is not None)
    return tuple(map(frozenset, found))
