"""Rehearsals of ``memo fit --rehearse`` in a process of their own: memory that was short leaves nothing behind.

    python -m memo_runtime.cli.rehearsal_trial < trials.jsonl

A line ``{"trial": ..., "only_plan": ...}`` is answered by lines that say what is done (``progress``), and by one with
the rehearsal, or with what has ``refused`` it. ``over``: memory was short in a step, and the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from memo_runtime.errors import MemoError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from memo_runtime.rehearsal.record import Rehearsal

#: Of optimizers that are named; the others need a library, or a master copy of the parameters.
REHEARSED = ("adamw", "adamw-foreach", "adamw-bf16", "adafactor", "sgd-momentum", "sgd", "none")
_RATE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is rehearsed: a model as ``memo fit`` takes it, a length, and how it is wrapped.

    ``budget``, ``host_budget``: bytes.
    """

    model: str
    tokens: int
    device: str
    policy: str
    alpha: float | None
    keep_last: int | None
    budget: int
    host_budget: int
    optimizer: str
    lora: int | None = None
    trainable: str | None = None
    max_positions: int | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


class Stage:
    """The model of a trial, made and wrapped once, for as many lengths as are asked."""

    def __init__(self, trial: Trial) -> None:
        """Make it.

        Raises:
            MemoError: the model cannot be made.
        """
        import torch

        from memo_runtime.api import wrap
        from memo_runtime.cli.offline_subject import make_subject
        from memo_runtime.offline.trainable import trained_in_part
        from memo_runtime.rehearsal.materialise import materialised

        self._settings = replace(trial, tokens=0)
        subject = make_subject(trial.model, trial.max_positions)
        subject = trained_in_part(subject, lora=trial.lora, trainable=trial.trainable)
        self._device, self._batch = torch.device(trial.device), subject.batch
        self._model = materialised(subject.model, self._device)
        # Policy none keeps to no limits: what memory there is shows what fits.
        device, host = (None, None) if trial.policy == "none" else (trial.budget, trial.host_budget)
        wrap(
            self._model, policy=trial.policy, alpha=trial.alpha, keep_last=trial.keep_last, budget=device,
            host_budget=host, optimizer=_optimizer(trial.optimizer, self._model, self._device),
        )  # fmt: skip

    def serves(self, trial: Trial) -> bool:
        """``trial`` differs in its length alone."""
        return replace(trial, tokens=0) == self._settings

    def planned(self, tokens: int) -> Rehearsal | None:
        """How a step of ``tokens`` ends for want of a plan, or of memory while one is made; None: it has one.

        Raises:
            MemoError: the model does not train.
        """
        from memo_runtime.rehearsal.planned import without_plan

        return without_plan(self._model, *self._call(tokens))

    def rehearsed(self, tokens: int) -> Rehearsal:
        """A step of ``tokens``.

        Raises:
            MemoError: the model does not train.
        """
        from memo_runtime.api import rehearse

        return rehearse(self._model, self._given(tokens), restore=False, shorter=self._given)

    def _call(self, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from memo_runtime.rehearsal.materialise import lengthened

        args, kwargs = lengthened(self._batch, tokens, self._device)
        return args, kwargs

    def _given(self, tokens: int) -> Any:
        args, kwargs = self._call(tokens)
        return kwargs or args


def run(trial: Trial) -> Rehearsal:
    """Make the model, wrap it and rehearse a step.

    Raises:
        MemoError: the model cannot be made, or does not train.
    """
    return Stage(trial).rehearsed(trial.tokens)


def _optimizer(name: str, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    import torch

    parameters = [one for one in model.parameters() if one.requires_grad]
    if name == "adamw-foreach":
        return torch.optim.AdamW(parameters, lr=_RATE, foreach=True)
    if name in ("adamw", "adamw-bf16"):
        return torch.optim.AdamW(parameters, lr=_RATE, fused=device.type == "cuda")
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=_RATE)
    # Without any, AdamW would be assumed: one that keeps nothing says so.
    return torch.optim.SGD(parameters, lr=_RATE, momentum=0.9 if name == "sgd-momentum" else 0.0)


class _Says(logging.Handler):
    """Hands on what is logged."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        self._say({"progress": record.getMessage().removeprefix("memo: ")})


def main() -> None:
    """Do the trials on standard input, one a line, until there are no more, or memory was short in one."""
    # Results have the output for themselves: what libraries print goes where talk goes.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def say(what: dict[str, Any]) -> None:
            out.write(json.dumps(what) + "\n")
            out.flush()

        # Whoever asks may be busy yet: what takes long to import is there by then.
        import memo_runtime.api
        import memo_runtime.cli.offline_subject  # noqa: F401

        logger = logging.getLogger("memo_runtime")
        logger.addHandler(_Says(say))
        logger.setLevel(logging.INFO)
        stage: Stage | None = None
        for line in iter(sys.stdin.readline, ""):
            asked: dict[str, Any] = json.loads(line)
            trial = Trial(**asked["trial"])
            try:
                if stage is None or not stage.serves(trial):
                    say({"progress": "rehearsal: the model is made"})
                    stage = Stage(trial)
                found = stage.planned(trial.tokens) if asked["only_plan"] else stage.rehearsed(trial.tokens)
            except MemoError as error:
                say({"refused": str(error)})
                return
            over = found is not None and not found.fits and not _is_left_clean(found)
            say({"rehearsal": None if found is None else found.to_dict(), "over": over})
            if over:
                return


def _is_left_clean(found: Rehearsal) -> bool:
    """Nothing was begun that memory was short for: there was no plan."""
    from memo_runtime.rehearsal.run import PROFILED

    return found.phase == "plan" and found.where != PROFILED


if __name__ == "__main__":
    main()
