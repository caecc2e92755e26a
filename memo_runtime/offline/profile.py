"""A profile for a machine that is not there: one block of each kind tried on the CPU, measured on meta, timed by rates.

    structure (roles, token dimensions, reruns)   one real block, a few tokens, on the CPU
    sizes, FLOPs, transient memory                that block on meta at three lengths
    seconds                                       work divided by what the machine reaches
    weights, states                               the whole model on meta

Everything is that of one rank, by the tokens that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.blocks.stack import BlockRef, find_blocks
from memo_runtime.errors import ArgumentError
from memo_runtime.machines.machine import Machine
from memo_runtime.offline.calls import block_calls
from memo_runtime.offline.materialise import real_block, real_call
from memo_runtime.offline.measure import BlockRun, run_block
from memo_runtime.offline.ranks import Ranks, choose_ranks
from memo_runtime.offline.subject import Subject
from memo_runtime.offline.timing import growth_of, per_token, seconds_of, total
from memo_runtime.profiling.calibrate import calibrate
from memo_runtime.profiling.fingerprint import batch_signature, make_fingerprint
from memo_runtime.profiling.growth import fit_peak, polynomial_bytes
from memo_runtime.profiling.outside import loss_peak, outside_peak
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.states import gradient_bytes, gradients_of_blocks, measure_states
from memo_runtime.profiling.writing import written_bytes
from memo_runtime.recording.meta_attention import fused_attention_on_cpu
from memo_runtime.records import BlockProfile, Growth, Link, ModelStates, PinKind, Profile, Role
from memo_runtime.units import GiB, MiB, format_bytes

#: Lengths measured on meta: counts are polynomials, peaks are straight from a few thousand tokens on.
_LENGTHS = (4096, 8192, 16384)
#: What CUDA and its libraries take outside of the allocator, and what of the rest is left to fragmentation.
_CONTEXT_BYTES = 640 * MiB
_USABLE = 0.95
#: Inside of it: workspaces of cuBLAS and cuBLASLt.
_WORKSPACE_BYTES = 64 * MiB
#: Bytes that each logit moves in the loss: as they are, in float32, the softmax, the gradient.
_LOGIT_TRAFFIC = 16
#: Of a block's products, those of tokens with tokens; less is rounding of what routing counts.
_SQUARE_SHARE = 0.01
#: Of a node's memory where nobody says how much there is.
_HOST_BYTES_PER_GPU = 232 * GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Offline:
    """A profile of one rank, how the model is spread, and what a step of the whole model is worth.

    Attributes:
        tokens: of the whole sequence. model_flops: of the whole step, nothing counted twice. sent_bytes: by one rank to
            the others in a step, and ``sent_seconds`` alone.
        runs: how the first block of each kind ran on meta at the length of one rank, and ``kinds`` the first block of
            the kind of every block.
    """

    profile: Profile
    ranks: Ranks
    tokens: int
    model_flops: int
    sent_bytes: int
    sent_seconds: float
    runs: Mapping[str, BlockRun]
    kinds: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Blocks that are alike: the profile and runs of the first of them."""

    profile: BlockProfile
    runs: tuple[BlockRun, ...]
    weights: int
    gradients: int


