"""PuLP, imported so that nothing of the caller stays alive.

Its modules keep the exceptions of solvers that are not installed, and an exception keeps the frames of whoever imported
it. The first plan is made inside the user's first forward: its batch would never be freed. In a thread of its own the
import has no callers.
"""

from __future__ import annotations

import importlib
import threading
from functools import cache
from typing import Any


@cache
def load_pulp() -> Any:
    """The module ``pulp``.

    Raises:
        ImportError: it cannot be imported.
    """
    failures: list[BaseException] = []

    def load() -> None:
        try:
            importlib.import_module("pulp")
        except BaseException as error:  # handed to the caller, whose it is
            failures.append(error)

    thread = threading.Thread(target=load, name="memo_runtime import of pulp")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return importlib.import_module("pulp")
