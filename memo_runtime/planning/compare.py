"""Whether a plan was made for what is about to run."""

from __future__ import annotations

from dataclasses import fields

from memo_runtime.errors import PlanMismatchError
from memo_runtime.records import Fingerprint, Plan

_MEANING = {
    "model": "the parameters; # is a hash of their names, shapes, dtypes and requires_grad",
    "blocks": "the managed blocks; # is a hash of their names",
    "batch": "the batch without its sizes",
    "torch": "torch version",
    "device": "device",
}


def check_fingerprint(plan: Plan, fingerprint: Fingerprint) -> None:
    """Refuse ``plan`` unless it was made for ``fingerprint``.

    Raises:
        PlanMismatchError: naming every field that differs, with both values.
    """
    made_for = plan.profile.fingerprint
    differing = [
        (field.name, getattr(made_for, field.name), getattr(fingerprint, field.name))
        for field in fields(Fingerprint)
        if getattr(made_for, field.name) != getattr(fingerprint, field.name)
    ]
    if not differing:
        return
    names = ", ".join(name for name, _, _ in differing)
    lines = [f"the plan was made for something else; what differs: {names}"]
    for name, planned, now in differing:
        lines.append(f"  {name}: the plan has {planned!r}, here it is {now!r} ({_MEANING[name]})")
    lines.append("  would work: profile and plan again with this model and batch (leave plan= out)")
    raise PlanMismatchError("\n".join(lines))