def profile_offline(
    subject: Subject,
    machine: Machine,
    *,
    tokens: int,
    gpus: int = 1,
    host_bytes: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Offline:
    """Profile ``subject`` for a step on ``tokens`` tokens.

    Args:
        host_bytes: host memory of the whole node for pinned activations. progress: told what is done next.

    Raises:
        ArgumentError: tokens do not divide, or several GPUs for attention in plain products.
        NoBlocksError, ProfileError: the model has no blocks, or does not run here.
    """
    refs = find_blocks(subject.model)
    progress("how blocks are called")
    calls = block_calls(subject, refs)
    seen = [ref for ref in refs if ref.name in calls]
    kinds, examples = _kinds(seen, calls, progress)
    heads = [one for kind in examples.values() for one in kind.runs[-1].heads]
    ranks = choose_ranks(gpus, heads)
    if gpus > 1:
        _check_attention_is_fused(subject, examples)
    local = ranks.local(tokens)
    gradients = gradients_of_blocks(subject.model, [(ref.name, ref.module) for ref in seen])
    blocks = tuple(
        replace(
            _on_rank(examples[kinds[ref.name]], machine, ranks, local),
            name=ref.name, stack=ref.stack, gradients=-(-gradients[ref.name] // gpus),
        )
        for ref in seen
    )  # fmt: skip
    profile = _assemble(subject, machine, ranks, local=local, blocks=blocks, call=calls[seen[-1].name])
    per_gpu = _HOST_BYTES_PER_GPU if host_bytes is None else host_bytes // gpus
    source = f"assumed {format_bytes(per_gpu)} per GPU" if host_bytes is None else f"--host-memory / {gpus}"
    profile = replace(profile, host_bytes=per_gpu, host_source=source)
    of_blocks = [examples[kinds[ref.name]] for ref in seen]
    sent = sum(
        ranks.sent(kind.runs[-1].heads, local, weights=kind.weights, gradients=kind.gradients) for kind in of_blocks
    )
    # What lies outside of the blocks is gathered once for the whole step.
    inside = _inside(subject.model, blocks)
    around = [p for p in subject.model.parameters() if id(p) not in inside]
    sent += round(ranks.others * sum(p.numel() * p.element_size() + gradient_bytes(p) for p in around))
    return Offline(
        profile=profile,
        ranks=ranks,
        tokens=tokens,
        model_flops=_model_flops(subject, of_blocks, tokens),
        sent_bytes=sent,
        sent_seconds=sent / machine.gpu_rate,
        runs={
            name: run_block(subject.model.get_submodule(name), calls[name], kind.profile, local)
            if kind.profile.arguments
            else kind.runs[-1]
            for name, kind in examples.items()
        },
        kinds=kinds,
    )


def _kinds(
    refs: Sequence[BlockRef], calls: Mapping[str, BlockCall], progress: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, _Kind]]:
    """The name of the first block like it for every block, and what is known of each such first."""
    firsts: dict[tuple[object, ...], str] = {}
    kinds: dict[str, str] = {}
    examples: dict[str, _Kind] = {}
    for ref in refs:
        key = _likeness(ref.module, calls[ref.name])
        first = kinds[ref.name] = firsts.setdefault(key, ref.name)
        if first == ref.name:
            progress(f"{ref.name} on the CPU and at {len(_LENGTHS)} lengths on meta")
            examples[first] = _look(ref, calls[ref.name])
    return kinds, examples


def _check_attention_is_fused(subject: Subject, kinds: Mapping[str, _Kind]) -> None:
    """Ranks share attention that is one operator, and nothing else that mixes tokens.

    Products of tokens with tokens would be counted for one part only, and what a scan or a convolution hands to the
    next rank would not be counted at all.
    """
    for name, kind in kinds.items():
        mixers = [pin.op for pin in kind.profile.pins if pin.kind is PinKind.MIXER]
        if mixers and not kind.runs[-1].heads:
            raise ArgumentError(
                f"{subject.name} cannot be planned for several GPUs: {name} mixes tokens by {mixers[0]}, and only "
                "attention by scaled_dot_product_attention is known to be shared out; plan it with --gpus 1"
            )
        products = growth_of([(run.tokens, run.forward.matmul) for run in kind.runs])
        square = products.quadratic * kind.runs[-1].tokens ** 2
        if square > _SQUARE_SHARE * kind.runs[-1].forward.matmul:
            raise ArgumentError(
                f"{subject.name} cannot be planned for several GPUs: {name} multiplies tokens with tokens itself, and "
                "only attention by scaled_dot_product_attention is known to be shared out; plan it with --gpus 1"
            )


def _likeness(block: nn.Module, call: BlockCall) -> tuple[object, ...]:
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    modules = tuple((name, type(module), module.extra_repr()) for name, module in block.named_modules())
    shapes = tuple(tuple(tensor.shape) for _, tensor in call.tensors())
    # Layers of several kinds in one class (sliding and full attention) are told apart by plain attributes.
    plain = tuple(
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, str, float, type(None))) and not key.startswith("_")
    )
    return parameters, modules, shapes, plain, call.signature()


def _look(ref: BlockRef, call: BlockCall) -> _Kind:
    block, arguments = real_block(ref.module), real_call(call, ref.name)
    start = Start([(ref.name, block), ("its arguments", arguments.leaves)], torch.device("cpu"))
    with fused_attention_on_cpu():
        profile = calibrate(block, block.forward, arguments, start, name=ref.name, stack=ref.stack, examples=[])
    del block, arguments, start
    weights = {storage_key(p): p.untyped_storage().nbytes() for p in ref.module.parameters()}
    lengths = _LENGTHS if profile.arguments and profile.tokens else (profile.tokens,)
    return _Kind(
        profile=profile,
        runs=tuple(run_block(ref.module, call, profile, tokens) for tokens in lengths),
        weights=sum(weights.values()),
        gradients=sum(p.numel() * p.element_size() for p in ref.module.parameters() if p.requires_grad),
    )


