"""A profile for a machine that is not there: one block of each kind tried on the CPU, measured on meta, timed by rates.

    structure (roles, token dimensions, reruns)   one real block, a few tokens, on the CPU
    sizes, FLOPs, transient memory                that block on meta at three lengths
    seconds                                       work divided by what the machine reaches
    weights, states                               the whole model on meta

Everything is that of one rank, by the tokens that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.members import modules_of
from memo_runtime.blocks.stack import BlockRef, find_blocks
from memo_runtime.errors import ArgumentError
from memo_runtime.execution.guard import refuse_other_optimisers
from memo_runtime.machines.machine import Machine
from memo_runtime.offline.batches import Sequences, batch_bytes, note_on_features
from memo_runtime.offline.calls import Calls, block_calls
from memo_runtime.offline.kinds import Kind, check_attention_is_fused, find_kinds
from memo_runtime.offline.loops import note_on_launches
from memo_runtime.offline.measure import BlockRun, run_block
from memo_runtime.offline.on_rank import on_rank
from memo_runtime.offline.optimizers import Optimizer, find_optimizer
from memo_runtime.offline.positions import note_on_positions
from memo_runtime.offline.ranks import Ranks, choose_ranks
from memo_runtime.offline.sequences import note_on_sequences, note_on_tables
from memo_runtime.offline.structure import Structure
from memo_runtime.offline.subject import Subject
from memo_runtime.offline.tiles import tiles_of
from memo_runtime.offline.timing import growth_of
from memo_runtime.offline.windows import note_on_windows
from memo_runtime.profiling.outside import end_of, result_bytes
from memo_runtime.profiling.states import measure_states
from memo_runtime.records import BlockProfile, Growth, Link, ModelStates, Profile, TiledProfile
from memo_runtime.units import GiB, MiB, format_bytes

#: What CUDA and its libraries take outside of the allocator, and what of the rest is left to fragmentation.
_CONTEXT_BYTES = 640 * MiB
_USABLE = 0.95
#: Inside of it: workspaces of cuBLAS and cuBLASLt, and what is rounded up: of an 8B on an H200 3 MiB, for want of which
#: the longest length of a forecast had no plan there.
_WORKSPACE_BYTES = 68 * MiB
#: Bytes that each logit moves in the loss: as they are, in float32, the softmax, the gradient.
_LOGIT_TRAFFIC = 16
#: Of a node's memory where nobody says how much there is.
_HOST_BYTES_PER_GPU = 232 * GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is known of a model on a machine at every length: each kind of block was looked at once.

    Attributes:
        refs: the blocks that are called, and ``calls`` how. kinds: for each block the first of its kind, by name, of
            which ``examples`` says what was seen.
    """

    subject: Subject
    machine: Machine
    ranks: Ranks
    refs: tuple[BlockRef, ...]
    calls: Calls
    kinds: Mapping[str, str]
    examples: Mapping[str, Kind]
    structure: Structure
    optimizer: Optimizer | None
    _tiles: dict[str, tuple[TiledProfile | None, str]] = field(default_factory=dict)
    _states: dict[str, ModelStates] = field(default_factory=dict)
    _moved: dict[str, int] = field(default_factory=dict)

    def tiles(self, kind: str) -> tuple[TiledProfile | None, str]:
        """What the block called ``kind`` takes by tiles, and why it cannot run so; looked at once."""
        if kind not in self._tiles:
            (ref,) = (ref for ref in self.refs if ref.name == kind)
            self._tiles[kind] = tiles_of(ref, self.calls.of[kind], self.machine)
        return self._tiles[kind]

    @property
    def states(self) -> ModelStates:
        """Those of the whole model with its optimizer; worked out once for each."""
        model, made = self.subject.model, self.optimizer
        name = "" if made is None else made.name
        if name not in self._states:
            self._states[name] = measure_states(model, None, "cuda") if made is None else made.states(model)
        return self._states[name]

    @property
    def moved(self) -> int:
        """Bytes that the optimizer's step reads and writes, AdamW's where none is named; worked out once for each."""
        made = find_optimizer("adamw") if self.optimizer is None else self.optimizer
        if made.name not in self._moved:
            self._moved[made.name] = made.moved(self.subject.model)
        return self._moved[made.name]

    def at(self, tokens: int, *, host_bytes: int | None = None, tiles: bool = False) -> Offline:
        """The profile of one rank for a step on ``tokens`` tokens.

        Args:
            host_bytes: of the whole node, to be pinned. tiles: also what blocks take by tiles.

        Raises:
            ArgumentError: tokens do not divide.
        """
        subject, machine, ranks, gpus = self.subject, self.machine, self.ranks, self.ranks.gpus
        local = ranks.local(tokens)
        of_kinds = {}
        for name, kind in self.examples.items():
            takes, reason = self.tiles(name) if tiles else (None, "")
            of_kinds[name] = replace(on_rank(kind, machine, ranks, local, takes), tiled_reason=reason)
        blocks = tuple(
            replace(
                self._where(of_kinds[self.kinds[ref.name]], ref.name),
                name=ref.name, stack=ref.stack, gradients=-(-self.structure.gradients[ref.name] // gpus),
            )
            for ref in self.refs
        )  # fmt: skip
        profile = _assemble(self, local=local, blocks=blocks)
        per_gpu = _HOST_BYTES_PER_GPU if host_bytes is None else host_bytes // gpus
        source = f"assumed {format_bytes(per_gpu)} per GPU" if host_bytes is None else f"--host-memory / {gpus}"
        of_blocks = [self.examples[self.kinds[ref.name]] for ref in self.refs]
        notes = (
            *profile.notes,
            *note_on_positions(subject, tokens),
            *note_on_windows([kind.window for kind in of_blocks], tokens),
            *note_on_launches([kind.runs for kind in of_blocks], local),
            *note_on_sequences(profile.rows, self._seen(), tokens),
            *self._note_on_tables(tokens),
        )
        sent = self._sent(local)
        return Offline(
            profile=replace(profile, host_bytes=per_gpu, host_source=source, notes=notes),
            study=self,
            host_bytes=host_bytes,
            tokens=tokens,
            model_flops=_model_flops(of_blocks, self.structure, tokens),
            sent_bytes=sent,
            sent_seconds=sent / machine.gpu_rate,
        )

    def _seen(self) -> dict[str, int]:
        """Tokens of a sequence that each block was called with."""
        return {ref.name: self.examples[self.kinds[ref.name]].profile.tokens for ref in self.refs}

    def _note_on_tables(self, tokens: int) -> Iterator[str]:
        """Of a table that the search knows to end at, nothing more is said."""
        if not self.subject.learned_positions:
            yield from note_on_tables(self.subject.model, [ref.name for ref in self.refs], tokens)

    def _where(self, like: BlockProfile, name: str) -> BlockProfile:
        """``like`` as the block called ``name``, which is handed the result of the one below, or something else."""
        takes = like.tiled
        return like if takes is None else replace(like, tiled=replace(takes, chained=name in self.calls.chained))

    def _sent(self, local: int) -> int:
        """Bytes that a rank sends in a step."""
        of_blocks = [self.examples[self.kinds[ref.name]] for ref in self.refs]
        sent = sum(
            self.ranks.sent(kind.runs[-1].heads, local, weights=kind.weights, gradients=kind.gradients)
            for kind in of_blocks
        )
        # What lies outside of the blocks is gathered once for the whole step.
        return sent + round(self.ranks.others * (self.structure.root_bytes + self.structure.root_gradients))


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A profile of one rank at one length, and what a step of the whole model is worth.

    Attributes:
        host_bytes: of the node, as asked for. tokens: of the whole sequence. model_flops: of the whole step, nothing
            counted twice. sent_bytes: by one rank to the others in a step, and ``sent_seconds`` alone.
    """

    profile: Profile
    study: Study
    host_bytes: int | None
    tokens: int
    model_flops: int
    sent_bytes: int
    sent_seconds: float

    def with_tiles(self) -> Offline:
        """The same with what blocks take by tiles."""
        return self.study.at(self.tokens, host_bytes=self.host_bytes, tiles=True)

    def runs(self) -> dict[str, BlockRun]:
        """How every block runs on meta at the length of one rank, by name."""
        study, local = self.study, self.study.ranks.local(self.tokens)
        found = {
            name: run_block(study.subject.model.get_submodule(name), study.calls.of[name], kind.profile, local)
            if kind.profile.arguments
            else kind.runs[-1]
            for name, kind in study.examples.items()
        }
        return {name: found[kind] for name, kind in study.kinds.items()}


def study_model(
    subject: Subject,
    machine: Machine,
    *,
    gpus: int = 1,
    optimizer: Optimizer | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Look at every kind of block of ``subject`` once; ``progress`` is told what is done next.

    Raises:
        ArgumentError: nothing is trained, or several GPUs for attention in plain products.
        OffloaderActiveError: gradient checkpointing is on, of which a wrapped model is refused too.
        NoBlocksError, ProfileError: the model has no blocks, or does not run here.
    """
    refs = find_blocks(subject.model)
    if not any(parameter.requires_grad for parameter in subject.model.parameters()):
        raise ArgumentError(
            f"no parameter of {subject.name} is trained (requires_grad is False for all), so that there is no step to "
            "plan: --lora 16 trains adapters, --trainable PATTERN parameters by name"
        )
    refuse_other_optimisers(modules_of(subject.model), {id(ref.module) for ref in refs})
    progress("how blocks are called")
    calls = block_calls(subject, refs)
    seen = tuple(ref for ref in refs if ref.name in calls.of)
    kinds, examples = find_kinds(seen, calls.of, progress)
    ranks = choose_ranks(gpus, [one for kind in examples.values() for one in kind.runs[-1].heads])
    if gpus > 1:
        check_attention_is_fused(subject.name, examples)
    return Study(
        subject=subject, machine=machine, ranks=ranks, refs=seen, calls=calls, kinds=kinds, examples=examples,
        structure=Structure.of(subject, machine.device, seen, refs), optimizer=optimizer,
    )  # fmt: skip


def profile_offline(
    subject: Subject,
    machine: Machine,
    *,
    tokens: int,
    gpus: int = 1,
    host_bytes: int | None = None,
    optimizer: Optimizer | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Offline:
    """Profile ``subject`` for a step on ``tokens`` tokens; see ``study_model`` and ``Study.at``."""
    choose_ranks(gpus, []).local(tokens)
    study = study_model(subject, machine, gpus=gpus, optimizer=optimizer, progress=progress)
    return study.at(tokens, host_bytes=host_bytes)


def _assemble(study: Study, *, local: int, blocks: tuple[BlockProfile, ...]) -> Profile:
    """The profile of the whole model."""
    subject, machine, ranks = study.subject, study.machine, study.ranks
    gpus, model, call = ranks.gpus, subject.model, study.calls.of[blocks[-1].name]
    made = study.structure
    states = _sharded(replace(study.states, gradients_last=made.embeddings), gpus)
    # Gathered: everything outside of the blocks for the whole step, one block in use and one ahead.
    gathered = made.root_bytes + 2 * made.block_bytes if gpus > 1 else 0
    hidden = call.leaves[blocks[-1].input_leaf]
    seen = hidden.shape[blocks[-1].token_dim]
    rows = max(1, hidden.numel() // hidden.shape[-1] // seen)
    hidden_bytes = hidden.numel() * hidden.element_size() // seen * local
    behind = (*blocks[:-1], replace(blocks[-1], tokens=local))
    gathered_gradients = made.root_bytes if gpus > 1 else 0
    end = end_of(model, behind, rows, hidden_bytes, tiled_loss=subject.tiled_loss, held=gathered_gradients)
    calls = [study.calls.of[name] for name in dict.fromkeys((blocks[0].name, blocks[-1].name))]
    sequences = Sequences(rows=rows, lengths=set(study._seen().values()), width=hidden.shape[-1])
    batch = batch_bytes(subject.batch, sequences, calls)
    return Profile(
        fingerprint=made.fingerprint,
        device_type="cuda",
        device_name=machine.device,
        device_bytes=int((machine.memory_bytes - _CONTEXT_BYTES) * _USABLE),
        host_bytes=0,
        host_source="",
        link=Link(to_host=machine.link_of(gpus), to_device=machine.link_of(gpus), measured=False),
        states=states,
        rows=rows,
        blocks=blocks,
        allocated_bytes=states.parameters + states.buffers + gathered + _WORKSPACE_BYTES,
        expandable=True,
        shared=_shared(blocks, call, seen),
        # The batch, and the embedding's result, which is the first block's input and is held by the stack's caller:
        # of a model that is known, until its forward is over.
        outside_forward=replace(batch, linear=hidden_bytes / local + batch.linear),
        entry=Growth(linear=hidden_bytes / local) if subject.tiled_loss else Growth(),
        **end,
        result=result_bytes(model, behind, rows, hidden_bytes / local, tiled_loss=subject.tiled_loss),
        outside_seconds=_outside_seconds(made, machine, rows, study.moved // gpus),
        norm_behind=made.norm_behind,
        notes=(
            *subject.notes, *_notes(machine, ranks), *_note_on_precision(made.wide, machine),
            *note_on_features(subject.batch, sequences),
        ),
    )


def _sharded(states: ModelStates, gpus: int) -> ModelStates:
    def share(size: int) -> int:
        return -(-size // gpus)

    return replace(
        states,
        parameters=share(states.parameters), gradients=share(states.gradients), optimizer=share(states.optimizer),
        gradients_last=share(states.gradients_last), gradients_tied=share(states.gradients_tied),
        stepping=share(states.stepping),
    )  # fmt: skip


def _shared(blocks: Sequence[BlockProfile], call: BlockCall, tokens: int) -> Growth:
    """Bytes of the arguments that all blocks share, by local tokens."""
    block = blocks[-1]
    dims = {axes.leaf: len(axes.dims) for axes in block.arguments}
    by_dims = [0, 0, 0]
    for leaf, tensor in call.tensors():
        if leaf != block.input_leaf:
            by_dims[min(dims.get(leaf, 0), 2)] += tensor.numel() * tensor.element_size()
    return Growth(constant=by_dims[0], linear=by_dims[1] / tokens, quadratic=by_dims[2] / tokens**2)


def _outside_seconds(made: Structure, machine: Machine, rows: int, moved: int) -> Growth:
    """Head and loss, forward and backward: their products, and what logits move; and the optimizer's step, which moves
    ``moved`` bytes.
    """
    rate = machine.memory_rate * machine.shares.elementwise
    products = rows * made.flops_outside_called / (machine.peak_flops * machine.shares.matmul)
    return Growth(constant=moved / rate, linear=products + _LOGIT_TRAFFIC * rows * made.logits / rate)


def _model_flops(kinds: Sequence[Kind], made: Structure, tokens: int) -> int:
    """Forward and backward of the whole sequence, by what the operators do.

    6 N S + 6 L d S^2 for a causal model of which all is trained; weights that are frozen have no gradient, which leaves
    4 N S of them. Fused attention multiplies again in backward, which is no use: it counts three forwards.
    """
    found = 0.0
    for kind in kinds:
        for parts in (
            [(run.tokens, run.forward.matmul + run.backward.matmul) for run in kind.runs],
            [(run.tokens, _forwards(run) * run.forward.attention) for run in kind.runs_for(tokens)],
        ):
            found += growth_of(parts).exact(tokens)
    return round(found + made.flops_outside * tokens)


def _forwards(run: BlockRun) -> int:
    """Of attention, those that training needs: one where no gradient goes through it."""
    return 3 if run.backward.attention else 1


def _note_on_precision(wide: Sequence[str], machine: Machine) -> tuple[str, ...]:
    """What the times of a model in a wider precision are worth: machines are described by their rate in bf16."""
    if not wide:
        return ()
    return (
        f"weights are {' and '.join(wide)}, and {machine.name} is described by its peak in bf16: their products take "
        "longer than forecast, several times as long without TensorFloat-32, and MFU is lower; bytes are the model's",
    )


def _notes(machine: Machine, ranks: Ranks) -> tuple[str, ...]:
    return (
        f"offline: {ranks.words}; structure from one block on the CPU, sizes from meta tensors, times from "
        f"{machine.name}: {machine.shares.matmul:g} of its peak in products, {machine.shares.attention_forward:g} and "
        f"{machine.shares.attention_backward:g} in attention forward and backward; "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, so that free memory is joined",
        *machine.sources,
    )
