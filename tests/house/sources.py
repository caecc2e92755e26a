"""The files of the project and what they import, for the tests of its structure."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Where source lives; anything else in the root is one file each.
FOLDERS = ("memo_runtime", "solver", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is tracked, or new and not ignored; without git, all files of the known folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
        paths += ROOT.iterdir()
    return tuple(sorted(path for path in set(paths) if path.is_file() and "__pycache__" not in path.parts))


def python_files(*folders: str) -> list[Path]:
    """The Python files below ``folders``, or all."""
    return [
        path
        for path in project_files()
        if path.suffix == ".py" and (not folders or path.relative_to(ROOT).parts[0] in folders)
    ]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements right inside ``node``: no expression holds one, and most nodes of a tree are expressions."""
    for name in ("body", "orelse", "finalbody"):
        inside = getattr(node, name, ())
        if isinstance(inside, list):  # of a lambda and of a conditional it is an expression
            yield from inside
    for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield from part.body


def shown(path: Path) -> str:
    """The path as messages show it."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """``memo_runtime/blocks/stack.py`` is ``memo_runtime.blocks.stack``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "solver":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@dataclass(frozen=True)
class Import:
    """One imported module; ``lazy`` where a function does it, ``typing`` where only type checkers see it."""

    path: Path
    line: int
    module: str
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.line} imports {self.module}"


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """All imports of a file, with ``from package import name`` as ``package.name``."""
    found = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        for child in statements(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{shown(path)}:{child.lineno}: relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                visit(child, lazy or inside, typing or guarded)
                continue
            found.extend(Import(path, child.lineno, name, lazy, typing) for name in names)

    visit(tree(path), lazy=False, typing=False)
    return tuple(found)