def _on_rank(kind: _Kind, machine: Machine, ranks: Ranks, local: int) -> BlockProfile:
    """The profile of a block of ``kind`` on one of ``ranks``, with seconds and transient memory."""
    profile, runs = kind.profile, kind.runs
    if not profile.tokens:
        return profile
    stay = (Role.PARAMETER, Role.SHARED, Role.INPUT)
    saved = [group.size for group in profile.groups if group.saved and group.role not in stay]
    curved = any(group.size.quadratic for group in profile.groups)

    def peak(of: Callable[[BlockRun], int], *, beyond_saved: bool, buffers: int, constant: int) -> Growth:
        points = [(r.tokens, of(r) - (sum(s.at(r.tokens) for s in saved) if beyond_saved else 0)) for r in runs]
        fitted = fit_peak(points, curved=curved)
        return replace(fitted, constant=fitted.constant + constant, linear=fitted.linear + buffers)

    gpus, heads = ranks.gpus, runs[-1].heads
    buffers = ranks.buffers(heads)
    # A gradient is reduced out of a copy beside it.
    reduced = kind.gradients if gpus > 1 else 0
    forward = seconds_of([(r.tokens, r.forward) for r in runs], machine, gpus=gpus, backward=False)
    backward = seconds_of([(r.tokens, r.backward) for r in runs], machine, gpus=gpus, backward=True)
    rerun = seconds_of([(r.tokens, r.rerun) for r in runs], machine, gpus=gpus, backward=False)
    rate = machine.gpu_rate
    exchange = per_token(ranks.exchanged(heads), rate)
    gather = ranks.others * kind.weights / rate
    scatter = ranks.others * kind.gradients / rate
    waits = (
        (_beyond(gather, forward.exact(local)), _beyond(gather + scatter, backward.exact(local)))
        if ranks.ulysses
        else (
            _beyond(exchange.exact(local) + gather, forward.exact(local)),
            _beyond(2 * exchange.exact(local) + gather + scatter, backward.exact(local)),
        )
    )
    hidden = 0.0 if not ranks.ulysses else 1.0
    return replace(
        profile,
        tokens=local,
        forward_seconds=total((forward, 1), (exchange, hidden), (Growth(constant=waits[0]), 1)),
        backward_seconds=total((backward, 1), (exchange, hidden), (Growth(constant=waits[1]), 1)),
        rerun_seconds=rerun,
        write_seconds=per_token(_written(profile, local), machine.memory_rate * machine.shares.elementwise),
        forward_flops=_rank_flops(profile.forward_flops, gpus),
        recompute_flops=_rank_flops(profile.recompute_flops, gpus),
        forward_peak=peak(lambda r: r.forward_peak, beyond_saved=True, buffers=buffers, constant=0),
        backward_peak=peak(lambda r: r.backward_peak, beyond_saved=True, buffers=buffers, constant=reduced),
        rerun_peak=peak(lambda r: r.rerun_peak, beyond_saved=False, buffers=0, constant=0),
        output=polynomial_bytes(runs[-1].output, runs[-1].tokens, 1),
        timed_tokens=local,
    )


def _beyond(seconds: float, cover: float) -> float:
    """What of a transfer its cover does not hide."""
    return max(0.0, seconds - cover)


def _written(profile: BlockProfile, tokens: int) -> float:
    """Bytes that are read and written for every token that is put behind a prefix."""
    return 2 * sum(written_bytes(profile, tokens)) / tokens


def _rank_flops(flops: Growth, gpus: int) -> Growth:
    return replace(flops, quadratic=flops.quadratic * gpus)


