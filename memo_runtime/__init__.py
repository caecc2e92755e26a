"""A memory-managed long-context training runtime for PyTorch.

    import memo_runtime as memo

    memo.wrap(model, budget="70GiB")     # in place; the first step profiles and plans
    ...                                  # train as before
    print(memo.report(model))            # what the last step swapped, kept and rebuilt

Importing this package imports nothing else: every name is fetched when it is first used, so that the command
line answers at once and a saved plan can be read on a machine without a GPU, a solver or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memo_runtime import errors
    from memo_runtime.api import check, plan, profile, register_mixer, rehearse, report, token_wise, unwrap, wrap
    from memo_runtime.errors import MemoError
    from memo_runtime.losses import linear_cross_entropy
    from memo_runtime.records import Plan, Profile
    from memo_runtime.reports import Report

__version__ = "0.1.0"

__all__ = [
    "MemoError",
    "Plan",
    "Profile",
    "Report",
    "__version__",
    "check",
    "errors",
    "linear_cross_entropy",
    "plan",
    "profile",
    "register_mixer",
    "rehearse",
    "report",
    "token_wise",
    "unwrap",
    "wrap",
]

#: Where each public name lives. No module or sub-package of this package may be called like one of these
#: functions: importing it would overwrite the function.
_HOMES = {
    "MemoError": "memo_runtime.errors",
    "Plan": "memo_runtime.records",
    "Profile": "memo_runtime.records",
    "Report": "memo_runtime.reports",
    "check": "memo_runtime.api",
    "linear_cross_entropy": "memo_runtime.losses",
    "plan": "memo_runtime.api",
    "profile": "memo_runtime.api",
    "register_mixer": "memo_runtime.api",
    "rehearse": "memo_runtime.api",
    "report": "memo_runtime.api",
    "token_wise": "memo_runtime.api",
    "unwrap": "memo_runtime.api",
    "wrap": "memo_runtime.api",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("memo_runtime.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
