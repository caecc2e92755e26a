"""Operators that the user has named as mixers: what stands in for those whose library says what they yield."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree


def replaceable(name: str) -> list[Any]:
    """Overloads of operator ``name`` (``namespace.name``) that have kernels of their own and write to no argument."""
    namespace, _, rest = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), rest.partition(".")[0])
    found = []
    for overload in packet.overloads():
        func = getattr(packet, overload)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func._name, "CompositeImplicitAutograd")
        results = func._schema.returns
        aliases = any(one.alias_info is not None for one in (*func._schema.arguments, *results))
        if not composite and not aliases and results and all(str(one.type) == "Tensor" for one in results):
            found.append(func)
    return found


def outlined(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Results of ``func`` as its fake kernel says, made and filled: with an argument of that shape, or with zeros."""
    given = [one for one in _pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    with FakeTensorMode() as mode:
        fake = _pytree.tree_map_only(torch.Tensor, mode.from_tensor, (tuple(args), kwargs))
        found = func(*fake[0], **fake[1])
    outlines = found if isinstance(found, (tuple, list)) else (found,)
    results = []
    for one in outlines:
        made = torch.empty_strided(tuple(one.shape), one.stride(), dtype=one.dtype, device=one.device)
        alike = next((each for each in given if each.shape == made.shape and each.dtype == made.dtype), None)
        results.append(made.zero_() if alike is None else made.copy_(alike))
    return results
