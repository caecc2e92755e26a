"""One rehearsal of ``memo fit --rehearse`` in a process of its own: memory that was short leaves nothing behind.

    python -m memo_runtime.cli.rehearsal_trial < trial.json

The last line of its output is the rehearsal, or the error that stood against it, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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


def run(trial: Trial) -> Rehearsal:
    """Make the model, wrap it and rehearse a step.

    Raises:
        MemoError: the model cannot be made, or does not train.
    """
    import torch

    from memo_runtime.api import rehearse, wrap
    from memo_runtime.cli.offline_subject import make_subject
    from memo_runtime.offline.trainable import trained_in_part
    from memo_runtime.rehearsal.materialise import lengthened, materialised

    subject = make_subject(trial.model, trial.max_positions)
    subject = trained_in_part(subject, lora=trial.lora, trainable=trial.trainable)
    device = torch.device(trial.device)
    model = materialised(subject.model, device)
    args, kwargs = lengthened(subject.batch, trial.tokens, device)
    optimizer = _optimizer(trial.optimizer, model, device)
    wrap(
        model, policy=trial.policy, alpha=trial.alpha, keep_last=trial.keep_last, budget=trial.budget,
        host_budget=trial.host_budget, optimizer=optimizer,
    )  # fmt: skip
    return rehearse(model, kwargs or args, restore=False)


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


def main() -> None:
    """Do the trial on standard input."""
    from memo_runtime.errors import MemoError

    # Results have the output for themselves: what libraries print goes where talk goes.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        values: dict[str, Any] = json.loads(sys.stdin.read())
        try:
            found: dict[str, Any] = {"rehearsal": run(Trial(**values)).to_dict()}
        except MemoError as error:
            found = {"refused": str(error)}
        out.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
