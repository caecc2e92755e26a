"""Ctrl-C at a chosen one of the places where Python looks for signals: behind a call, at the start of a function, and
where a loop jumps back. Its handler raises there, and so does a trace function here, in the files that are asked for.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType
from typing import Any

_CALLS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW"}
_JUMPS = {"JUMP_BACKWARD"}
Place = tuple[CodeType, int]


@cache
def _places(code: CodeType) -> frozenset[int]:
    """Offsets of ``code`` before which a signal may be handled."""
    found, before = set(), ""
    for one in dis.get_instructions(code):
        if before in _CALLS or before == "RESUME":
            found.add(one.offset)
        if one.opname in _JUMPS:
            found.add(one.argval)
        before = one.opname
    return frozenset(found)


class Interrupter:
    """Runs something and raises at the ``at``-th place in ``files``; 0: nowhere, and ``seen`` has where they are.

    ``where`` is the place at which it was raised, for the message of a test that fails.
    """

    def __init__(self, files: tuple[str, ...], at: int = 0) -> None:
        self._files = files
        self._at = at
        self._count = 0
        self.seen: dict[Place, list[int]] = {}
        self.where = ""

    def run(self, call: Callable[[], Any]) -> bool:
        """Whether the interrupt came out of ``call``."""
        before = sys.gettrace()
        sys.settrace(self._function)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _function(self, frame: FrameType, event: str, _: Any) -> Any:
        if self.where or not any(part in frame.f_code.co_filename for part in self._files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode" and not self.where and frame.f_lasti in _places(frame.f_code):
            self._count += 1
            self.seen.setdefault((frame.f_code, frame.f_lasti), []).append(self._count)
            if self._count == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._opcode


def every_place(files: tuple[str, ...], call: Callable[[], Any]) -> list[int]:
    """One moment for every distinct place that ``call`` passes: the middle one of its times."""
    watch = Interrupter(files)
    watch.run(call)
    return sorted(times[len(times) // 2] for times in watch.seen.values())
