"""Profiling a model: one pass that reaches every block with its real arguments (profiling/walk.py) and measures each.

The first block of a kind is calibrated and timed on a crop of its arguments, those like it are compared with it. How a
kind changes with the number of sequences is looked at in a pass of its own, when a batch with another number comes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall, sequences_in
from memo_runtime.blocks.failures import BlockRefusedError, first_line, pass_on
from memo_runtime.blocks.final_norm import final_norm
from memo_runtime.blocks.ranks import has_sharded_parts, is_gathered
from memo_runtime.blocks.rerun import Forward, is_sparse, sparse_parts, storage_key
from memo_runtime.errors import ProfileError
from memo_runtime.profiling.calibrate import calibrate
from memo_runtime.profiling.entry import is_alone, is_saved_in_front, leaves_in_front
from memo_runtime.profiling.fingerprint import batch_signature, make_fingerprint
from memo_runtime.profiling.likeness import Example, like_one_of, make_of
from memo_runtime.profiling.link import measure_link
from memo_runtime.profiling.machine import (
    allocated_after,
    device_memory,
    host_limit,
    joins_free_memory,
    settle_libraries,
    usable_device_bytes,
)
from memo_runtime.profiling.measured import Measured
from memo_runtime.profiling.optimizer_time import with_optimizer
from memo_runtime.profiling.outside import end_of, result_bytes
from memo_runtime.profiling.outside_time import outside_seconds
from memo_runtime.profiling.pairs import PairLaw, pair_law
from memo_runtime.profiling.rows import RowLaw, later_rows, measure_rows, row_dim_of
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.states import gradients_of_blocks, gradients_of_embeddings, measure_states
from memo_runtime.profiling.timing import time_block
from memo_runtime.profiling.trial import Subject
from memo_runtime.profiling.walk import Batch, NamedBlock, Run, Walk, roots_of, unprofiled
from memo_runtime.records import BlockProfile, Growth, Profile

logger = logging.getLogger("memo_runtime")


_SHARDED_PARTS = (
    "modules inside it are sharded one by one, so that running it again would gather their parameters: shard the block "
    "as a whole (fully_shard(block))"
)


@dataclass(slots=True)
class Observer(Walk):
    """Profiles every block on its first call.

    ``rows_at_once``: how each kind of block changes with the number of sequences is measured in the same pass.
    """

    rows_at_once: bool = False
    profiles: dict[str, BlockProfile] = field(default_factory=dict)
    laws: dict[str, RowLaw] = field(default_factory=dict)
    shared: dict[int, tuple[int, int, bool]] = field(default_factory=dict)
    timed: dict[object, tuple[BlockProfile, RowLaw, PairLaw | None]] = field(default_factory=dict)
    allocated: int | None = None
    rows: int = 1
    hidden: torch.Tensor | None = None
    #: What made ``hidden`` goes on holding it; and nobody holds it when the forward is over.
    saved_in_front: bool = False
    goes: bool = False
    #: Ids of parameters that led to what the first block was given.
    in_front: set[int] = field(default_factory=set)
    pairs: dict[str, PairLaw] = field(default_factory=dict)
    _called: list[str] = field(default_factory=list)
    _examples: list[Example] = field(default_factory=list)

    def look(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        """Profile ``block`` if this is its first call."""
        if self.allocated is None and self.device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated(self.device)
        if block.name not in self.profiles:
            if not self._called:
                self.in_front = leaves_in_front([tensor for _, tensor in call.tensors()])
            self._called.append(block.name)
            self.profiles[block.name] = replace(self._profile(block, forward, call), way=call.way())
        return self.profiles[block.name]

    def is_done(self) -> bool:
        """Every block was called."""
        return len(self.profiles) == len(self.blocks)

    def _profile(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        if has_sharded_parts(block.module):
            return self._unprofiled(block, _SHARDED_PARTS)
        try:
            return self._measured(block, forward, call)
        except BlockRefusedError as refused:
            return self._unprofiled(block, str(refused))
        except Exception as error:
            pass_on(error)
            # The forward itself may run; what does not is running it again and again.
            return self._unprofiled(block, f"it could not be profiled: {first_line(error)}")

    def _unprofiled(self, block: NamedBlock, reason: str) -> BlockProfile:
        self.laws[block.name] = RowLaw()
        return unprofiled(block, reason)

    def finish(self) -> None:
        """Blocks of a stack that the forward left out (layer drop) are compared with those that it called."""
        stacks = {profile.stack for profile in self.profiles.values()}
        for block in self.blocks.values():
            if block.name not in self.profiles and block.stack in stacks and not is_gathered(block.module):
                self._compare(block)
        self._examples.clear()
        # Before what the forward left in modules is put back. Several stacks have inputs of several lengths.
        alone = self.hidden is not None and is_alone(self.hidden)
        self.goes = alone and len(stacks) == 1 and not self.saved_in_front

    def in_order(self) -> list[NamedBlock]:
        """The profiled blocks as the forward called them first, which modules of a model need not be listed in.

        One that was left out stands behind the one before it in its stack.
        """
        places = {name: place for place, name in enumerate(self._called)}
        last: dict[int, int] = {}
        for block in self.blocks.values():
            if block.name not in places:
                firsts = (places[b.name] for b in self.blocks.values() if b.stack == block.stack and b.name in places)
                places[block.name] = last.get(block.stack, min(firsts, default=len(self._called)) - 1)
            last[block.stack] = places[block.name]
        return sorted((b for b in self.blocks.values() if b.name in self.profiles), key=lambda b: places[b.name])

    def carry_over(self, before: Measured) -> None:
        """Take what ``before`` knows of blocks that were not called this time."""
        for profile in before.profile.blocks:
            if profile.name not in self.profiles:
                self.profiles[profile.name], self.laws[profile.name] = profile, before.laws[profile.name]
                self.each_time |= before.each_time & {profile.name}
                self.pairs |= {name: law for name, law in before.pairs.items() if name == profile.name}

    def _compare(self, block: NamedBlock) -> None:
        make = make_of(block.module, block.stack)
        for example in self._examples:
            if example.make != make or not example.profile.tokens:
                continue
            call, leaf = example.call, example.profile.input_leaf
            start = Start(roots_of(block, call), self.device)
            forward = start.every_time(block.forward)
            with start.kept():
                found = like_one_of([example], Subject(block.module, forward, call, leaf, block.name, block.stack))
            if found is not None:
                found = replace(found, tokens=example.profile.tokens, stateful=start.wrote, draws=start.drew)
                found = replace(found, way=call.way())
                known = self._as_known(block, _kind_of(block, example.profile))
                self.profiles[block.name] = _with_times_of(known, found)
                return

    def _measured(self, block: NamedBlock, forward: Forward, call: BlockCall) -> BlockProfile:
        start = Start(roots_of(block, call), self.device)
        profile = calibrate(
            block.module, forward, call, start, name=block.name, stack=block.stack, examples=self._examples
        )
        if start.left or not start.yields_like(profile.input_leaf):
            self.each_time.add(block.name)
        self._note_shared(call, profile)
        if profile.tokens and not self.profiles:
            hidden = call.leaves[profile.input_leaf]
            self.rows = sequences_in(hidden, profile.tokens)
            self.saved_in_front = is_saved_in_front(hidden)
            self.hidden = hidden.detach()
        # Blocks that save the same cost the same: one of each is timed, and seen at other numbers of sequences.
        key = _kind_of(block, profile)
        if key not in self.timed:
            timed = time_block(block.module, forward, call, profile, start=start, device=self.device)
            # What one stack hands to another (an encoder's states) has a length of its own.
            pair = pair_law(call, profile, self.profiles.values())
            self.timed[key] = timed, self._law(block, forward, call, profile, start), pair
        return _with_times_of(self._as_known(block, key), profile)

    def _as_known(self, block: NamedBlock, kind: object) -> BlockProfile:
        """The timed block of ``kind``, whose laws are those of ``block`` too."""
        model, self.laws[block.name], pair = self.timed[kind]
        if pair is not None:
            self.pairs[block.name] = pair
        return model

    def _law(self, block: NamedBlock, forward: Forward, call: BlockCall, profile: BlockProfile, start: Start) -> RowLaw:
        if self.rows_at_once:
            return measure_rows(block.module, forward, call, profile, start)
        return later_rows(call, profile)

    def _note_shared(self, call: BlockCall, profile: BlockProfile) -> None:
        dims = {axes.leaf: len(axes.dims) for axes in profile.arguments}
        hidden = call.leaves[profile.input_leaf] if profile.tokens else None
        row_dim = row_dim_of(hidden, profile.token_dim) if isinstance(hidden, torch.Tensor) else None
        rows = hidden.shape[row_dim] if isinstance(hidden, torch.Tensor) and row_dim is not None else 1
        for leaf, tensor in call.tensors():
            if leaf != profile.input_leaf:
                by_row = rows > 1 and row_dim is not None and tensor.shape[row_dim : row_dim + 1] == (rows,)
                parts = sparse_parts(tensor) if is_sparse(tensor) else (tensor,)
                size = sum(part.untyped_storage().nbytes() for part in parts)
                self.shared[storage_key(tensor)] = size, dims.get(leaf, 0), by_row

    def shared_growth(self, tokens: int, *, by_row: bool = True) -> Growth:
        """Bytes of the arguments that blocks share, by tokens; without those of single sequences if not ``by_row``."""
        by_dims = [0, 0, 0]
        for size, dims, grows in self.shared.values():
            by_dims[min(dims, 2)] += size if by_row or not grows else 0
        tokens = max(1, tokens)
        return Growth(constant=by_dims[0], linear=by_dims[1] / tokens, quadratic=by_dims[2] / tokens**2)


def _kind_of(block: NamedBlock, profile: BlockProfile) -> object:
    """Equal for blocks that save the same."""
    return type(block.module), profile.groups, profile.saved, profile.pins, profile.tokens, profile.dynamic


def _with_times_of(model: BlockProfile, profile: BlockProfile) -> BlockProfile:
    return replace(
        profile,
        forward_seconds=model.forward_seconds,
        backward_seconds=model.backward_seconds,
        rerun_seconds=model.rerun_seconds,
        write_seconds=model.write_seconds,
        forward_peak=model.forward_peak,
        backward_peak=model.backward_peak,
        rerun_peak=model.rerun_peak,
        output=model.output,
        timed_tokens=model.timed_tokens,
    )


def model_device(model: nn.Module) -> torch.device:
    """Device of the model's parameters; the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def profile_model(
    model: nn.Module,
    blocks: Sequence[NamedBlock],
    run: Run,
    *,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    tiled_loss: bool = False,
    rows_at_once: bool = False,
    before: Measured | None = None,
) -> Measured:
    """Measure ``model`` on ``batch``.

    Args:
        model: the model, with ``blocks`` inside.
        run: runs the model's forward on the batch.
        batch: (args, kwargs) of the model call. optimizer: whose state to reserve for.
        tiled_loss: the head and loss run by tiles, so that logits take no memory to speak of.
        rows_at_once: no later pass can look at other numbers of sequences.
        before: what was measured on a batch of these shapes, for the blocks that this one does not call.

    Raises:
        ProfileError: the forward failed, or called none of the blocks.
    """
    device = model_device(model)
    settle_libraries(device, next((p.dtype for p in model.parameters()), torch.float32))
    start = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    observer = Observer({block.name: block for block in blocks}, device, rows_at_once=rows_at_once)
    observer.over(model, batch, run)
    if not observer.profiles:
        raise ProfileError(
            f"{type(model).__name__} was called and none of its blocks was "
            f"({', '.join(block.name for block in blocks[:3])}, ...): name those that its forward uses with blocks="
        )
    if before is not None:
        observer.carry_over(before)
    seen = [(b.name, b.module) for b in observer.in_order()]
    gradients, last = gradients_of_blocks(model, seen), tiled_loss * _last(model, seen, observer.in_front)
    measured = tuple(replace(observer.profiles[name], gradients=gradients[name]) for name, _ in seen)
    tokens = max(profile.tokens for profile in measured)
    name, _ = device_memory(device)
    host_bytes, host_source = host_limit()
    link = measure_link(device)
    hidden, observer.hidden = observer.hidden, None
    hidden_bytes = hidden.numel() * hidden.element_size() if hidden is not None else 0
    seconds = outside_seconds(model, measured, observer.rows, hidden, tiled_loss=tiled_loss)
    seconds = with_optimizer(seconds, model, optimizer)
    del hidden
    shared = observer.shared_growth(tokens)
    outside = max(0, (observer.allocated or start) - start - shared.at(tokens))
    profile = Profile(
        fingerprint=make_fingerprint(
            model, [profile.name for profile in measured], batch_signature(*batch), device.type, name
        ),
        device_type=device.type,
        device_name=name,
        device_bytes=usable_device_bytes(device),
        host_bytes=host_bytes,
        host_source=host_source,
        link=link,
        states=replace(measure_states(model, optimizer, device.type), gradients_last=last),
        rows=observer.rows,
        blocks=measured,
        # More than at the start: libraries took further workspaces.
        allocated_bytes=max(start, allocated_after(device)),
        expandable=joins_free_memory(device),
        shared=shared,
        outside_forward=Growth(linear=outside / max(1, tokens)),
        entry=Growth(linear=min(outside, hidden_bytes) / max(1, tokens) if observer.goes else 0.0),
        **end_of(model, measured, observer.rows, hidden_bytes, tiled_loss=tiled_loss),
        result=result_bytes(
            model, measured, observer.rows, hidden_bytes / max(1, measured[0].tokens), tiled_loss=tiled_loss
        ),
        outside_seconds=seconds,
        norm_behind=final_norm(model, [profile.name for profile in measured]) is not None,
        notes=_notes(measured),
    )
    shared_by_all = observer.shared_growth(tokens, by_row=False)
    return Measured(profile, observer.laws, observer.pairs, shared_by_all, each_time=frozenset(observer.each_time))


def _last(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], in_front: set[int]) -> int:
    """Bytes of gradients that come when all ``blocks`` have gone backward, in a causal language model.

    Its embeddings are called before the first block, as those ``in_front`` were, and nowhere else. Those of a decoder
    behind an encoder are done before the encoder's blocks: of such a model, or of several stacks, nothing is said.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    encoded = any(getattr(config, "is_encoder_decoder", False) for config in configs)
    if encoded or len({name.rpartition(".")[0] for name, _ in blocks}) > 1:
        return 0
    elsewhere = {id(one) for one in model.parameters() if id(one) not in in_front}
    return gradients_of_embeddings(model, elsewhere | {id(one) for _, block in blocks for one in block.parameters()})


def _notes(profiles: Sequence[BlockProfile]) -> tuple[str, ...]:
    stretched = [p for p in profiles if p.timed_tokens and p.tokens > 4 * p.timed_tokens]
    if not stretched:
        return ()
    first = stretched[0]
    return (f"block times are extrapolated from {first.timed_tokens:,} to {first.tokens:,} tokens",)
