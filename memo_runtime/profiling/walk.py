"""One pass of a model's forward that reaches every block with its real arguments and computes as little as it can.

Where the forward calls a block, the block is looked at on a crop of the arguments, and then skipped where its result
has the shape of its input (``passing.py``): no activation of the target length is ever saved. The pass ends when
nothing is left to see. What it changed is put back.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import mapped
from memo_runtime.blocks.outside import Outside
from memo_runtime.blocks.reach import reach
from memo_runtime.blocks.rerun import Forward
from memo_runtime.profiling.passing import passed_on
from memo_runtime.profiling.start import FirstWrites, Start, cut_graphs, is_like, without_graph
from memo_runtime.records import BlockProfile

Batch = tuple[tuple[Any, ...], dict[str, Any]]
#: Runs the model's forward such that every block's calls ``observer(name, own_forward, args, kwargs)`` for its result.
Run = Callable[[Callable[..., Any]], None]


class _AllSeen(BaseException):
    """Nothing is left to see."""


@dataclass(frozen=True, slots=True)
class NamedBlock:
    """A block to profile: its name, stack, module and own forward."""

    name: str
    stack: int
    module: nn.Module
    forward: Forward


@dataclass(slots=True)
class Walk(ABC):
    """Stands in for the forward of every block during the pass."""

    blocks: dict[str, NamedBlock]
    device: torch.device
    may_stop: bool = True
    #: Names of blocks that are run each time: they leave something elsewhere, where blocks behind them may read it, or
    #: yield something else than a tensor like their input. Blocks that are equal otherwise need not do so (of a model's
    #: layers two may store keys and values for others, one may halve the tokens).
    each_time: set[str] = field(default_factory=set)
    _outputs: dict[object, bool] = field(default_factory=dict)
    _start: Start = field(init=False)
    _around: Outside = field(init=False)
    _writes: FirstWrites = field(init=False)

    @abstractmethod
    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """Look at a block that is being called; what is known of it."""

    @abstractmethod
    def is_done(self) -> bool:
        """Nothing is left to see."""

    def over(self, model: nn.Module, batch: Batch, run: Run) -> None:
        """Walk through ``model`` on ``batch``."""
        # A root under FSDP reshards in a post-forward hook: it must run to its end.
        self.may_stop = not any(type(module).__name__.startswith("FSDP") for module in model.modules())
        roots = [(type(model).__name__, model), ("the batch", batch)]
        self._start = Start(roots, self.device, clone=True, elements=self.may_stop)
        # The first of all that is looked at, so that it is put back last: what the model's own code has written before
        # a block was looked at, and what hooks of its modules, which see stand-ins here, have collected.
        self._around = self._start.outside(model)
        with self._start.kept(), torch.enable_grad():
            # Between blocks the model's own code may write to parameters (a momentum encoder).
            self._writes = FirstWrites(self._start)
            with contextlib.suppress(_AllSeen), self._around, self._writes:
                run(self)
            self.finish()
        del self._start, self._around, self._writes

    @abstractmethod
    def finish(self) -> None:
        """The forward is over; what it did not call can be looked at."""

    def __call__(
        self, name: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], *,
        first: Callable[[], None] | None = None,
    ) -> Any:  # fmt: skip
        """Look at block ``name`` and give a result of the right shape; ``first``: what else looks at the call."""
        with self._around.paused(), self._writes.paused():
            if first is not None:
                first()
            block = self.blocks[name]
            call = BlockCall.of(args, kwargs, block.module)
            profile = self.look(block, forward, call)
            if self.may_stop and self.is_done():
                raise _AllSeen
            return self._result(block, forward, call, profile)

    def _result(self, block: NamedBlock, forward: Forward, call: BlockCall, profile: BlockProfile) -> Any:
        each_time = block.name in self.each_time
        key = (type(block.module), profile.groups, profile.tokens, each_time)
        hidden = call.leaves[profile.input_leaf] if profile.tokens else None
        if self._outputs.get(key) and not each_time and isinstance(hidden, torch.Tensor):
            return hidden
        roots = roots_of(block, call)
        if key not in self._outputs and not each_time and hidden is not None:
            shown = passed_on(forward, call, profile, Start(roots, self.device), roots)
            if shown is not None:
                self._outputs[key] = True
                return shown
        args, kwargs = call.arguments()
        before = reach(roots)
        # With grad, so that each result tells whether it has one, and with nothing saved if the forward does not walk
        # its graph (of a block that could not be profiled that is not known).
        walks = profile.inner_autograd or not profile.tokens
        hooks = contextlib.nullcontext() if walks else saved_tensors_hooks(lambda _: None, _never)
        with torch.enable_grad(), hooks, FirstWrites(self._start), self._start.outside(block.module):
            output = forward(*args, **kwargs)
        self._outputs[key] = not cut_graphs(before, roots) and (
            isinstance(hidden, torch.Tensor) and is_like(output, hidden)
        )
        return mapped(without_graph, output)


def unprofiled(block: NamedBlock, reason: str) -> BlockProfile:
    """The profile of a block that is left alone."""
    return BlockProfile(
        name=block.name, kind=type(block.module).__name__, stack=block.stack,
        tokens=0, token_dim=0, input_leaf=0, reason=reason,
    )  # fmt: skip


def roots_of(block: NamedBlock, call: BlockCall) -> list[tuple[str, Any]]:
    """Everything that a call of ``block`` may change."""
    arguments = call.original if call.original is not None else call.leaves
    return [(block.name, block.module), ("its arguments", arguments)]


def _never(_: Any) -> torch.Tensor:
    raise AssertionError("the graph of a profiled forward is never walked backward")
