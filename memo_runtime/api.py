"""The front door: ``memo.wrap`` and what goes with it.

    import memo_runtime as memo
    memo.wrap(model, budget="70GiB")

Each function takes the model itself or a wrapper around it (DDP, PEFT, ``torch.compile``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from memo_runtime.allocator.library import planned_allocator
from memo_runtime.arguments import (
    check_budgets,
    check_model,
    check_optimizer,
    check_plan,
    check_profile,
    check_shapes,
    check_weights,
    describe_batch,
)
from memo_runtime.blocks.declared import declare_token_wise
from memo_runtime.blocks.given import given_blocks
from memo_runtime.blocks.members import modules_of
from memo_runtime.blocks.operators import register_mixer_operator
from memo_runtime.blocks.stack import BlockRef, check_keep_last, find_blocks
from memo_runtime.checking import CheckResult, check
from memo_runtime.config import Layout, Loss, OnRefusal, Settings, choose, make_settings
from memo_runtime.errors import (
    AlreadyWrappedError,
    ArgumentError,
    ArgumentTypeError,
    MemoError,
    NoBlocksError,
    NotBuiltError,
    NotWrappedError,
    PlanFileError,
    PlanMismatchError,
    ProfileError,
)
from memo_runtime.execution.guard import refuse_other_optimisers
from memo_runtime.lookup import all_wrapped, find_wrapped, policy_from_outside, refuse_part
from memo_runtime.output import file_path
from memo_runtime.persist import load_plan
from memo_runtime.planning.planner import make_plan
from memo_runtime.records import Plan, Profile
from memo_runtime.rehearsal.record import Rehearsal
from memo_runtime.rehearsal.run import rehearse
from memo_runtime.reports import Report
from memo_runtime.soundness import find_deviation, find_fault
from memo_runtime.units import parse_tokens, show_value
from memo_runtime.wrapping import Batch, Wrapped, make_wrapped

__all__ = [
    "CheckResult", "Rehearsal", "check", "plan", "profile", "register_mixer", "rehearse", "report", "token_wise",
    "unwrap", "wrap",
]  # fmt: skip

Model = TypeVar("Model", bound=nn.Module)
PlanLike = Plan | str | os.PathLike[str]


def _refs(model: nn.Module, blocks: Any) -> tuple[BlockRef, ...]:
    check_shapes(model)
    return find_blocks(model) if blocks is None else given_blocks(model, blocks)


def _load(plan: PlanLike | None) -> Plan | None:
    check_plan(plan)
    if plan is None:
        return None
    given = plan if isinstance(plan, Plan) else load_plan(Path(plan))
    fault = find_fault(given) or find_deviation(given)
    if fault is None:
        return given
    said = f"field '{fault.where}' is {show_value(fault.value)}; expected {fault.expected}"
    if isinstance(plan, Plan):
        raise ArgumentError(f"plan= cannot be carried out: {said}; make it with memo.plan(profile, ...)")
    raise PlanFileError(f"{plan}: {said}; plan again, or give the file as memo wrote it")


def _not_built(name: str, value: object, instead: str) -> NotBuiltError:
    return NotBuiltError(f"{name}={show_value(value)} is not built yet: {instead}, so leave {name}= out")


def wrap(
    model: Model,
    *,
    plan: PlanLike | None = None,
    policy: str = "auto",
    alpha: float | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    disk: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    blocks: Any = None,
    keep_last: int | None = None,
    tile: int | None = None,
    layout: str | os.PathLike[str] = "auto",
    loss: str = "auto",
    strict: bool = False,
    on_refusal: str = "stop",
) -> Model:
    """Manage the activations of ``model``'s repeated blocks, in place, and return ``model``.

    The first training forward profiles the blocks and plans for its shapes; later shapes reuse the profile. Parameter
    names, ``state_dict``, the optimizer, evaluation under ``no_grad`` and ``generate`` stay as they are; copies and
    pickles of the model are unwrapped.

    Args:
        model: any ``nn.Module`` with a stack of repeated blocks.
        plan: a plan, or a file that holds one; then nothing is profiled or planned.
        policy: ``auto``, ``none``, ``memo``, ``swap``, ``recompute``, ``replay`` or ``tiled``.
        alpha: share of tokens whose activations are swapped, for ``memo`` and ``replay``; the rest is recomputed. For
            ``tiled``: share of tiles whose matrix products stay on the device.
        budget: bound on ``torch.cuda.max_memory_allocated``, bytes or text such as ``"70GiB"``.
        host_budget: bound on host (pinned) bytes.
        disk: not built yet.
        optimizer: whose state the plan reserves for; without it AdamW in the parameters' dtype.
        blocks: the blocks, if they should not be searched: modules, a ``ModuleList``, or names.
        keep_last: blocks at the end of each stack that stay on the device.
        tile: tokens of a tile, for ``tiled``.
        layout: ``planned``: memory of steps by plan, in an arena (docs/allocator.md). A file (``.json``, ``.json.gz``):
            the same, and it keeps the plans for the next run. ``native``, and ``auto``: PyTorch's allocator.
        loss: ``auto`` and ``tiled`` evaluate head and loss of Hugging Face causal LMs by tiles; ``native`` does not.
        strict: a block that cannot take the policy is an error before the first step, and one whose rerun is found
            wrong in a step stays one (otherwise the next step runs it in a safer way).
        on_refusal: what happens when the system gives less host memory than the plan needs, though ``host_budget``
            allows it: ``stop`` before the step, or ``go_on`` with a plan for what there is, said in the report.

    Raises:
        ArgumentError, ArgumentTypeError: an argument that is not taken, or arguments that do not go together.
        NotBuiltError: what is announced and not built, and models on the meta device.
        NoBlocksError, BlockListError: no blocks, or none that can be used.
        AlreadyWrappedError: wrapped already, with something else.
        AllocatorUnavailableError: ``layout='planned'`` without the planned allocator; says how to build it.
        OffloaderActiveError: gradient checkpointing or another offloader is on.
        PlanFileError, PlanMismatchError: the plan file cannot be read or true, or plans blocks that the model lacks.
    """
    check_model(model, "wrap")
    check_optimizer(optimizer)
    if disk is not None:
        raise _not_built("disk", disk, "activations go to the device, the host, or are recomputed")
    where, kept = _layout(layout)
    loss_kind = choose(Loss, "loss", loss)
    refusal = choose(OnRefusal, "on_refusal", on_refusal)
    settings = make_settings(
        policy=policy, alpha=alpha, budget=budget, host_budget=host_budget, keep_last=keep_last, strict=strict,
        tile=tile,
    )  # fmt: skip
    given = _given_plan(plan, settings, refusal)
    refs = _refs(model, blocks) if given is None else _planned_refs(model, given, blocks)
    check_keep_last(refs, settings.keep_last)
    wrapped = make_wrapped(
        model, refs, settings, loss=loss_kind, optimizer=optimizer, plan=given, on_refusal=refusal, layout=where
    )
    _keep_steps(wrapped, kept)
    if _is_wrapped_so(model, wrapped):
        return model
    refuse_other_optimisers(modules_of(model), {id(ref.module) for ref in refs})
    check_weights(model)
    if where is Layout.PLANNED:
        planned_allocator().install()
    wrapped.install()
    return model


def _layout(layout: str | os.PathLike[str]) -> tuple[Layout, Path | None]:
    """What ``layout`` says, and the file that keeps its plans."""
    if isinstance(layout, os.PathLike) or (isinstance(layout, str) and layout.endswith((".json", ".json.gz"))):
        return Layout.PLANNED, file_path(layout)
    return choose(Layout, "layout", layout), None


def _keep_steps(wrapped: Wrapped, path: Path | None) -> None:
    if path is not None and wrapped.memory is not None:
        wrapped.memory.keep_in(path)


def _is_wrapped_so(model: nn.Module, wanted: Wrapped) -> bool:
    """Whether ``model`` is wrapped already, exactly as ``wanted``."""
    inside = all_wrapped(model)
    if inside:
        existing = next(iter(inside.values()))
        if existing.model is model and existing.same_as(wanted):
            return True
        others = f" (and so are {len(inside) - 1} more models inside it)" if len(inside) > 1 else ""
        raise AlreadyWrappedError(
            f"{type(existing.model).__name__} is wrapped already with {existing}{others}; asked for "
            f"{type(model).__name__}: {wanted}; call memo.unwrap(model) first"
        )
    outer = policy_from_outside(model)
    if outer is not None:
        raise AlreadyWrappedError(
            f"{type(model).__name__} is part of a model that is wrapped already with policy '{outer}'; "
            "call memo.unwrap on that model first"
        )
    return False


def _given_plan(plan: PlanLike | None, settings: Settings, refusal: OnRefusal) -> Plan | None:
    given = _load(plan)
    if given is None:
        check_budgets(settings)
    if given is not None and settings != make_settings():
        raise ArgumentError(
            "a plan fixes policy, alpha, budgets, keep_last, tile and strict: give the plan or those, not both"
        )
    if given is not None and refusal is OnRefusal.GO_ON:
        raise ArgumentError(
            "on_refusal='go_on' plans anew for the host memory that there is, and a plan is carried out as it is: "
            "leave one of them out"
        )
    return given


def _planned_refs(model: nn.Module, plan: Plan, blocks: Any) -> tuple[BlockRef, ...]:
    modules = dict(model.named_modules())
    missing = [block.name for block in plan.profile.blocks if block.name not in modules]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PlanMismatchError(
            f"the plan is for another model: it plans block '{missing[0]}'{more} that "
            f"{type(model).__name__} does not have\n  blocks: the plan has {len(plan.profile.blocks)}, "
            f"{type(model).__name__} has {_count_blocks(model)}\n  would work: profile and plan again with this model "
            "(leave plan= out)"
        )
    planned = [block.name for block in plan.profile.blocks]
    named = planned if blocks is None else [ref.name for ref in given_blocks(model, blocks)]
    if sorted(named) != sorted(planned):
        raise PlanMismatchError(
            f"the plan is for {len(planned)} blocks ({planned[0]} to {planned[-1]}) and blocks= names {len(named)} "
            f"({', '.join(named[:3])}{', ...' if named[3:] else ''}): leave blocks= out, or plan for those"
        )
    return tuple(
        BlockRef(name=block.name, stack=block.stack, module=modules[block.name]) for block in plan.profile.blocks
    )


def _count_blocks(model: nn.Module) -> str:
    try:
        refs = find_blocks(model)
    except NoBlocksError:
        return "none that repeat"
    return f"{len(refs)} ({refs[0].name} to {refs[-1].name})"


def unwrap(model: Model) -> Model:
    """Undo ``wrap``, of ``model`` or of all models inside it, and return ``model``; an unwrapped one as it is.

    Raises:
        NotWrappedError: it is a part of what was wrapped.
    """
    check_model(model, "unwrap")
    found = all_wrapped(model)
    if not found:
        refuse_part(model, "unwrap")
    for wrapped in found.values():
        wrapped.remove()
    return model


def _other(given: Sequence[BlockRef], refs: Sequence[BlockRef]) -> bool:
    """Whether ``given`` are other blocks than ``refs``, in whatever order they are named."""
    return {(ref.name, ref.stack) for ref in given} != {(ref.name, ref.stack) for ref in refs}


def as_batch(batch: Any) -> Batch:
    """(args, kwargs) of a model call: a mapping is keywords, a tuple or list arguments, anything else one argument."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def profile(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    blocks: Any = None,
    tiles: bool = False,
) -> Profile:
    """Measure ``model`` on ``batch`` (keywords as a mapping, or positional arguments) without training.

    ``tiles``: also capture the blocks and find out what they take by tiles, so that policy ``tiled`` can be planned.

    Raises:
        ArgumentTypeError, NotBuiltError, NoBlocksError, BlockListError: see ``wrap``.
        AlreadyWrappedError: the model is wrapped with other blocks.
        ProfileError: the model does not run on this batch, or calls none of its blocks; the model is as before.
    """
    check_model(model, "profile")
    check_optimizer(optimizer)
    existing = find_wrapped(model)
    if existing is not None:
        if blocks is not None and _other(given := given_blocks(existing.model, blocks), existing.refs):
            raise AlreadyWrappedError(
                f"{type(existing.model).__name__} is wrapped with {existing}, and blocks= names {len(given)} "
                f"({given[0].name}, ...): leave blocks= out, or call memo.unwrap(model) first"
            )
        return _measure(existing, as_batch(batch), optimizer, tiles)
    wrapped = make_wrapped(model, _refs(model, blocks), make_settings())
    refuse_other_optimisers(modules_of(model), {id(ref.module) for ref in wrapped.refs})
    check_weights(model)
    wrapped.install()
    try:
        return _measure(wrapped, as_batch(batch), optimizer, tiles)
    finally:
        wrapped.remove()


