"""memo_runtime by policy. Each length is wrapped, profiled and planned for itself: budgets differ by length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import memo_runtime
from benchmarks.harness.contenders.base import Training
from benchmarks.harness.geometry import Scope
from benchmarks.harness.job import Job
from benchmarks.harness.subject import OnGradients, attention_kernel
from memo_runtime.lookup import find_wrapped
from memo_runtime.persist import save
from memo_runtime.rehearsal.first_step import few_tokens, under_plan

#: Seconds of a step beyond which the one before it is on a few tiles alone: a rehearsal makes all products again.
_LONG = 120.0


class Memo(Training):
    """``memo.wrap`` with one policy, and the budgets of the job."""

    def __init__(self, policy: str, alpha: float | None, job: Job) -> None:
        self.policy, self.alpha = policy, alpha
        self._kept: Path | None = None  # where the plan of this length is, or will be
        self._few: int | None = None  # tokens of the step before the measured one, if it was a short one
        super().__init__(job)

    def install(self) -> None:
        """Nothing yet: ``start`` wraps, and that arranges the loss too."""

    def start(self, tokens: int) -> None:
        """Wrap for ``tokens``; the first step profiles and plans, if no plan is there."""
        super().start(tokens)
        settings = self.job.settings
        self._kept = None if self.job.plans is None else Path(f"{self.job.plans}-{tokens}.json")
        asked: dict[str, Any] = {
            "policy": self.policy, "alpha": self.alpha, "budget": self.job.budgets.get(tokens),
            "host_budget": self.job.host_budget,
        }  # fmt: skip
        memo_runtime.wrap(
            self.subject.model,
            **(asked if self._kept is None or not self._kept.exists() else {"plan": self._kept}),
            optimizer=self.subject.optimizer,
            loss=settings.loss if settings.scope == Scope.STEP else "auto",
        )

    def rehearse(self, on_gradients: OnGradients | None = None) -> None:
        """Profiles and plans for the whole; where even a rehearsal of that takes minutes, a step of a few tiles."""
        wrapped = find_wrapped(self.subject.model)
        if wrapped is None or self._batch is None or on_gradients is not None:
            super().rehearse(on_gradients)
            return
        with attention_kernel(self.job.settings.attention):
            wrapped.before_forward(*self.subject.call(self._batch))
        plan = wrapped.session.plan
        self._few = few_tokens(plan) if plan is not None and plan.forecast.step_seconds > _LONG else None
        if self._few is None:
            super().rehearse()
            return
        with under_plan(wrapped):
            self.subject.step(self.subject.batch(self._few))

    def finish(self) -> None:
        """Give host memory back."""
        self._few = None
        wrapped = find_wrapped(self.subject.model)
        if self._kept is not None and wrapped is not None and wrapped.session.plan is not None:
            save(wrapped.session.plan, self._kept)
        memo_runtime.unwrap(self.subject.model)
        super().finish()

    def recomputed_flops(self, tokens: int) -> int:
        """As the runtime's report has it; with policy ``none`` there is none."""
        if self.policy == "none":
            return 0
        return memo_runtime.report(self.subject.model).totals.recomputed_flops

    def pinned_bytes(self) -> int:
        """Slabs of the runtime, which PyTorch's pool does not know."""
        if self.device.type != "cuda" or self.policy == "none":
            return 0
        return memo_runtime.report(self.subject.model).totals.host_bytes

    def details(self) -> dict[str, Any]:
        """What the plan chose, and its forecast."""
        if self.policy == "none":
            return {}
        report = memo_runtime.report(self.subject.model)
        totals, forecast = report.totals, report.totals.forecast
        return {
            "executors": dict(Counter(block.executor.value for block in report.blocks)),
            "alpha": [round(block.alpha, 4) for block in report.blocks],
            "attention": sorted({kernel for block in report.blocks for kernel in block.attention}),
            "bytes_to_host": totals.bytes_to_host,
            "bytes_to_device": totals.bytes_to_device,
            "bytes_kept": totals.bytes_kept,
            "host_bytes": totals.host_bytes,
            "forecast": {
                "step_seconds": forecast.step_seconds,
                "peak_bytes": forecast.peak_bytes,
                "host_bytes": forecast.host_bytes,
            },
            "notes": list(report.notes),
        } | ({} if self._few is None else {"first_step_tokens": self._few})
