"""Blocks that are alike are looked at once: one real copy on the CPU for its structure, meta tensors for its sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.failures import first_line, pass_on
from memo_runtime.blocks.rerun import storage_key
from memo_runtime.blocks.stack import BlockRef
from memo_runtime.errors import ArgumentError, ProfileError
from memo_runtime.offline.loops import check_no_loop
from memo_runtime.offline.materialise import real_block, real_call
from memo_runtime.offline.measure import BlockRun, run_block
from memo_runtime.offline.products import ProductsInFloat32
from memo_runtime.offline.sequences import check_length
from memo_runtime.offline.timing import growth_of
from memo_runtime.offline.windows import window_of, within_window
from memo_runtime.profiling.calibrate import calibrate
from memo_runtime.profiling.start import Start
from memo_runtime.recording.meta_attention import fused_attention_on_cpu
from memo_runtime.records import BlockProfile, PinKind
from memo_runtime.units import format_bytes

#: Lengths measured on meta: counts are polynomials, peaks are straight from a few thousand tokens on.
_LENGTHS = (4096, 8192, 16384)
#: Of a block's products, those of tokens with tokens; less is rounding of what routing counts.
_SQUARE_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Blocks that are alike: the profile and runs of the first of them, and the ``window`` of its attention."""

    profile: BlockProfile
    runs: tuple[BlockRun, ...]
    weights: int
    gradients: int
    window: int | None = None

    def runs_for(self, tokens: int) -> tuple[BlockRun, ...]:
        """Runs whose attention grows as for a sequence of ``tokens``."""
        return within_window(self.runs, self.window, tokens)


def find_kinds(
    refs: Sequence[BlockRef], calls: Mapping[str, BlockCall], progress: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, Kind]]:
    """The name of the first block like it for every block, and what is known of each such first."""
    firsts: dict[tuple[object, ...], str] = {}
    kinds: dict[str, str] = {}
    examples: dict[str, Kind] = {}
    for ref in refs:
        key = _likeness(ref.module, calls[ref.name])
        first = kinds[ref.name] = firsts.setdefault(key, ref.name)
        if first == ref.name:
            progress(f"{ref.name} on the CPU and at {len(_LENGTHS)} lengths on meta")
            examples[first] = _look(ref, calls[ref.name])
    return kinds, examples


def check_attention_is_fused(model: str, kinds: Mapping[str, Kind]) -> None:
    """Ranks share attention that is one operator, and nothing else that mixes tokens.

    Products of tokens with tokens would be counted for one part only, and what a scan or a convolution hands to the
    next rank would not be counted at all.

    Raises:
        ArgumentError: a block of ``model`` has another.
    """
    for name, kind in kinds.items():
        mixers = [pin.op for pin in kind.profile.pins if pin.kind is PinKind.MIXER]
        if mixers and not kind.runs[-1].heads:
            raise ArgumentError(
                f"{model} cannot be planned for several GPUs: {name} mixes tokens by {mixers[0]}, and only "
                "attention by scaled_dot_product_attention is known to be shared out; plan it with --gpus 1"
            )
        products = growth_of([(run.tokens, run.forward.matmul) for run in kind.runs])
        square = products.quadratic * kind.runs[-1].tokens ** 2
        if square > _SQUARE_SHARE * kind.runs[-1].forward.matmul:
            raise ArgumentError(
                f"{model} cannot be planned for several GPUs: {name} multiplies tokens with tokens itself, and "
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
    return parameters, modules, shapes, plain, window_of(block), call.signature()


def _look(ref: BlockRef, call: BlockCall) -> Kind:
    try:
        profile = _tried(ref, call)
    except Exception as error:  # of a config that anybody wrote a block may raise anything
        pass_on(error)
        raise _cannot_run(ref, error) from error
    weights = {storage_key(p): p.untyped_storage().nbytes() for p in ref.module.parameters()}
    return Kind(
        profile=profile,
        runs=_runs(ref.module, call, profile),
        weights=sum(weights.values()),
        gradients=sum(p.numel() * p.element_size() for p in ref.module.parameters() if p.requires_grad),
        window=window_of(ref.module),
    )


def _tried(ref: BlockRef, call: BlockCall) -> BlockProfile:
    block, arguments = real_block(ref.module), real_call(call, ref.name)
    start = Start([(ref.name, block), ("its arguments", arguments.leaves)], torch.device("cpu"))
    with ProductsInFloat32(), fused_attention_on_cpu():
        return calibrate(block, block.forward, arguments, start, name=ref.name, stack=ref.stack, examples=[])


def _cannot_run(ref: BlockRef, error: Exception) -> ArgumentError:
    size = sum(p.numel() * p.element_size() for p in ref.module.parameters())
    return ArgumentError(
        f"{ref.name} ({type(ref.module).__name__}, parameters of {format_bytes(size)}) does not run on this machine's "
        f"processor, where one block of each kind is tried on a short batch: {first_line(error)}"
    )


def _runs(block: nn.Module, call: BlockCall, profile: BlockProfile) -> tuple[BlockRun, ...]:
    """Runs on meta. A block that runs on its batch may be made for that length alone, as one that folds an image is."""
    if not (profile.arguments and profile.tokens):
        return (run_block(block, call, profile, profile.tokens),)
    check_length(profile)
    try:
        check_no_loop(block, call, profile)
        return tuple(run_block(block, call, profile, tokens) for tokens in _LENGTHS)
    except Exception as error:
        pass_on(error)
        raise ProfileError(
            f"{profile.name} ({type(block).__name__}) runs on the {profile.tokens:,} tokens of the batch and not on "
            f"more: {first_line(error)}. What is made for one length has no longer ones to plan: profile the model on "
            "its device with memo.profile, or make one for the length that is meant"
        ) from error
