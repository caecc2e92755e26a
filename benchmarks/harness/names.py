"""Names of contenders. Needs no torch: the runner knows them without making one.

``memo-POLICY@OTHER`` is memo with ``budget`` set to the peak that contender OTHER reached in the same run at the same
length.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What follows ``memo-`` in a name -> policy and alpha. ``tiled0`` keeps no products between forward and backward.
MEMO_WAYS: dict[str, tuple[str, float | None]] = {
    **{policy: (policy, None) for policy in ("auto", "replay", "swap", "recompute", "memo", "none", "tiled")},
    "tiled0": ("tiled", 0.0),
}
NAMES = (
    "kernels", "unwrapped", "selective", "checkpoint", "save_on_cpu", *(f"memo-{way}" for way in MEMO_WAYS),
)  # fmt: skip


class ContenderError(ValueError):
    """No such contender, or one that depends on another that does not come before it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender as it is asked for: its name, and whose peak is its budget."""

    name: str
    budget_from: str | None = None

    @property
    def label(self) -> str:
        """As rows name it."""
        return self.name if self.budget_from is None else f"{self.name}@{self.budget_from}"

    @property
    def takes_budget(self) -> bool:
        """Whether it can be told a budget."""
        return self.name.startswith("memo-") and self.name != "memo-none"


def _entry(label: str) -> Entry:
    name, found, source = label.strip().partition("@")
    for one in (name, source) if found else (name,):
        if one not in NAMES:
            raise ContenderError(f"contender {one!r} is unknown; there are: {', '.join(NAMES)}")
    entry = Entry(name, source if found else None)
    if found and not entry.takes_budget:
        raise ContenderError(f"contender {label!r}: {name} takes no budget, only memo's policies do")
    return entry


def parse_contenders(text: str, *, budget_from: str | None = None) -> tuple[Entry, ...]:
    """The contenders named in ``text``, separated by commas, in its order.

    Args:
        budget_from: every memo contender also runs as ``memo-POLICY@budget_from``, before it runs without.

    Raises:
        ContenderError: an unknown name, a name twice, or ``@OTHER`` where OTHER does not come before.
    """
    entries: list[Entry] = []
    for entry in (_entry(label) for label in text.split(",") if label.strip()):
        if budget_from is not None and entry.takes_budget and entry.budget_from is None:
            entries.append(_entry(f"{entry.name}@{budget_from}"))
        entries.append(entry)
    labels = [entry.label for entry in entries]
    for place, entry in enumerate(entries):
        if entry.label in labels[:place]:
            raise ContenderError(f"contender {entry.label!r} is named twice")
        if entry.budget_from is not None and entry.budget_from not in labels[:place]:
            raise ContenderError(
                f"contender {entry.label!r} takes its budget from {entry.budget_from}, which has to run before it: "
                f"name it earlier in --contenders ({', '.join(labels)})"
            )
    if not entries:
        raise ContenderError(f"no contender is named; there are: {', '.join(NAMES)}")
    return tuple(entries)
