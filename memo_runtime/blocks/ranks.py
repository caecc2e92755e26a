"""Other ranks of a distributed run, which wait for this one in every collective and know nothing of its profiling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def several_ranks() -> bool:
    """This process is one of several of a distributed run."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _is_sharded(module: nn.Module) -> bool:
    # FSDP1 is a wrapper of that name; fully_shard derives a class from the module's own and puts FSDP in front.
    return type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel"))


def forwards_meet(model: nn.Module) -> bool:
    """A forward of ``model`` gathers parameters: no rank can run one alone."""
    return several_ranks() and any(_is_sharded(module) for module in model.modules())


def is_gathered(block: nn.Module) -> bool:
    """Parameters of ``block`` are gathered when it is called, and are not there otherwise."""
    return any(_is_sharded(module) for module in block.modules())


def has_sharded_parts(block: nn.Module) -> bool:
    """A module inside ``block`` gathers its own parameters, and frees them when it is done.

    What its operators read is gone afterwards, and every run of the block is a collective of all ranks.
    """
    return any(_is_sharded(module) for module in block.modules() if module is not block)


@contextlib.contextmanager
def apart_from_other_ranks(model: nn.Module) -> Iterator[None]:
    """A forward of a DistributedDataParallel inside does not wait for other ranks, whose batches may be known."""
    switches = ("require_forward_param_sync", "require_backward_grad_sync")
    before = {name: model.__dict__[name] for name in switches if isinstance(model, DistributedDataParallel)}
    model.__dict__.update(dict.fromkeys(before, False))
    try:
        yield
    finally:
        model.__dict__.update(before)
