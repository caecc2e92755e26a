"""How large the files and functions are, and how large they may be.

``python -m tests.house.sizes`` prints the table and fails where a ceiling is broken.
"""

import ast
import statistics
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.house.sources import FOLDERS, ROOT, project_files, python_files, shown, statements, tree

MAX_FILE = 500
MAX_FUNCTION = 80
MAX_POSITIONAL = 5
#: Of the packages that users install.
MAX_FILE_MEDIAN = 180
MAX_FUNCTION_P90 = 40
BANNED_NAMES = {"utils", "util", "common", "helpers", "misc"}
PACKAGES = ("memo_runtime", "solver")
_CODE = {".py", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".sh"}
#: First parameters that the language or PyTorch passes, not the caller.
_IMPLICIT = {"self", "cls", "ctx"}


@dataclass(frozen=True)
class Function:
    """One function: where it is, its lines without decorators, its positional parameters."""

    path: Path
    name: str
    line: int
    lines: int
    positional: int

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.line} {self.name}"


def code_files() -> list[Path]:
    """Everything with a ceiling; package markers are not counted in medians, but may not grow either."""
    return [path for path in project_files() if path.suffix in _CODE]


@cache
def num_lines(path: Path) -> int:
    """Physical lines."""
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(*folders: str) -> list[Function]:
    """All functions and methods of the Python files below ``folders``."""
    return [one for path in python_files(*folders) for one in _functions_of(path)]


@cache
def _functions_of(path: Path) -> tuple[Function, ...]:
    found = []
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        pending.extend(statements(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            positional = len(names) - (names[:1] != [] and names[0] in _IMPLICIT)
            lines = node.end_lineno - node.lineno + 1
            found.append(Function(path, node.name, node.lineno, lines, positional))
    return tuple(found)


def p90(values: list[int]) -> int:
    """The value that nine of ten do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]


def broken() -> list[str]:
    """What breaks a ceiling, as messages."""
    problems = [
        f"{shown(path)} has {count} lines; at most {MAX_FILE}"
        for path in code_files()
        if (count := num_lines(path)) > MAX_FILE
    ]
    problems += [
        f"{shown(path)}: a module called '{path.stem}' says nothing; name what it holds"
        for path in code_files()
        if path.stem in BANNED_NAMES or path.parent.name in BANNED_NAMES
    ]
    for one in functions():
        if one.lines > MAX_FUNCTION:
            problems.append(f"{one} has {one.lines} lines; at most {MAX_FUNCTION}")
        if one.positional > MAX_POSITIONAL:
            problems.append(f"{one} has {one.positional} positional parameters; at most {MAX_POSITIONAL}")
    return problems + _broken_medians()


def _broken_medians() -> list[str]:
    sizes = [num_lines(path) for path in python_files(*PACKAGES) if path.name != "__init__.py"]
    lengths = [one.lines for one in functions(*PACKAGES)]
    problems = []
    if statistics.median(sizes) > MAX_FILE_MEDIAN:
        problems.append(f"the median file has {statistics.median(sizes)} lines; at most {MAX_FILE_MEDIAN}")
    if p90(lengths) > MAX_FUNCTION_P90:
        problems.append(f"one function in ten has over {p90(lengths)} lines; at most {MAX_FUNCTION_P90}")
    return problems


def report() -> str:
    """The table: files and functions by folder, then the largest."""
    lines = [
        f"{'folder':14}{'files':>6}{'median':>8}{'p90':>6}{'max':>6}{'functions':>11}{'median':>8}{'p90':>6}{'max':>6}"
    ]
    for folder in FOLDERS:
        sizes = [
            num_lines(path)
            for path in code_files()
            if path.relative_to(ROOT).parts[0] == folder and path.name != "__init__.py"
        ]
        if not sizes:
            continue
        line = f"{folder:14}{len(sizes):6}{statistics.median(sizes):8.0f}{p90(sizes):6}{max(sizes):6}"
        lengths = [one.lines for one in functions(folder)]
        if lengths:
            line += f"{len(lengths):11}{statistics.median(lengths):8.0f}{p90(lengths):6}{max(lengths):6}"
        lines.append(line)
    largest = sorted(code_files(), key=num_lines, reverse=True)[:5]
    longest = sorted(functions(), key=lambda one: one.lines, reverse=True)[:5]
    lines += ["", "largest files", *(f"  {num_lines(path):4}  {shown(path)}" for path in largest)]
    lines += ["", "longest functions", *(f"  {one.lines:4}  {one}" for one in longest)]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, then what breaks a ceiling."""
    print(report())
    problems = broken()
    print("\n".join(["", *problems] if problems else ["", "all within their ceilings"]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