def _assemble(
    subject: Subject,
    machine: Machine,
    ranks: Ranks,
    *,
    local: int,
    blocks: tuple[BlockProfile, ...],
    call: BlockCall,
) -> Profile:
    """The profile of the whole model; ``call`` is that of the last block."""
    gpus, model = ranks.gpus, subject.model
    inside = _inside(model, blocks)
    # Of a model that is known: its embeddings are called before the first block, and nowhere else.
    last = _embeddings(model, inside) if subject.tiled_loss else 0
    states = _sharded(replace(measure_states(model, None, "cuda"), gradients_last=last), gpus)
    root = [p for p in model.parameters() if id(p) not in inside]
    root_bytes = sum(p.numel() * p.element_size() for p in root)
    block_bytes = max(_bytes(model.get_submodule(block.name)) for block in blocks)
    # Gathered: everything outside of the blocks for the whole step, one block in use and one ahead.
    gathered = root_bytes + 2 * block_bytes if gpus > 1 else 0
    hidden = call.leaves[blocks[-1].input_leaf]
    example = replace(blocks[-1], tokens=hidden.shape[blocks[-1].token_dim])
    rows = max(1, hidden.numel() // hidden.shape[-1] // example.tokens)
    hidden_bytes = hidden.numel() * hidden.element_size()
    outside = outside_peak(model, (*blocks[:-1], example), rows, hidden_bytes, tiled_loss=subject.tiled_loss)
    loss = loss_peak(model, (*blocks[:-1], example), hidden_bytes) if subject.tiled_loss else Growth()
    gathered_gradients = root_bytes if gpus > 1 else 0
    batch = 2 * 8 * rows
    names = [block.name for block in blocks]
    return Profile(
        fingerprint=make_fingerprint(model, names, batch_signature(*subject.batch), "offline", machine.device),
        device_type="cuda",
        device_name=machine.device,
        device_bytes=int((machine.memory_bytes - _CONTEXT_BYTES) * _USABLE),
        host_bytes=0,
        host_source="",
        link=Link(to_host=machine.link_of(gpus), to_device=machine.link_of(gpus), measured=False),
        states=states,
        rows=rows,
        blocks=blocks,
        allocated_bytes=states.parameters + states.buffers + gathered + _WORKSPACE_BYTES + batch * local,
        expandable=True,
        shared=_shared(blocks, call, example.tokens),
        # The embedding's result, which is the first block's input, is held by the caller of the stack.
        outside_forward=Growth(linear=hidden_bytes / example.tokens),
        outside_peak=replace(outside, constant=outside.constant + gathered_gradients),
        loss_peak=loss,
        outside_seconds=_outside_seconds(model, blocks, machine, rows),
        notes=(*_notes(machine, ranks), *_note_on_precision(subject, machine)),
    )


def _inside(model: nn.Module, blocks: Sequence[BlockProfile]) -> set[int]:
    """Parameters of blocks, by id."""
    return {id(p) for block in blocks for p in model.get_submodule(block.name).parameters()}


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _sharded(states: ModelStates, gpus: int) -> ModelStates:
    def share(size: int) -> int:
        return -(-size // gpus)

    return replace(
        states,
        parameters=share(states.parameters), gradients=share(states.gradients), optimizer=share(states.optimizer),
        gradients_last=share(states.gradients_last),
    )  # fmt: skip


def _embeddings(model: nn.Module, inside: Container[int]) -> int:
    """Bytes of gradients of embeddings outside of the blocks that are no head as well."""
    owned: dict[int, tuple[nn.Parameter, set[bool]]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owned.setdefault(id(parameter), (parameter, set()))[1].add(isinstance(module, nn.Embedding))
    return sum(
        gradient_bytes(parameter)
        for key, (parameter, embeds) in owned.items()
        if embeds == {True} and key not in inside
    )


def _shared(blocks: Sequence[BlockProfile], call: BlockCall, tokens: int) -> Growth:
    """Bytes of the arguments that all blocks share, by local tokens."""
    block = blocks[-1]
    dims = {axes.leaf: len(axes.dims) for axes in block.arguments}
    by_dims = [0, 0, 0]
    for leaf, tensor in call.tensors():
        if leaf != block.input_leaf:
            by_dims[min(dims.get(leaf, 0), 2)] += tensor.numel() * tensor.element_size()
    return Growth(constant=by_dims[0], linear=by_dims[1] / tokens, quadratic=by_dims[2] / tokens**2)


def _heads_of(model: nn.Module, names: Sequence[str]) -> int:
    """Parameters of linear modules outside of the blocks."""
    inside = tuple(f"{name}." for name in names)
    return sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(inside)
    )


def _outside_seconds(model: nn.Module, blocks: Sequence[BlockProfile], machine: Machine, rows: int) -> Growth:
    """Head and loss, forward and backward: three products, and what logits move."""
    names = [block.name for block in blocks]
    inside = tuple(f"{name}." for name in names)
    logits = sum(
        module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(inside)
    )
    shares = machine.shares
    products = 6 * rows * _heads_of(model, names) / (machine.peak_flops * shares.matmul)
    return Growth(linear=products + _LOGIT_TRAFFIC * rows * logits / (machine.memory_rate * shares.elementwise))


def _model_flops(subject: Subject, kinds: Sequence[_Kind], tokens: int) -> int:
    """Forward and backward of the whole sequence: 6 N S + 6 L d S^2 for a causal model, by what its operators do."""
    forward = 0.0
    for kind in kinds:
        for part in ("matmul", "attention"):
            forward += growth_of([(run.tokens, getattr(run.forward, part)) for run in kind.runs]).exact(tokens)
    names = [ref.name for ref in find_blocks(subject.model)]
    return round(3 * (forward + 2 * _heads_of(subject.model, names) * tokens))


def _note_on_precision(subject: Subject, machine: Machine) -> tuple[str, ...]:
    """What the times of a model in a wider precision are worth: machines are described by their rate in bf16."""
    wide = sorted({str(p.dtype).removeprefix("torch.") for p in subject.model.parameters() if p.dtype.itemsize > 2})
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
