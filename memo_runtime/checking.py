"""``memo.check``: exactness on the user's own model and batch.

Pure swap must give bit-identical losses and gradients. Recompute changes the shapes of sums: in float64 the relative
error of every gradient is at most 1e-12, in float32 at most 1e-5. In half precision rounding dominates, so both the
wrapped and the unwrapped model are measured against a float64 reference and the wrapped one's error may be at most
1.1 times the unwrapped one's over all gradients together, and 1.5 times for any single parameter.

Tiles sum in another order. Where their blocks compute in a narrower dtype than gradients have (norms in float32, all
under autocast) and miss the bound, they are held to that of the narrower one.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memo_runtime.arguments import check_budgets, check_model, check_shapes, check_weights, describe_batch
from memo_runtime.blocks.ambient import RandomState
from memo_runtime.blocks.cache import refuse_caches
from memo_runtime.blocks.containers import leaves_of, mapped
from memo_runtime.blocks.given import given_blocks
from memo_runtime.blocks.stack import BlockRef, check_keep_last, find_blocks
from memo_runtime.blocks.state import LibraryRandom, shared_generators
from memo_runtime.config import Loss, Settings, make_settings
from memo_runtime.errors import MemoError, ProfileError
from memo_runtime.lookup import find_wrapped
from memo_runtime.profiling.model import model_device
from memo_runtime.records import Executor
from memo_runtime.reports import Report
from memo_runtime.units import format_bytes, format_flops
from memo_runtime.wrapping import Batch, Wrapped, make_wrapped

#: Relative L2 error allowed for the gradients of a wrapped model against the unwrapped one, by dtype.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
_OVERALL_RATIO = 1.1
_SINGLE_RATIO = 1.5
_HALF_SEEDS = 5
#: Longest sequence for which the reference is float64 rather than float32.
_DOUBLE_TOKENS = 4096

_EVALUATED = "its blocks in evaluation mode: by tiles they draw dropout under masks of their own"
_ALWAYS_DRAWS = (
    "blocks that run by tiles draw dropout in evaluation mode too, under masks of their own, so a step says nothing "
    "about one of the unwrapped model. Would work: a model whose dropout is off, or policy='replay'"
)
_NARROWER = "with the bound of {dtype}, in which blocks that run by tiles compute"

_WOULD_WORK = (
    "so there is nothing to compare. Would work: a batch with labels that count (two tokens at least for a language "
    "model), and weights at which the loss is finite"
)
_NO_NUMBER = "the loss of the unwrapped model is {loss:g}, " + _WOULD_WORK
_NO_NUMBERS = "the gradient of '{name}' in the unwrapped model has elements that are not finite, " + _WOULD_WORK
_NO_GRADIENT = "all gradients of the unwrapped model are zero, " + _WOULD_WORK

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """Outcome of ``memo.check``. ``print(result)`` says it in words.

    Attributes:
        ok: loss and gradients are within the bounds, and the same parameters have one.
        bit_identical: loss and all gradients are equal bit for bit.
        loss_difference: relative difference of the losses.
        gradient_error: relative L2 difference of all gradients together; bound: what it may be.
        worst_parameter, worst_error: the parameter with the largest relative difference.
        remarks: what was compared in another way than the batch and the dtype say, and why.
        report: what the wrapped model did in the checked step.
    """

    ok: bool
    bit_identical: bool
    loss_difference: float
    gradient_error: float
    bound: float
    worst_parameter: str
    worst_error: float
    report: Report
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        # In half precision rounding dominates: there the error is a ratio, to that of the unwrapped model.
        ratio = self.bound >= 1
        error = f"{self.gradient_error:.3f}" if ratio else f"{self.gradient_error:.3e}"
        meaning = "times the unwrapped model's, against float64" if ratio else "relative L2 over all gradients"
        verdict = "bit for bit" if self.bit_identical else f"within {self.bound:g}"
        lines = [
            f"check: exact, {verdict}" if self.ok else f"check: NOT exact, the bound is {self.bound:g}",
            self._exercised(),
            *self.remarks,
            "",
            f"loss difference  {self.loss_difference:.3e}",
            f"gradient error   {error}  ({meaning})",
            f"worst parameter  {self.worst_error:.3e}  {self.worst_parameter}",
            "",
            str(self.report),
        ]
        return "\n".join(lines)

    def _exercised(self) -> str:
        """What of the runtime the checked step went through."""
        moved, again = self.report.totals.bytes_to_host, self.report.totals.recomputed_flops
        if not moved and not again:
            return "exercised: nothing was moved to the host or run again; policy memo does both"
        said = f"exercised: {format_bytes(moved)} to the host and back, {format_flops(again)} computed again"
        if not again:
            return f"{said}; policy memo runs blocks again too"
        return said if moved else f"{said}; policy memo moves bytes too"


@dataclass(frozen=True, slots=True)
class _Start:
    """States of the generators of PyTorch, Python and NumPy, from which every step that is compared starts."""

    of_torch: RandomState
    of_others: LibraryRandom

    @classmethod
    def current(cls, device: torch.device) -> _Start:
        """The states at this point."""
        return cls(RandomState.current(device), LibraryRandom.current(shared_generators()))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Run from these states, then put back those from before."""
        with self.of_torch.restored(), self.of_others.restored():
            yield


