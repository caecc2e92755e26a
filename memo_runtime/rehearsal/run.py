"""``memo.rehearse``: a whole step at full length, in a fraction of its time.

Kernels that mix tokens take nearly all of a long step and have little to do with its memory. They are replaced
(``stand_ins.py``); all else is the step itself: products, norms, loss, copies to and from the host, rebuilding, the
allocator. The step runs twice. In the first happens what happens once: a wrapped model is profiled and planned with
the real kernels, programs are compiled, host memory is pinned, an optimizer makes its states. The second is measured.
Where a shorter batch can be made, the first of a wrapped model is on a few tiles, under the plan of the whole
(``first_step.py``).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memo_runtime.arguments import check_model, check_optimizer, check_shapes, check_weights, describe_batch
from memo_runtime.blocks.cache import refuse_caches
from memo_runtime.blocks.containers import leaves_of
from memo_runtime.config import Layout
from memo_runtime.errors import (
    ArgumentError,
    ArgumentTypeError,
    MemoError,
    PinningError,
    PlanInfeasibleError,
    RehearsalError,
)
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling.model import model_device
from memo_runtime.rehearsal.cpu_peak import cpu_peak, storage_bytes
from memo_runtime.rehearsal.failure import forget, innermost_module, ran_out
from memo_runtime.rehearsal.first_step import Shorter, check_short, few_tokens, under_plan
from memo_runtime.rehearsal.kept import Kept
from memo_runtime.rehearsal.positions import beyond_positions
from memo_runtime.rehearsal.record import Rehearsal, ReplacedKernel
from memo_runtime.rehearsal.stand_ins import StandIns
from memo_runtime.units import format_seconds
from memo_runtime.wrapping import Batch, Wrapped

logger = logging.getLogger("memo_runtime")

_POOL = ("allocated_bytes.current", "reserved_bytes.current")
_NONE_REPLACED = "no fused kernel of attention ran, so nothing was replaced: the step took what it takes"
_NO_HOOKS = (
    "hooks on parameters were left out: the peak has the gradients that an optimizer which steps in them would free"
)
_NOT_PLACED = "layout='planned' is not rehearsed: memory came from PyTorch's own allocator"
#: Where a step ended that was not begun: no plan fits, the system gives less host memory, or memory was short before.
NO_PLAN, NO_HOST, PROFILED = "none fits", "its host memory", "while it was profiled"
_NO_OPTIMIZER = "no optimizer= was given: what its step and its state take is not in the peak"


def _nothing() -> None:
    pass


@dataclass(slots=True)
class _Step:
    """The step that is rehearsed, and how far it is."""

    model: nn.Module
    batch: Batch
    loss: Callable[[Any], torch.Tensor] | None
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    phase: str = ""
    seconds: float = 0.0
    peaks: tuple[int, int] = (0, 0)
    behind_forward: Callable[[], None] = _nothing

    def run(self) -> None:
        """Forward, loss, backward and the optimizer's step."""
        began = time.perf_counter()
        args, kwargs = self.batch
        with torch.enable_grad():
            self._begin("forward")
            loss = self._loss_of(self.model(*args, **kwargs))
            self.behind_forward()
            self._begin("backward")
            loss.backward()
            del loss
        self._begin("optimizer")
        if self.optimizer is not None:
            self.optimizer.step()
        self._wait()
        self.seconds = time.perf_counter() - began
        logger.info("rehearsal: a step took %s", format_seconds(self.seconds))

    def _begin(self, phase: str) -> None:
        self.phase = phase
        logger.info("rehearsal: %s", phase)

    def measured(self, resident: int) -> None:
        """The step with its peaks; on the CPU it begins with ``resident`` bytes."""
        if self.device.type != "cuda":
            self.peaks = cpu_peak(self.run, resident), 0
            return
        try:
            self.run()
        finally:
            self.read_peaks()

    def let_go(self) -> None:
        """Hold no unused memory."""
        gc.collect()
        if self.device.type == "cuda":
            self._wait()
            torch.cuda.empty_cache()

    def reset_peaks(self) -> None:
        """Count from here, with no unused memory held."""
        self.let_go()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read_peaks(self) -> None:
        """What the allocator has counted since then."""
        if self.device.type == "cuda":
            self.peaks = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _loss_of(self, output: Any) -> torch.Tensor:
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if self.loss is not None:
            found = self._given_loss(output)
        elif isinstance(output, torch.Tensor) and output.dim() == 0:
            found = output
        if isinstance(found, torch.Tensor) and found.dim() == 0 and found.requires_grad:
            return found
        given = "loss= yields" if self.loss is not None else f"{type(self.model).__name__} yields"
        seen = output if found is None else found
        what = type(seen).__name__
        if isinstance(seen, torch.Tensor):
            what = f"a tensor of shape {list(seen.shape)}" + ("" if seen.requires_grad else " without a gradient")
        raise RehearsalError(
            f"a rehearsal needs the loss that training takes, and {given} no scalar with a gradient ({what}): give "
            "labels in the batch, or loss=, a function from the model's output to the loss"
        )

    def _given_loss(self, output: Any) -> Any:
        assert self.loss is not None, "it was given"
        try:
            return self.loss(output)
        except Exception as error:
            if isinstance(error, MemoError) or ran_out(error):
                raise
            raise RehearsalError(
                f"loss= raised {type(error).__name__}: {error}. It is called with what {type(self.model).__name__} "
                f"returns, {type(output).__name__} here, and gives the scalar that training goes backward from"
            ) from error