def _measure(wrapped: Wrapped, batch: Batch, optimizer: torch.optim.Optimizer | None, tiles: bool) -> Profile:
    before = wrapped.optimizer
    wrapped.optimizer = before if optimizer is None else optimizer
    try:
        return wrapped.profile(batch, tiles=tiles)
    except (MemoError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ProfileError(
            f"{type(wrapped.model).__name__} does not run on this batch ({describe_batch(*batch)}): "
            f"{type(error).__name__}: {error}. Give the batch as the model takes it: keyword arguments as a dict, "
            "positional ones as a tuple"
        ) from error
    finally:
        wrapped.optimizer = before


def plan(
    profile: Profile,
    *,
    policy: str = "auto",
    alpha: float | None = None,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    keep_last: int | None = None,
    strict: bool = False,
    tile: int | None = None,
    seq_len: int | str | None = None,
) -> Plan:
    """Decide what happens to each byte of a step of the profiled model; ``print`` it for a table.

    Args:
        profile: from ``memo.profile``. seq_len: another length than the profiled one, such as ``"128K"``; of the
            longest sequence where they differ (encoder and decoder), and the others are scaled as it is.
        policy, alpha, budget, host_budget, keep_last, strict, tile: as in ``wrap``.

    Raises:
        PlanInfeasibleError, HostLimitError: no plan fits; says what would.
        BlockFallbackError: ``strict`` and a block cannot take the policy.
        PlanRequestError: what does not go with this profile.
        ArgumentError, ArgumentTypeError, NotBuiltError: see ``wrap``.
    """
    check_profile(profile)
    settings = make_settings(
        policy=policy, alpha=alpha, budget=budget, host_budget=host_budget, keep_last=keep_last, strict=strict,
        tile=tile,
    )  # fmt: skip
    try:
        longest = None if seq_len is None else parse_tokens(seq_len)
    except ValueError as error:
        raise ArgumentError(f"seq_len={error}") from None
    return make_plan(profile, settings, longest=longest)


def report(model: nn.Module) -> Report:
    """What the last step of a wrapped ``model`` did.

    Raises:
        NotWrappedError: the model is not wrapped, or is a part of what was.
    """
    check_model(model, "report")
    wrapped = find_wrapped(model)
    if wrapped is None:
        refuse_part(model, "report")
        raise NotWrappedError(f"{type(model).__name__} is not wrapped: call memo.wrap(model) before the first step")
    if wrapped.memory is None:
        return wrapped.session.report()
    return replace(wrapped.session.report(), arena=wrapped.memory.report())


def register_mixer(operator: str) -> None:
    """Declare that ``operator`` (``"namespace::name"``) mixes tokens: its result is saved, never recomputed.

    Under replay, operators that mix tokens are found by comparing runs; this is for those whose effect may be too small
    to see, such as a custom scan that starts as the identity. By tiles it is what makes an operator a mixer, whose
    forward is run once at full length and whose backward is that of its autograd formula.

    Raises:
        ArgumentError, ArgumentTypeError: no name of an operator that is loaded.
    """
    if not isinstance(operator, str):
        raise ArgumentTypeError(
            f"memo.register_mixer takes the name of an operator, such as 'mylib::scan', and got {show_value(operator)}"
        )
    namespace, found, name = operator.replace("::", ".").partition(".")
    if not found or not name:
        raise ArgumentError(f"{operator!r} is not a qualified operator name such as 'mylib::scan'")
    if not hasattr(getattr(torch.ops, namespace), name.partition(".")[0]):
        raise ArgumentError(f"there is no operator {operator!r} in torch.ops: import the library that defines it first")
    register_mixer_operator(operator)


def token_wise(module: Model) -> Model:
    """Declare that ``module``, a part of a block or a whole one, treats tokens one by one, and return it.

    For what cannot be captured as a graph: routing to experts, kernels of one's own. ``policy="tiled"`` then runs it on
    each tile by its own forward and backward. It is tested on random numbers before it is used; one that mixes tokens
    is refused, and its block runs in another way with the reason in the report. Copies of the module are declared too.

    Raises:
        ArgumentTypeError: no module.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(
            f"memo.token_wise takes a module, such as model.layers[0].mlp, and got {show_value(module)}; declare each "
            "module of a stack: for layer in model.layers: memo.token_wise(layer.mlp)"
        )
    declare_token_wise(module)
    return module
