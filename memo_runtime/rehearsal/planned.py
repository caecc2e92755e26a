"""Whether a step of a wrapped model has a plan: what a rehearsal would end with before it begins, in seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memo_runtime.config import OnRefusal
from memo_runtime.errors import PlanInfeasibleError
from memo_runtime.lookup import find_wrapped
from memo_runtime.rehearsal.failure import forget, ran_out
from memo_runtime.rehearsal.record import Rehearsal
from memo_runtime.rehearsal.run import NO_HOST, NO_PLAN, PROFILED, first_line_of
from memo_runtime.units import format_bytes


def without_plan(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rehearsal | None:
    """How a step of ``model`` ends for want of a plan, or of memory while one is made; None: it has one, or needs none.

    Nothing is reserved for it, but what the system leaves of host memory is asked. The model is profiled in the first
    call, and plans for other lengths are made from that.

    Raises:
        MemoError: what ``wrap`` and the first step raise, infeasible plans aside.
    """
    wrapped = find_wrapped(model)
    if wrapped is None or wrapped.session.idle:
        return None
    try:
        with torch.enable_grad():
            host_bytes = wrapped.plan_for(args, kwargs).forecast.host_bytes
    except Exception as error:
        where = NO_PLAN if isinstance(error, PlanInfeasibleError) else PROFILED
        forget(error)
        if not ran_out(error):
            raise
        return Rehearsal.short(phase="plan", where=where, error=first_line_of(error))
    # Where a run goes on with what there is, the system is asked when it does.
    why = wrapped.session.tools.pool.refusal(host_bytes) if wrapped.on_refusal is OnRefusal.STOP else ""
    if why:
        error_text = f"{format_bytes(host_bytes)} of host memory cannot be had: {why}"
        return Rehearsal.short(phase="plan", where=NO_HOST, error=error_text)
    return None
