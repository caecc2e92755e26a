"""Whether a plan was made for what is about to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from memo_runtime.errors import PlanMismatchError
from memo_runtime.records import Fingerprint, Plan

_MEANING = {
    "model": "the parameters; # is a hash of their names, shapes, dtypes and requires_grad",
    "blocks": "the managed blocks; # is a hash of their names",
    "batch": "the batch without its sizes",
    "torch": "torch version",
    "device": "device",
    "classes": "the classes of the managed blocks",
}


def check_fingerprint(
    plan: Plan, fingerprint: Fingerprint, classes: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Refuse ``plan`` unless it was made for ``fingerprint``, and for blocks of these ``classes``.

    Args:
        classes: by name of a block, its class and those that it derives from. Blocks that are not in it may be of any:
            a user may give a class another name.

    Raises:
        PlanMismatchError: naming every field that differs, with both values.
    """
    made_for = plan.profile.fingerprint
    differing = [
        (field.name, getattr(made_for, field.name), getattr(fingerprint, field.name))
        for field in fields(Fingerprint)
        if getattr(made_for, field.name) != getattr(fingerprint, field.name)
    ]
    differing += _other_classes(plan, classes or {})
    if not differing:
        return
    names = ", ".join(name for name, _, _ in differing)
    lines = [f"the plan was made for something else; what differs: {names}"]
    for name, planned, now in differing:
        lines.append(f"  {name}: the plan has {planned!r}, here it is {now!r} ({_MEANING[name]})")
    lines.append("  would work: profile and plan again with this model and batch (leave plan= out)")
    raise PlanMismatchError("\n".join(lines))


def _other_classes(plan: Plan, classes: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    found = [(block.name, block.kind, classes[block.name]) for block in plan.profile.blocks if block.name in classes]
    # fully_shard derives a class from the block's own, and puts that in front of its name.
    others = [(name, kind, now[0]) for name, kind, now in found if kind.removeprefix("FSDP") not in now]
    if not others:
        return []
    name, planned, now = others[0]
    return [("classes", planned, f"{now} for '{name}'" + (f" and {len(others) - 1} more" if others[1:] else ""))]
