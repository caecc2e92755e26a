"""Names of contenders. Needs no torch: the runner knows them without making one.

``memo-POLICY@OTHER`` is memo with ``budget`` set to the peak that contender OTHER reached in the same run at the same
length, ``memo-POLICY@24GiB`` with that budget at every length.
"""

from __future__ import annotations

from dataclasses import dataclass

from memo_runtime.units import parse_bytes

#: What follows ``memo-`` in a name -> policy and alpha. ``tiled0`` keeps no products between forward and backward.
MEMO_WAYS: dict[str, tuple[str, float | None]] = {
    **{policy: (policy, None) for policy in ("auto", "replay", "swap", "recompute", "memo", "none", "tiled")},
    "tiled0": ("tiled", 0.0),
}
#: What other projects recommend for long sequences. One that is not installed is a row with status ``skipped``.
OTHERS = (
    "axolotl", "hf-offload", "trl-offload", "trl-offload-all", "liger", "liger-kernels", "hf-offload+liger",
    "hf-offload+liger-kernels", "deepspeed", "deepspeed-zero-offload", "megatron-full", "megatron-selective",
    "megatron-mlp-chunks", "unwrapped+compile", "checkpoint+compile", "selective+compile", "selective-mm+compile",
    "memory-budget", "trainstream",
)  # fmt: skip
NAMES = (
    "kernels", "unwrapped", "selective", "selective-mm", "checkpoint", "save_on_cpu", *OTHERS,
    *(f"memo-{way}" for way in MEMO_WAYS),
)  # fmt: skip

#: They train layers of their own, or nothing, and so none that has adapters.
WITHOUT_ADAPTERS = ("kernels", "megatron-full", "megatron-selective", "megatron-mlp-chunks")


class ContenderError(ValueError):
    """No such contender, or one that depends on another that does not come before it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender as it is asked for: its name, and whose peak is its budget, or its own (``size``, as it is given)."""

    name: str
    budget_from: str | None = None
    size: str | None = None

    @property
    def label(self) -> str:
        """As rows name it."""
        source = self.budget_from or self.size
        return self.name if source is None else f"{self.name}@{source}"

    @property
    def budget(self) -> int | None:
        """Bytes of its own budget."""
        return None if self.size is None else parse_bytes(self.size)

    @property
    def takes_budget(self) -> bool:
        """Whether it can be told a budget."""
        return self.name.startswith("memo-") and self.name != "memo-none"


def _entry(label: str) -> Entry:
    name, found, source = label.strip().partition("@")
    size = source if found and source[:1].isdigit() else None
    for one in (name, source) if found and size is None else (name,):
        if one not in NAMES:
            raise ContenderError(f"contender {one!r} is unknown; there are: {', '.join(NAMES)}")
    try:
        entry = Entry(name, source if found and size is None else None, size)
        if entry.budget == 0:
            raise ValueError("a budget of 0 bytes leaves no memory: give a size such as 24GiB")
    except ValueError as error:
        raise ContenderError(f"contender {label!r}: {error}") from None
    if found and not entry.takes_budget:
        raise ContenderError(f"contender {label!r}: {name} takes no budget, only memo's policies do")
    return entry


def parse_contenders(text: str, *, budget_from: str | None = None) -> tuple[Entry, ...]:
    """The contenders named in ``text``, separated by commas, in its order.

    Args:
        budget_from: every memo contender also runs as ``memo-POLICY@budget_from``, before it runs without.

    Raises:
        ContenderError: an unknown name, a name twice, ``@OTHER`` where OTHER does not come before, or ``budget_from``
            where nobody takes a budget.
    """
    entries: list[Entry] = []
    if budget_from is not None and budget_from not in NAMES:
        raise ContenderError(f"--budget-from {budget_from} is unknown; there are: {', '.join(NAMES)}")
    for entry in (_entry(label) for label in text.split(",") if label.strip()):
        if budget_from is not None and entry.takes_budget and entry.label == entry.name:
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
    if budget_from is not None and not any(entry.budget_from == budget_from for entry in entries):
        raise ContenderError(f"--budget-from {budget_from}: nobody takes it; name one of memo's, such as memo-auto")
    return tuple(entries)
