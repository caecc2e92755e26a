"""Imports of the project's own files that fail: of a tree that was replaced while a run went on. Needs no torch.

That is no contender's doing, and would stay in the file as its result: the run is refused instead, and goes on with the
same command in a tree that is whole.
"""

from __future__ import annotations

import re

#: What Python says of a module, or of a name in one, of this project.
_OURS = re.compile(
    r"(No module named '?|cannot import name '\w+' from (partially initialized module )?')"
    r"(benchmarks|memo_runtime|memo_solver|geometries)\b"
)


class RefusedError(RuntimeError):
    """No contender could be measured: what a process said of it."""


def refusal(text: str) -> str | None:
    """What a run is refused with where ``text`` says that a file of the project is not there; None: it does not."""
    if _OURS.search(text) is None:
        return None
    return (
        f"a file of the project itself could not be imported ({text}), so this is nobody's result: was the tree "
        "replaced while the run went on? The same command goes on in one that is whole"
    )


def refusal_of(error: BaseException) -> str | None:
    """The same of an error, or of what caused it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ImportError) and (said := refusal(str(found))):
            return said
        found = found.__cause__
    return None