def rehearse(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    restore: bool = True,
    shorter: Shorter | None = None,
) -> Rehearsal:
    """Run a training step of ``model`` on ``batch`` without the work of attention: its memory, copies and peaks.

    Everything else is real. Kernels of attention are replaced by stand-ins that take the same memory, so a step that
    would take half an hour takes seconds, and its loss means nothing. Memory that is short is a result, not an error.
    Afterwards parameters, gradients, buffers, generators and the optimizer are as they were. On CUDA it starts
    PyTorch's peak statistics anew.

    Args:
        model: the model, wrapped or not; a wrapped one is profiled and planned as in its first step, with the real
            kernels. batch: keywords as a mapping, or positional arguments.
        loss: from the model's output to the loss; by default its ``loss``, or the output itself if it is a scalar.
        optimizer: takes a step too; by default the one given to ``wrap``. Gradients that exist are added to.
        restore: False: what the optimizer steps is not copied to host memory first, and stays changed; for processes
            that end behind the rehearsal.
        shorter: from a number of tokens to such a batch of as many: where a wrapped model has a long one, what happens
            once happens on a few tiles, so that one whole step is taken instead of two.

    Raises:
        ArgumentTypeError, NotBuiltError: see ``wrap``; ``loss`` or ``shorter`` is no function.
        ArgumentError: ``optimizer`` steps another model.
        RehearsalError: the model does not train on this batch, or yields no loss; or inference mode is on.
        MemoError: what ``wrap`` and the first step raise, infeasible plans aside.
    """
    from memo_runtime.api import as_batch

    check_model(model, "rehearse")
    check_optimizer(optimizer)
    _check_steps(optimizer, model)
    if loss is not None and not callable(loss):
        raise ArgumentTypeError(f"loss={loss!r} is no function from the model's output to the loss")
    if shorter is not None and not callable(shorter):
        raise ArgumentTypeError(f"shorter={shorter!r} is no function from a number of tokens to a batch")
    if torch.is_inference_mode_enabled():
        raise RehearsalError(
            "a rehearsal runs a training step, and torch.inference_mode is on, in which nothing has a gradient: make "
            "the batch and call memo.rehearse outside of it (torch.no_grad does not matter)"
        )
    check_shapes(model)
    check_weights(model)
    wrapped = find_wrapped(model)
    if optimizer is None and wrapped is not None:
        optimizer = wrapped.optimizer
    call, device = as_batch(batch), model_device(model)
    refuse_caches("memo.rehearse", call)
    inputs = [one for one in leaves_of(call) if isinstance(one, torch.Tensor)]
    kept = Kept(model, inputs, optimizer, device, restore=restore)
    step = _Step(model, call, loss, optimizer, device)
    with _none_of_training(wrapped), StandIns(device) as stand_ins:
        try:
            kept.leave_out_hooks()
            return _rehearsed(step, kept, stand_ins, wrapped, shorter)
        finally:
            kept.put_back()


