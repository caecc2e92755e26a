"""Contenders side by side, as Markdown: what documents show of committed rows. Needs no torch.

One table is one run, and so one machine, one commit and one set of settings: nothing else is comparable. The lines at
its end set memo against the others, length by length: against the fastest of them, and against the fastest of those
that compute attention again in backward.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.harness.geometry import SHARES
from benchmarks.harness.rows import Row, RowError
from benchmarks.harness.table import first_line, too_long

#: Contender -> whether it computes attention again in backward; memo's own are set against these.
ATTENTION_AGAIN = {
    "unwrapped": False,
    "selective": False,
    "selective-mm": False,
    "checkpoint": True,
    "save_on_cpu": True,
    "axolotl": False,
    "hf-offload": True,
    "trl-offload": True,
    "trl-offload-all": False,
    "liger": True,
    "liger-kernels": True,
    "hf-offload+liger": True,
    "hf-offload+liger-kernels": True,
    "deepspeed": True,
    "deepspeed-zero-offload": True,
    "megatron-full": True,
    "megatron-selective": False,
    "megatron-mlp-chunks": True,
    "unwrapped+compile": False,
    "checkpoint+compile": True,
    "selective+compile": False,
    "selective-mm+compile": False,
    "memory-budget": False,
    "trainstream": False,
}
#: Trains nothing: a floor, and nobody's rival.
FLOOR = "kernels"
_MEMO = "memo-"
#: The contender that memo is judged by, where it is among a run's.
_FIRST = "memo-auto"
_GIB, _MIB = 2**30, 2**20
_WIDTH = 120
_STATUSES = {"oom": "out of memory", "error": "failed"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of one run.

    Attributes:
        source: the file they are from, as a link.
        shown, shown_lengths: what the table has; None: all. Who is fastest is asked of all rows, whatever is shown.
        confirmed: of rehearsals: rows of real steps at the lengths that were rehearsed, of another run; None: none.
    """

    source: str
    rows: tuple[Row, ...]
    shown: frozenset[str] | None = None
    shown_lengths: frozenset[int] | None = None
    confirmed: Comparison | None = None

    @property
    def first(self) -> Row:
        """Any of them, for what all have in common."""
        return self.rows[0]

    @property
    def rehearsed(self) -> bool:
        """Longest lengths, and no times."""
        return bool(self.first.get("rehearsed"))

    @property
    def contenders(self) -> tuple[str, ...]:
        """In the order in which they ran."""
        return tuple(dict.fromkeys(row["contender"] for row in self.rows))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those that are shown, shortest first."""
        there = {int(row["seq_len"]) for row in self.rows}
        return tuple(sorted(there if self.shown_lengths is None else there & self.shown_lengths))

    def shows(self, contender: str) -> bool:
        """Whether the table has a line for ``contender``."""
        return self.shown is None or contender in self.shown

    def find(self, contender: str, tokens: int) -> Row | None:
        """That row, if it is there."""
        return next((r for r in self.rows if r["contender"] == contender and r["seq_len"] == tokens), None)


def again(contender: str) -> bool:
    """Whether ``contender`` computes attention again in backward.

    Raises:
        RowError: nobody has said so.
    """
    if contender not in ATTENTION_AGAIN:
        raise RowError(f"{contender!r}: ATTENTION_AGAIN does not say whether it computes attention again")
    return ATTENTION_AGAIN[contender]


def markdown(comparison: Comparison) -> str:
    """The table of ``comparison`` between what was measured, and where, and what was not, and why."""
    lines = _longest(comparison) if comparison.rehearsed else _times(comparison)
    reasons = [line for text in _reasons(comparison) for line in _wrapped(text, indent="  ")]
    return "\n".join([*_wrapped(_heading(comparison)), "", *lines, *([""] if reasons else []), *reasons])


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _reasons(comparison: Comparison) -> Iterator[str]:
    """Why a contender that the table shows was skipped, or failed."""
    for row in comparison.rows:
        if row["status"] not in ("skipped", "error") or not comparison.shows(row["contender"]):
            continue
        said = first_line(row["error"] or "").removeprefix("SkippedError: ")
        where = "" if row["status"] == "skipped" else f" at {row['seq_len']:,}"
        yield f"- {row['contender']}{where}: {_STATUSES.get(row['status'], row['status'])}, {said}"


def _heading(comparison: Comparison) -> str:
    row = comparison.first
    config, stack = row["config"], "whole training steps"
    if row["scope"] == "blocks":
        count = "all" if row["blocks"] is None else row["blocks"]
        stack = f"{count} blocks, forward and backward"
    kernel = f"{config['attention']} attention" if config["attention"] != "auto" else "attention as PyTorch chooses"
    if config.get("allocator"):
        kernel += f", allocator {config['allocator']}"
    if config.get("lora"):
        stack += f" with LoRA of rank {config['lora']}"
    if row["geometry"] in SHARES:
        stack = f"{SHARES[row['geometry']]}, {stack}"
    what = f"`{row['geometry']}`, {stack}, {config['dtype']}, {kernel}"
    where = f"{row['gpu'] or row['cpu']}, torch {row['versions']['torch']}, commit {row['commit'][:7]}"
    if comparison.rehearsed:
        said = "The longest sequence of each by rehearsal (attention replaced by the same stand-in for everybody)"
        if comparison.confirmed is not None:
            said += f", and one real step of that length (run {comparison.confirmed.first['run']})"
    else:
        _, unit = _unit(comparison.rows)
        said = f"Step, causal MFU, and {unit} of device memory at its peak + of pinned host memory"
    return f"{said}: {what}; {where}; [run {row['run']}]({comparison.source})."


def _unit(rows: Iterable[Row]) -> tuple[int, str]:
    largest = max((row["peak_allocated"] or 0 for row in rows), default=0)
    return (_GIB, "GiB") if largest >= _GIB else (_MIB, "MiB")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _times(comparison: Comparison) -> list[str]:
    lengths = comparison.lengths
    header = ["contender", *(f"{tokens:,}" for tokens in lengths)]
    fastest = {tokens: _fastest(comparison, comparison.contenders, tokens) for tokens in lengths}
    rows = []
    for name in filter(comparison.shows, comparison.contenders):
        cells = [_cell(comparison, name, tokens) for tokens in lengths]
        best = [fastest[tokens] == name for tokens in lengths]
        shown = [f"**{cell}**" if first else cell for cell, first in zip(cells, best, strict=True)]
        rows.append([f"{name} (no training)" if name == FLOOR else name, *shown])
    rivals = [name for name in comparison.contenders if name != FLOOR and not name.startswith(_MEMO)]
    for said, among in (
        ("memo: times as fast as the fastest other", rivals),
        ("memo: ... that computes attention again", [name for name in rivals if again(name)]),
    ):
        rows.append([said, *(_against(comparison, among, tokens) for tokens in lengths)])
    return _table(header, rows)


def _cell(comparison: Comparison, name: str, tokens: int) -> str:
    row = comparison.find(name, tokens)
    if row is None:
        return ""
    if row["status"] != "ok":
        return _STATUSES.get(row["status"], row["status"])
    unit, _ = _unit(comparison.rows)
    share = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "-"
    return f"{_seconds(row)}, {share}, {_memory(row, unit)}"


def _memory(row: Row, unit: int) -> str:
    return f"{row['peak_allocated'] / unit:.1f} + {(row['pinned_bytes'] or 0) / unit:.1f}"


def _seconds(row: Row) -> str:
    seconds = row["step_seconds"]
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"


def _fastest(comparison: Comparison, names: Iterable[str], tokens: int) -> str | None:
    found = {}
    for name in names:
        row = comparison.find(name, tokens)
        if name != FLOOR and row is not None and row["status"] == "ok":
            found[name] = row["step_seconds"]
    return min(found, key=lambda name: found[name], default=None)


def _ours(comparison: Comparison, tokens: int) -> str | None:
    """The memo contender that stands for memo: ``memo-auto``, or the fastest where that did not run through."""
    return _fastest(comparison, [_FIRST], tokens) or _fastest(
        comparison, [name for name in comparison.contenders if name.startswith(_MEMO)], tokens
    )


def _against(comparison: Comparison, others: Sequence[str], tokens: int) -> str:
    """How much faster memo is than the fastest of ``others``, both named."""
    ours, theirs = _ours(comparison, tokens), _fastest(comparison, others, tokens)
    if ours is None or theirs is None:
        return "-"
    mine, best = comparison.find(ours, tokens), comparison.find(theirs, tokens)
    assert mine is not None, "it has been found"
    assert best is not None, "it has been found"
    named = "" if ours == _FIRST else f"{ours}: "
    return f"{named}{best['step_seconds'] / mine['step_seconds']:.2f} x {theirs}"


def _longest(comparison: Comparison) -> list[str]:
    unit, name = _unit(comparison.rows)
    farthest = sorted(comparison.contenders, key=lambda one: longest_of(comparison, one), reverse=True)
    reached = {one: _reached(comparison, one) for one in farthest}
    rows = []
    for one in filter(comparison.shows, reached):
        row = reached[one]
        short = _stopped(comparison, one, 0 if row is None else int(row["seq_len"]))
        cells = [one, "none" if row is None else f"{row['seq_len']:,}", "" if short is None else too_long(short)]
        rows.append([*cells, "" if row is None else _memory(row, unit)])
        if (real := comparison.confirmed) is not None:
            rows[-1].append("" if row is None else _cell(real, one, int(row["seq_len"])))
    header = ["contender", "longest", "too long", f"peak + pinned, {name}"]
    if comparison.confirmed is not None:
        header.append("one real step")
    ours, theirs = (_leader(reached, memo=memo) for memo in (True, False))
    if ours and theirs:
        most, other = (int(reached[one]["seq_len"]) for one in (ours, theirs))  # type: ignore[index]
        line = [f"{ours} against the longest other", f"{most / other:.2f} x {theirs}"]
        rows.append([*line, *[""] * (len(header) - len(line))])
    return _table(header, rows)


def _reached(comparison: Comparison, name: str) -> Row | None:
    there = [row for row in comparison.rows if row["contender"] == name and row["status"] == "ok"]
    return max(there, key=lambda row: int(row["seq_len"]), default=None)


def _stopped(comparison: Comparison, name: str, above: int) -> Row | None:
    """The row of the shortest length above ``above`` that ``name`` did not reach."""
    tried = [row for row in comparison.rows if row["contender"] == name and row["status"] != "ok"]
    return min((row for row in tried if row["seq_len"] > above), key=lambda row: int(row["seq_len"]), default=None)


def longest_of(comparison: Comparison, name: str) -> int:
    """The longest length that ``name`` reached; 0: none."""
    row = _reached(comparison, name)
    return 0 if row is None else int(row["seq_len"])


def _leader(reached: dict[str, Row | None], *, memo: bool) -> str | None:
    there = {name: int(row["seq_len"]) for name, row in reached.items() if row and name.startswith(_MEMO) == memo}
    return max(there, key=lambda name: there[name], default=None)
