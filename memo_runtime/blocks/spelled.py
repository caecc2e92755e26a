"""The names by which a function may read attributes: those that its code spells, and ``ANY`` where it computes one.

``getattr(thing, "name")`` has the name among its constants. One that is computed (``getattr(thing, f"scale_{kind}")``),
and ``vars``, ``globals`` and ``__dict__``, may be any: whatever such code reaches is looked at with all that it holds.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from types import CodeType

#: Stands for every name; no code can spell it.
ANY = "*"
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_WHOLE = ("vars", "globals", "__dict__", "attrgetter")


@lru_cache(maxsize=4096)
def spelled(code: CodeType) -> tuple[str, ...]:
    """Names that ``code`` spells, with ``ANY`` at their end where it may use others."""
    names = [name for name in code.co_names if name[:2] != "__"]
    if any(name in code.co_names for name in _BY_NAME):
        names += [one for one in code.co_consts if isinstance(one, str) and one.isidentifier() and one[:2] != "__"]
    if _computes(code):
        names.append(ANY)
    return tuple(dict.fromkeys(names))


def _computes(code: CodeType) -> bool:
    """``code`` uses a name that is no constant; also where its source is not there to tell."""
    if any(name in code.co_names for name in _WHOLE):
        return True
    if not any(name in code.co_names for name in _BY_NAME):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    known = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in _BY_NAME]
    return not known or any(len(call.args) < 2 or not _is_name(call.args[1]) for call in known)


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