def _scalar(output: Any) -> torch.Tensor:
    """The loss of a model's output: its ``loss``, a scalar tensor, else the mean square of all float outputs."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    if isinstance(output, torch.Tensor) and output.dim() == 0:
        return output
    leaves = [t for t in leaves_of(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not leaves:
        raise ProfileError("the model's output has no loss and no tensor with a gradient to check")
    wide = [leaf if leaf.dtype == torch.float64 else leaf.float() for leaf in leaves]
    return sum((leaf.square().mean().to(wide[0].device) for leaf in wide[1:]), start=wide[0].square().mean())


def _run(model: nn.Module, batch: Batch, start: _Start) -> tuple[float, Gradients]:
    args, kwargs = batch
    model.zero_grad(set_to_none=True)
    with start.restored(), torch.enable_grad():
        loss = _scalar(model(*args, **kwargs))
        loss.backward()
    return float(loss.detach()), {
        name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def _run_plain(model: nn.Module, batch: Batch, start: _Start) -> tuple[float, Gradients]:
    """The unwrapped model's step; what fails here is the model, the batch or both."""
    try:
        return _run(model, batch, start)
    except (MemoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ProfileError(
            f"{type(model).__name__} does not train on this batch, without memo too ({describe_batch(*batch)}): "
            f"{type(error).__name__}: {error}. Give the batch as the model takes it: keyword arguments as a dict, "
            "positional ones as a tuple"
        ) from error


def _saved_dtypes(model: nn.Module, blocks: Sequence[str], batch: Batch, start: _Start) -> set[torch.dtype]:
    """In which dtypes ``blocks`` keep something for their backward."""
    seen: set[torch.dtype] = set()
    open_hooks: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen.add(tensor.dtype)
        return tensor

    def enter(*_: Any) -> None:
        open_hooks.append(saved_tensors_hooks(pack, lambda tensor: tensor))
        open_hooks[-1].__enter__()

    modules = [model.get_submodule(name) for name in blocks]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(lambda *_: open_hooks.pop().__exit__()) for module in modules]
    try:
        _run(model, batch, start)
    finally:
        while open_hooks:  # a forward that was interrupted
            open_hooks.pop().__exit__()
        for handle in handles:
            handle.remove()
    return seen


