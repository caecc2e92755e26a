"""Timing one block: forward, backward, and a rerun with its mixers replaced, at three lengths.

A GPU that waits between runs has a higher clock than in a step (``blocks/stopwatch.py``). So on CUDA transient memory
is measured in runs of their own, and the timed ones follow each other and a while of the same work without a pause.
Those of shorter lengths come behind the longest, which also gives Python the time to be ahead of them.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from memo_runtime.blocks.call import BlockCall
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.blocks.failures import pass_on
from memo_runtime.blocks.pins import CaptureMode, PinKey, ReplayMode, Values
from memo_runtime.blocks.ranks import several_ranks
from memo_runtime.blocks.rerun import Forward, run_again, stops_early
from memo_runtime.blocks.spans import is_spans
from memo_runtime.blocks.stopwatch import LONGEST_ATTENTION, Beside, seconds_of, typical
from memo_runtime.errors import OffloaderActiveError
from memo_runtime.profiling.growth import fit_peak, fit_seconds, polynomial_bytes
from memo_runtime.profiling.mixers import (
    Attention,
    is_attention,
    is_under_spans,
    time_attention,
    time_under_spans,
)
from memo_runtime.profiling.observe import observe
from memo_runtime.profiling.start import Start
from memo_runtime.profiling.trial import crop_tokens
from memo_runtime.profiling.writing import writing, written_bytes
from memo_runtime.records import BlockProfile, Growth, PinKind, Role
from memo_runtime.sizes import stored_bytes

logger = logging.getLogger("memo_runtime")

#: Longest length timed where the block will run at more; on a GPU twice as long, or a quarter, where that is longer.
_LONGEST = {"cuda": 8192, "cpu": 512}
#: No quarter is longer: beyond, attention is nearly all, and that is timed by itself at its length.
_LONGEST_QUARTER = 2**16
#: Most samples at one length, and how much two that follow each other may differ to be taken for steady.
_MOST_SAMPLES = 4
_STEADY = 0.05
#: Samples for their bytes on CUDA, where rounds without a pause have the seconds.
_BYTES_SAMPLES = 3
#: Runs longer than this are repeated once: what libraries prepare in the first is small beside them.
_LONG_SECONDS = 0.5


def _nothing() -> None:
    """The forward went backward itself, as expected."""


@dataclass(slots=True)
class _Sample:
    tokens: int
    forward: float
    backward: float
    rerun: float
    write: float = 0.0
    forward_peak: int = 0
    backward_peak: int = 0
    rerun_peak: int = 0
    output: int = 0


@dataclass(slots=True)
class _Timer:
    """Runs of one block on the first ``tokens`` tokens of a call.

    ``beside``: what a GPU does between them.
    """

    block: nn.Module
    forward: Forward
    call: BlockCall
    profile: BlockProfile
    start: Start
    device: torch.device
    captured: dict[int, tuple[Mapping[PinKey, Values], Collection[PinKey]]] = field(default_factory=dict)
    beside: Beside | None = None

    def crop(self, tokens: int) -> BlockCall:
        """The call on ``tokens`` tokens, detached."""
        call = self.call.cut(self.profile.arguments, 0, tokens) if self.profile.arguments else self.call
        return call.detached(fresh=(self.profile.input_leaf,))

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of ``run`` on an idle device."""
        self.start.set()
        return seconds_of(run, self.device)

    def sample(self, tokens: int) -> _Sample:
        """One forward, backward and rerun at ``tokens``."""
        call = self.crop(tokens)
        args, kwargs = call.arguments()
        peak = _Peak(self.device)
        outputs: list[object] = []
        forward = self.seconds(lambda: outputs.append(self.forward(*args, **kwargs)))
        forward_peak = peak.take()
        output = _output_bytes(outputs[0]) if self.device.type == "cuda" else 0
        backward = self.seconds(lambda: self._backward(call, outputs.pop()))
        backward_peak = peak.take()
        self._captured(call, tokens)
        peak = _Peak(self.device)
        rerun = self.seconds(self._again(call, tokens))
        rerun_peak = peak.take()
        return _Sample(
            tokens, forward, backward, rerun, self._write(tokens), forward_peak, backward_peak, rerun_peak, output
        )

    def median(self, tokens: int) -> _Sample:
        """What is typical at ``tokens``.

        On CPU of samples until two agree, without the first if it does not: libraries choose kernels in it.
        """
        if self.device.type == "cuda":
            samples = [self.sample(tokens) for _ in range(_BYTES_SAMPLES)]
            return _median([self._without_pause(tokens, samples[-1])], samples)
        # Ranks of a distributed run may gather parameters in every run: all of them make as many, whatever their times.
        together = several_ranks()
        samples = [self.sample(tokens)]
        while len(samples) < _MOST_SAMPLES and (together or len(samples) < 2 or not _steady(*samples[-2:])):
            samples.append(self.sample(tokens))
        return _median(samples[-2:] if len(samples) < _MOST_SAMPLES else samples[1:] or samples, samples)

    def _without_pause(self, tokens: int, like: _Sample) -> _Sample:
        """The seconds of rounds that follow each other; those of writing are ``like``'s."""
        forward, backward, rerun = typical(self._round(tokens), self.device, (1, 3, 5), together=several_ranks())
        return _Sample(tokens, forward, backward, rerun, like.write)

    def _round(self, tokens: int) -> list[Callable[[], object]]:
        """Forward, backward and rerun, a start before each."""
        calls: list[BlockCall] = []
        outputs: list[object] = []
        tangents: list[torch.Tensor] = []
        beside = self.beside if self.beside is not None and self.beside.tokens > tokens else None

        def start() -> None:
            # A call of each round's own: a forward writes into the key/value cache that it was given.
            calls[:] = calls or [self.crop(tokens)]
            tangents[:] = [torch.randn_like(one) for output in outputs for one in _results(output)]
            if beside is not None:
                beside.run()
            # Without looking at values: that would wait for the work beside.
            self.start.set(look=False)

        def forward() -> None:
            args, kwargs = calls[0].arguments()
            outputs.append(self.forward(*args, **kwargs))

        def backward() -> None:
            self._backward(calls[0], outputs.pop(), tangents)

        def again() -> None:
            self._again(calls[0], tokens)()

        return [run for timed in (forward, backward, again) for run in (start, timed)]

    def work(self, tokens: int) -> Beside | None:
        """Forward and backward of so many tokens, as work beside; None on a CPU."""
        if self.device.type != "cuda":
            return None

        def run() -> None:
            self.start.set(look=False)
            call = self.crop(tokens)
            args, kwargs = call.arguments()
            with torch.enable_grad():
                output = self.forward(*args, **kwargs)
                self._backward(call, output, [torch.randn_like(one) for one in _results(output)])

        return Beside(tokens, run)

    def _backward(self, call: BlockCall, output: object, tangents: Sequence[torch.Tensor] = ()) -> None:
        """Gradients without touching any ``.grad``: hooks on accumulation (DDP, FSDP) must not fire.

        ``tangents``: gradients of the results; without them ones, over which kernels draw less power and run faster
        than in a step.
        """
        outputs = _results(output)
        inputs = [t for _, t in call.tensors() if t.requires_grad]
        inputs += [p for p in self.block.parameters() if p.requires_grad]
        if not outputs or not inputs:
            return
        try:
            torch.autograd.grad(outputs, inputs, tangents or [torch.ones_like(t) for t in outputs], allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant=True" not in str(error):
                raise
            raise OffloaderActiveError(
                f"'{self.profile.name}' calls torch.utils.checkpoint with use_reentrant=True inside: memo plans swap "
                "and recompute itself. Leave checkpoint out, or give it use_reentrant=False"
            ) from error

    def _again(self, call: BlockCall, tokens: int) -> Callable[[], None]:
        captured, written = self._captured(call, tokens)
        last = len(self.profile.saved) - 1 if self.profile.saved and stops_early(self.block) else None
        on_walk = _nothing if self.profile.inner_autograd else None
        values = {} if self.profile.inner_autograd else captured

        def again() -> None:
            mode = ReplayMode(values, written=written)
            run_again(self.forward, call, lambda *_: None, mode=mode, last=last, on_walk=on_walk)

        return again

    def _write(self, tokens: int) -> float:
        sizes = written_bytes(self.profile, tokens)
        return self.seconds(writing(sizes, self.device)) if sizes else 0.0

    def attention(self, lengths: Sequence[int]) -> Mapping[int, Attention]:
        """Seconds of the block's attention at each of ``lengths``.

        Empty where the last, at which the block will run, is no longer than the others, and where tokens are mixed by
        something else.
        """
        wanted = {(pin.op, pin.call) for pin in self.profile.pins if pin.kind == PinKind.MIXER}
        if not wanted or lengths[-1] <= max(lengths[:-1]) or not self.profile.arguments:
            return {}
        self.start.set()
        crop = self.crop(min(lengths[0], crop_tokens(self.device.type)))
        records = observe(self.forward, crop).by_key()
        mixers = [records[key] for key in wanted if key in records]
        spans = [index for index, leaf in self.call.tensors() if is_spans(leaf)]
        masked = len(spans) == 1 and all(map(is_under_spans, mixers))
        if len(mixers) < len(wanted) or not (masked or all(map(is_attention, mixers))):
            return {}
        try:
            if masked:
                return time_under_spans(mixers, lengths, lambda tokens: self.crop(tokens).leaves[spans[0]], self.beside)
            return time_attention(mixers, [*lengths[:-1], min(lengths[-1], LONGEST_ATTENTION)], self.beside)
        except RuntimeError as error:
            # No room for it beside the model, or an operator that does not run outside its block.
            logger.info("memo: '%s' is timed with its attention, at shorter lengths: %s", self.profile.name, error)
            return {}

    def _captured(self, call: BlockCall, tokens: int) -> tuple[Mapping[PinKey, Values], Collection[PinKey]]:
        """What pins hold at this length, and which are written to, from one run for all samples."""
        if tokens not in self.captured:
            args, kwargs = call.arguments()
            wanted = {(pin.op, pin.call) for pin in self.profile.pins}
            capture = CaptureMode(lambda key: None if key in wanted else ())
            self.start.set()
            # With grad: forwards may ask tensors for hooks, or autograd for gradients.
            with torch.enable_grad(), capture:
                self.forward(*args, **kwargs)
            self.captured = {tokens: (capture.captured, capture.written)}
        return self.captured[tokens]


class _Peak:
    """Device memory above where it started; 0 on CPU, which has no such counter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._reset()

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def take(self) -> int:
        """Peak above the base since the last call."""
        if self._device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        self._reset()
        return max(0, peak)


def _steady(a: _Sample, b: _Sample) -> bool:
    """Two samples of one length agree, or are so long that they need not."""
    pairs = [(a.forward, b.forward), (a.backward, b.backward), (a.rerun, b.rerun)]
    return b.forward + b.backward > _LONG_SECONDS or all(abs(x - y) <= _STEADY * max(x, y) for x, y in pairs)


def _median(timed: list[_Sample], samples: list[_Sample]) -> _Sample:
    """Seconds of the ``timed``; bytes of all ``samples``: each finds other holes in the allocator's memory."""
    return _Sample(
        samples[0].tokens,
        statistics.median(s.forward for s in timed),
        statistics.median(s.backward for s in timed),
        statistics.median(s.rerun for s in timed),
        statistics.median(s.write for s in timed),
        max(s.forward_peak for s in samples),
        max(s.backward_peak for s in samples),
        max(s.rerun_peak for s in samples),
        samples[0].output,
    )


def _results(output: object) -> list[torch.Tensor]:
    """Tensors of a result that have a gradient."""
    return [t for t in leaves_of(output) if isinstance(t, torch.Tensor) and t.requires_grad]


def _output_bytes(output: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _results(output))


def _saved(profile: BlockProfile, tokens: int) -> int:
    """Bytes that the block itself makes and saves: its input was there before."""
    stay = (Role.PARAMETER, Role.SHARED, Role.INPUT)
    return stored_bytes((group for group in profile.groups if group.saved and group.role not in stay), tokens)


def lengths_to_time(tokens: int, device_type: str) -> tuple[int, ...]:
    """Three lengths, the longest at most what is affordable before the first step.

    On a GPU what a short run makes is still in its cache, so a line through short runs is too flat for long ones: more
    than ``_LONGEST``, where the block runs at twice as many tokens or more.
    """
    longest = _LONGEST.get(device_type, 512)
    if device_type == "cuda":
        longest = max(longest, min(_LONGEST_QUARTER, tokens // 4), min(2 * longest, tokens // 2))
    longest = min(tokens, longest)
    return tuple(sorted({max(1, longest // 4), max(1, longest // 2), longest}))


def _seconds(
    medians: Sequence[_Sample], of: Callable[[_Sample], float], attention: Mapping[int, float], by_token: bool = False
) -> Growth:
    """Seconds by tokens; ``attention``: what of them is attention, at the medians' lengths and at a longer one.

    ``by_token``: it grows like the tokens, and not like their square.
    """
    points = [(sample.tokens, of(sample)) for sample in medians]
    rest = [(tokens, seconds - attention.get(tokens, 0.0)) for tokens, seconds in points]
    if not attention or min(seconds for _, seconds in rest) <= 0:
        return fit_seconds(points, curved=True)
    longest = max(attention)
    if by_token:
        line = fit_seconds(rest, curved=False)
        return replace(line, linear=line.linear + attention[longest] / longest)
    return replace(fit_seconds(rest, curved=False), quadratic=attention[longest] / longest**2)


def time_block(
    block: nn.Module,
    forward: Forward,
    call: BlockCall,
    profile: BlockProfile,
    *,
    start: Start,
    device: torch.device,
) -> BlockProfile:
    """``profile`` with seconds and transient peaks filled in, measured on a crop of ``call``.

    Every run begins at ``start``, whose setting up is not timed, and the state is that one afterwards. A block that
    cannot be cropped is timed at full length.
    """
    if not profile.tokens:
        return profile
    timer = _Timer(block, forward, call, profile, start, device)
    whole_only = not profile.sliceable and profile.reason.startswith("it does not run")
    lengths = (profile.tokens,) if whole_only else lengths_to_time(profile.tokens, device.type)
    with start.kept(), torch.enable_grad():
        try:
            timer.beside = timer.work(lengths[-1])
            medians = [timer.median(tokens) for tokens in lengths]
        except Exception as error:
            pass_on(error)
            if lengths == (profile.tokens,):
                raise
            # Weights of the size of the sequence, for one: it runs at its own length and at no other.
            timer.beside = timer.work(profile.tokens)
            medians = [timer.median(profile.tokens)]
        attention = timer.attention([*(sample.tokens for sample in medians), profile.tokens])
        timer.beside = None  # which holds the timer
    alone = {tokens: one.forward for tokens, one in attention.items()}
    alone_backward = {tokens: one.backward for tokens, one in attention.items()}
    by_token = any(one.by_token for one in attention.values())
    top = medians[-1]
    curved = any(group.size.quadratic for group in profile.groups)

    def peak(of: Callable[[_Sample], int], *, saved: bool = True) -> Growth:
        """Beyond what is saved for backward, if that is there."""
        points = [(s.tokens, of(s) - (_saved(profile, s.tokens) if saved else 0)) for s in medians]
        return fit_peak(points, curved=curved)

    return replace(
        profile,
        forward_seconds=_seconds(medians, lambda s: s.forward, alone, by_token),
        backward_seconds=_seconds(medians, lambda s: s.backward, alone_backward, by_token),
        rerun_seconds=fit_seconds([(s.tokens, s.rerun) for s in medians], curved=False),
        write_seconds=fit_seconds([(s.tokens, s.write) for s in medians], curved=False),
        forward_peak=peak(lambda s: s.forward_peak),
        backward_peak=peak(lambda s: s.backward_peak),
        rerun_peak=peak(lambda s: s.rerun_peak, saved=False),
        output=polynomial_bytes(top.output, top.tokens, 1),
        timed_tokens=top.tokens,
    )
