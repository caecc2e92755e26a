"""Level-1 placements, found again by the content of their request sequence.

The key is a SHA-256 over what decides a placement: lifetimes relative to the
block, sizes and alignments, in order. Ids, the block's name and its place in
the step are no part of it. An entry is one small JSON file; it is validated
when loaded, and one that is damaged is ignored with a warning and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from memo_solver.errors import InputError, MemoSolverError
from memo_solver.records import Placement, Problem, Request
from memo_solver.validator import validate
from memo_solver.writing import write_atomically

SCHEMA = 1
_LOG = logging.getLogger("memo_solver")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level1:
    """Placement of one distinct block: offsets in the order of its requests."""

    offsets: tuple[int, ...]
    peak: int
    lower_bound: int


def content_hash(requests: tuple[Request, ...]) -> str:
    """SHA-256 of a request sequence, ids left out."""
    digest = hashlib.sha256(f"memo_solver level 1, schema {SCHEMA}\n".encode())
    for r in requests:
        digest.update(f"{r.lower},{r.upper},{r.size},{r.alignment}\n".encode())
    return digest.hexdigest()


class LevelCache:
    """Entries in memory, and in a folder when one is given."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._entries: dict[str, Level1] = {}

    def get(self, key: str, problem: Problem) -> Level1 | None:
        """Return the entry of a key, after a look at whether it fits the problem."""
        if key not in self._entries and self._folder is not None:
            entry = self._load(self._folder / f"{key}.json", problem)
            if entry is not None:
                self._entries[key] = entry
        return self._entries.get(key)

    def put(self, key: str, entry: Level1) -> None:
        """Keep an entry; a folder that cannot be written is a warning, not an end."""
        self._entries[key] = entry
        if self._folder is None:
            return
        text = json.dumps(
            {
                "schema": SCHEMA,
                "peak": entry.peak,
                "lower_bound": entry.lower_bound,
                "offsets": list(entry.offsets),
            }
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / f"{key}.json", text + "\n")
        except (OSError, InputError) as error:
            _LOG.warning("level-1 placement not kept: %s", error)

    def _load(self, path: Path, problem: Problem) -> Level1 | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            offsets = tuple(int(offset) for offset in content["offsets"])
            entry = Level1(
                offsets=offsets, peak=int(content["peak"]), lower_bound=int(content["lower_bound"])
            )
            validate(problem, offsets, capacity=entry.peak)
            if content["schema"] != SCHEMA or not 0 <= entry.lower_bound <= entry.peak:
                raise ValueError("schema or bounds are wrong")
            if entry.peak != Placement(problem=problem, offsets=offsets).peak:
                raise ValueError(f"peak {entry.peak} is not that of its offsets")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoSolverError) as error:
            _LOG.warning("cached level-1 placement %s ignored, made again: %s", path.name, error)
            return None
        return entry