def _copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` to train.

    Tensors that were computed from parameters and are kept in a module (``weight`` under the old ``weight_norm`` and
    ``spectral_norm``, until their hook computes it again) cannot be copied with their graph and come without it.
    """
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, dict[int, Any](computed))
    except Exception as error:
        raise ProfileError(
            f"memo.check compares copies of the model, and {type(model).__name__} cannot be copied "
            f"({type(error).__name__}: {error}): take out what holds it (a lock, a file, a tensor with a graph), or "
            "wrap a second model made the same way and compare the two"
        ) from error


def _norm(gradients: Mapping[str, torch.Tensor]) -> float:
    return float(sum(torch.linalg.vector_norm(g.double()).item() ** 2 for g in gradients.values()) ** 0.5)


def _size_of(loss: float, model: nn.Module, gradients: Gradients) -> float:
    """What a difference of losses is a part of: ``loss``, and of one that cancels (a mean of signs) what goes into it.

    To first order that is at most the product of the norms of parameters and gradients, and 1 at most is taken of it.
    """
    parameters = _norm({name: one.detach() for name, one in model.named_parameters() if name in gradients})
    return max(abs(loss), min(1.0, parameters * _norm(gradients)))


def _errors(found: Gradients, reference: Gradients) -> tuple[float, dict[str, float]]:
    """(relative L2 error over all parameters, the same for each)."""
    tiny = 1e-300
    # A gradient that was not found is off by all of it.
    gaps = {
        name: found[name].double() - want.double() if name in found else want.double()
        for name, want in reference.items()
    }
    single = {
        name: torch.linalg.vector_norm(gap).item()
        / max(torch.linalg.vector_norm(reference[name].double()).item(), tiny)
        for name, gap in gaps.items()
    }
    return _norm(gaps) / max(_norm(reference), tiny), single


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return mapped(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, tree
    )


def check(
    model: nn.Module,
    batch: Any,
    *,
    policy: str | None = None,
    alpha: float | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    keep_last: int | None = 0,
    tile: int | None = None,
    blocks: Any = None,
) -> CheckResult:
    """Compare a step of ``model`` wrapped with the same step unwrapped, on copies; ``model`` is left as it is.

    Args:
        model: the model, wrapped or not. batch: keywords as a mapping, or positional arguments; an output without a
            ``loss`` is turned into one.
        policy: as in ``wrap``; by default ``memo`` with half of the tokens swapped, so that both a swap and a rerun
            are tested.
        alpha, budget, host_budget, keep_last, tile, blocks: as in ``wrap``; ``keep_last`` is 0 so that every block is
            tested.

    Raises:
        ProfileError: the unwrapped model does not run on this batch, gives no loss or one that is no number, has no
            gradient but zeros, or cannot be copied.
        MemoError: as ``wrap`` and the first step do.
    """
    from memo_runtime.api import as_batch

    check_model(model, "check")
    if policy is None:
        policy, alpha = "memo", 0.5 if alpha is None else alpha
    settings = make_settings(
        policy=policy, alpha=alpha, budget=budget, host_budget=host_budget, keep_last=keep_last, tile=tile
    )
    check_budgets(settings)
    existing = find_wrapped(model)
    own = existing.model if existing is not None else model
    check_shapes(own)
    refs = _refs(own, blocks, existing)
    check_keep_last(refs, keep_last)
    check_weights(own)
    call = as_batch(batch)
    refuse_caches("memo.check", call)
    try:
        return _compared(own, call, refs, settings)
    except _DrawsMasksError:
        pass
    still = _copy(own)
    for ref in refs:
        still.get_submodule(ref.name).eval()
    try:
        found = _compared(still, call, refs, settings)
    except _DrawsMasksError:
        raise ProfileError(_ALWAYS_DRAWS) from None
    return replace(found, remarks=(_EVALUATED, *found.remarks))


class _DrawsMasksError(Exception):
    """Tiles have drawn masks that the unwrapped model does not have."""


def _compared(own: nn.Module, batch: Batch, refs: Sequence[BlockRef], settings: Settings) -> CheckResult:
    plain, managed = _copy(own), _copy(own)
    start = _Start.current(model_device(plain))
    loss, plain_gradients = _run_plain(plain, batch, start)
    if not math.isfinite(loss):
        raise ProfileError(_NO_NUMBER.format(loss=loss))
    length = _norm(plain_gradients)
    if not math.isfinite(length):
        wrong = next(name for name, one in plain_gradients.items() if not one.isfinite().all())
        raise ProfileError(_NO_NUMBERS.format(name=wrong))
    if not length:
        raise ProfileError(_NO_GRADIENT)
    copied = [replace(ref, module=managed.get_submodule(ref.name)) for ref in refs]
    wrapped = make_wrapped(managed, copied, settings, loss=Loss.AUTO)
    wrapped.install()
    remarks: tuple[str, ...] = ()
    try:
        managed_loss, gradients = _run(managed, batch, start)
        report = wrapped.session.report()
        if wrapped.session.draws_masks:
            raise _DrawsMasksError
        dtype = next((g.dtype for g in plain_gradients.values()), torch.float32)
        identical = loss == managed_loss and all(
            n in gradients and torch.equal(gradients[n], g) for n, g in plain_gradients.items()
        )
        overall, single = _errors(gradients, plain_gradients)
        worst = max(single, key=lambda name: single[name]) if single else ""
        bound = BOUNDS.get(dtype)
        if bound is not None and not overall <= bound:
            tiled = [block.name for block in report.blocks if block.executor == Executor.TILED]
            narrowest = _narrowest(dtype, _saved_dtypes(plain, tiled, batch, start) if tiled else set())
            if narrowest != dtype:
                bound, remarks = BOUNDS.get(narrowest), (_NARROWER.format(dtype=str(narrowest).removeprefix("torch.")),)
        if bound is not None:
            size = _size_of(loss, plain, plain_gradients)
            ok = overall <= bound and abs(managed_loss - loss) <= bound * size
        else:
            overall, ok = _half_precision(plain, managed, batch, start)
            bound = _OVERALL_RATIO
        ok = ok and gradients.keys() == plain_gradients.keys()
    finally:
        wrapped.remove()
    return CheckResult(
        ok=ok,
        bit_identical=identical,
        loss_difference=abs(loss - managed_loss) / max(abs(loss), 1e-300),
        gradient_error=overall,
        bound=bound,
        worst_parameter=worst,
        worst_error=single.get(worst, 0.0),
        report=report,
        remarks=remarks,
    )


def _narrowest(dtype: torch.dtype, others: set[torch.dtype]) -> torch.dtype:
    """The floating-point dtype of these that rounds most."""
    floats = [dtype, *(one for one in others if one.is_floating_point)]
    return max(floats, key=lambda one: torch.finfo(one).eps)


def _refs(model: nn.Module, blocks: Any, existing: Wrapped | None) -> Sequence[BlockRef]:
    """The blocks to check: those given, those that are managed already, or those that are found."""
    if blocks is not None:
        return given_blocks(model, blocks)
    return find_blocks(model) if existing is None else existing.refs


def _half_precision(plain: nn.Module, managed: nn.Module, batch: Batch, start: _Start) -> tuple[float, bool]:
    """(ratio of the wrapped model's error to the unwrapped one's, within bounds), median of five perturbed weights."""
    longest = max((max(t.shape) for t in leaves_of(batch) if isinstance(t, torch.Tensor)), default=0)
    wide = torch.float64 if longest <= _DOUBLE_TOKENS else torch.float32
    rounding = max((torch.finfo(one.dtype).eps for one in plain.parameters() if one.is_floating_point()), default=0.0)
    overall, singles, near = [], [], []
    for seed in range(_HALF_SEEDS):
        _perturb(plain, managed, seed)
        reference = copy.deepcopy(plain).to(wide)
        exact_loss, exact = _run(reference, _cast(batch, wide), start)
        plain_loss, gradients = _run(plain, batch, start)
        error, single = _errors(gradients, exact)
        loss, gradients = _run(managed, batch, start)
        managed_error, managed_single = _errors(gradients, exact)
        # As far from the exact loss as the unwrapped one, and a rounding of the result.
        size = _size_of(exact_loss, reference, exact)
        near.append(abs(loss - exact_loss) <= _SINGLE_RATIO * abs(plain_loss - exact_loss) + rounding * size)
        overall.append(managed_error / max(error, 1e-300))
        singles.append({name: managed_single[name] / max(single[name], 1e-300) for name in single if single[name] > 0})
    ratio = statistics.median(overall)
    names = set.intersection(*(set(s) for s in singles)) if singles else set()
    worst = max((statistics.median(s[name] for s in singles) for name in names), default=0.0)
    return ratio, ratio <= _OVERALL_RATIO and worst <= _SINGLE_RATIO and statistics.median(near) >= 1


def _perturb(plain: nn.Module, managed: nn.Module, seed: int) -> None:
    """Give both models the same slightly changed weights: another draw of the rounding errors."""
    if seed == 0:
        return
    with torch.no_grad():
        for p, q in zip(plain.parameters(), managed.parameters(), strict=True):
            generator = torch.Generator(device=p.device).manual_seed(seed)
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
            p.mul_(1 + 1e-2 * noise.to(p.dtype))
            q.copy_(p)
