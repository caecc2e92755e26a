"""How a model on meta calls its blocks: one forward with hooks, no block skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall, first_tensor
from memo_runtime.blocks.stack import BlockRef
from memo_runtime.errors import MemoError, ProfileError, TraceError
from memo_runtime.offline.subject import Subject
from memo_runtime.recording.meta_attention import fused_attention_on_meta
from memo_runtime.recording.meta_scalars import PlainAnswers


class _LastSeenError(Exception):
    """Every block was called."""


@dataclass(frozen=True, slots=True)
class Calls:
    """First calls of blocks, by name. ``chained``: blocks that were handed the very result of the one called before."""

    of: Mapping[str, BlockCall]
    chained: frozenset[str]


def block_calls(subject: Subject, refs: Sequence[BlockRef]) -> Calls:
    """The arguments of every block's first call, by name, on meta.

    Raises:
        ProfileError: the model does not run on its batch on the meta device, or calls none of its blocks.
    """
    found: dict[str, BlockCall] = {}
    chained: set[str] = set()
    results: list[tuple[torch.Tensor, int]] = []

    def note(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The model's cache is filled behind this, and by blocks after it.
            call = BlockCall.of(args, kwargs, module).with_own_caches()
            for result, version in results:
                if name not in found and any(one is result and one._version == version for _, one in call.tensors()):
                    chained.add(name)
            found.setdefault(name, call.detached())
            if len(found) == len(refs):
                raise _LastSeenError

        return before

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = first_tensor(output)
        results[:] = [] if first is None else [(first, first._version)]

    handles = [ref.module.register_forward_pre_hook(note(ref.name), with_kwargs=True) for ref in refs]
    handles += [ref.module.register_forward_hook(after) for ref in refs]
    args, kwargs = subject.batch
    try:
        with fused_attention_on_meta(), PlainAnswers():
            subject.model(*args, **kwargs)
    except _LastSeenError:
        pass
    except TraceError as error:
        raise ProfileError(
            f"{subject.name} looks at values, and what it does next depends on data: profile it on its device with "
            f"memo.profile, or leave out of the batch what it looks at ({str(error).partition(',')[0]})"
        ) from error
    except MemoError:
        raise
    except Exception as error:
        raise _not_run(subject.name, error) from error
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ProfileError(f"{subject.name} was called and none of its blocks was ({refs[0].name}, ...)")
    return Calls(found, frozenset(chained))


def _not_run(name: str, error: Exception) -> ProfileError:
    """The model called ``name`` raised ``error`` on meta: for want of values, or for a reason of its own."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if "meta" in said.lower():
        return ProfileError(
            f"{name} does not run on the meta device: {said}. What it does depends on values; profile it on its device "
            "with memo.profile instead"
        )
    return ProfileError(
        f"{name} raises when it is called: {said}. If it does so on a device too, its config, its batch or its dtype "
        "is at fault (a config.json is planned in bfloat16, a factory's model in its own dtype); if it runs there, "
        "profile it there with memo.profile"
    )