def _check_steps(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """What steps nothing of the model would be missing from the peak without a word."""
    if optimizer is None:
        return
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ArgumentError(
            f"optimizer= steps no parameter of this {type(model).__name__}: give the one that was made of its "
            "model.parameters(), after everything that replaces them (PEFT, .to_empty(), fully_shard)"
        )


@contextlib.contextmanager
def _none_of_training(wrapped: Wrapped | None) -> Iterator[None]:
    """The steps of ``wrapped`` inside are not counted or recorded; a step under way is no place for them."""
    if wrapped is None:
        yield
        return
    with wrapped.session.turn():
        pass
    memory, wrapped.memory = wrapped.memory, None
    try:
        if memory is not None:
            memory.end()
        with wrapped.session.rehearsing():
            yield
    finally:
        wrapped.memory = memory


def _rehearsed(
    step: _Step, kept: Kept, stand_ins: StandIns, wrapped: Wrapped | None, shorter: Shorter | None
) -> Rehearsal:
    failed: BaseException | None = None
    where = ""
    step.reset_peaks()
    try:
        step.behind_forward = partial(_say_what_is_real, stand_ins)
        _first(step, wrapped, shorter)
        step.behind_forward = _nothing
        kept.start_again()
        stand_ins.clear()
        step.reset_peaks()
        step.measured(_resident(step))
    except Exception as error:
        step.read_peaks()
        where = _where(error, step, stand_ins)
        forget(error)
        if not ran_out(error):
            if isinstance(error, MemoError):
                raise
            beyond = beyond_positions(step.model, step.batch)
            raise RehearsalError(
                f"{type(step.model).__name__} does not train on this batch ({describe_batch(*step.batch)}): "
                f"{type(error).__name__}: {error}. Give the batch as the model takes it: keyword arguments as a dict, "
                "positional ones as a tuple" + (f". {beyond[0].upper()}{beyond[1:]}" if beyond else "")
            ) from error
        failed = error
        kept.start_again()
        step.let_go()
    record = _record(step, stand_ins, wrapped, failed, where)
    return replace(record, notes=(*record.notes, _NO_HOOKS)) if kept.has_leaf_hooks else record


def _first(step: _Step, wrapped: Wrapped | None, shorter: Shorter | None) -> None:
    """The step in which happens what happens once."""
    from memo_runtime.api import as_batch

    if wrapped is not None and shorter is not None:
        step.phase, whole = "plan", step.batch
        with torch.enable_grad():
            wrapped.before_forward(*whole)
        plan = wrapped.session.plan
        few = few_tokens(plan)
        if plan is not None and few is not None:
            logger.info("rehearsal: a step of %d tokens first, under the plan of the whole", few)
            step.batch = as_batch(shorter(few))
            check_short(step.batch, whole, few, plan.seq_len)
            with under_plan(wrapped):
                step.run()
            step.batch = whole
            return
    step.run()


def _say_what_is_real(stand_ins: StandIns) -> None:
    """In time: two steps of a model whose attention is not replaced may take hours."""
    if not stand_ins.calls:
        logger.warning("rehearsal: no fused kernel of attention ran in the forward, so that two whole steps are taken")


def _where(error: BaseException, step: _Step, stand_ins: StandIns) -> str:
    """The place at which ``error`` was raised."""
    forward, backward = (sum(getattr(one, way) for one in stand_ins.calls.values()) for way in ("forward", "backward"))
    if isinstance(error, PlanInfeasibleError):
        step.phase = "plan"
        return NO_HOST if isinstance(error, PinningError) else NO_PLAN
    if step.phase == "plan":
        return PROFILED
    if step.phase == "forward":
        name = innermost_module(error, step.model)
        return (f"in '{name}' " if name else "") + f"after {forward} attentions"
    if step.phase == "backward":
        return f"after {backward} of {forward} attentions"
    return "in the optimizer's step"


def _resident(step: _Step) -> int:
    """Bytes of the tensors that are there before a step."""
    state = step.optimizer.state.values() if step.optimizer is not None else ()
    held = [value for one in state for value in one.values() if isinstance(value, torch.Tensor)]
    parameters = list(step.model.parameters())
    grads = [one.grad for one in parameters if one.grad is not None]
    inputs = [one for one in leaves_of(step.batch) if isinstance(one, torch.Tensor)]
    return storage_bytes([*parameters, *step.model.buffers(), *grads, *held, *inputs])


def _record(
    step: _Step, stand_ins: StandIns, wrapped: Wrapped | None, failed: BaseException | None, where: str
) -> Rehearsal:
    totals = wrapped.session.report().totals if wrapped is not None else None
    plan = wrapped.session.plan if wrapped is not None else None
    replaced = tuple(
        ReplacedKernel(name=name, forward=one.forward, backward=one.backward, inside_bytes=one.inside_bytes)
        for name, one in sorted(stand_ins.calls.items())
    )
    notes = [] if step.optimizer is not None else [_NO_OPTIMIZER]
    if wrapped is not None and wrapped.layout is Layout.PLANNED:
        notes.append(_NOT_PLACED)
    if beyond := beyond_positions(step.model, step.batch):
        notes.append(beyond)
    if failed is None and not replaced:
        notes.append(_NONE_REPLACED)
    return Rehearsal(
        fits=failed is None,
        seconds=step.seconds if failed is None else 0.0,
        peak_bytes=step.peaks[0],
        reserved_bytes=step.peaks[1],
        host_bytes=totals.host_bytes if totals is not None else _pinned_bytes(step.device),
        bytes_to_host=totals.bytes_to_host if totals is not None else 0,
        bytes_to_device=totals.bytes_to_device if totals is not None else 0,
        replaced=replaced,
        forecast=plan.forecast if plan is not None else None,
        phase="" if failed is None else step.phase,
        where=where,
        error="" if failed is None else first_line_of(failed),
        notes=tuple(notes),
    )


def first_line_of(error: BaseException) -> str:
    """What ``error`` is, in a line."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]


def _pinned_bytes(device: torch.device) -> int:
    """Bytes that PyTorch's own pool has pinned."""
    if device.type != "cuda":
        return 0
    stats = torch.cuda.host_memory_stats()
    # Older versions call what the pool holds "reserved" and what is handed out "allocated".
    return max((int(stats[name]) for name in _POOL if name in stats), default=0)
