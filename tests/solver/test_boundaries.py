"""What memo_solver imports, and when."""

import ast
import subprocess
import sys
from pathlib import Path

import memo_solver

FOLDER = Path(memo_solver.__file__).parent


def importers_of(package):
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == package for name in names):
                found.append(path.name)
    return found


def test_each_solver_package_is_imported_by_one_module():
    assert set(importers_of("ortools")) == {"cpsat.py"}
    assert set(importers_of("pulp")) == {"mip.py"}
    assert importers_of("torch") == []
    assert importers_of("memo_runtime") == []


def test_importing_the_package_loads_no_solver():
    code = "import memo_solver, sys; print(sorted({'torch', 'ortools', 'pulp', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(FOLDER.parent)})  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_without_the_compiled_search_the_status_says_why():
    code = (
        "import pathlib, memo_solver.native as n; n._LIBRARY = pathlib.Path('nowhere.so'); "
        "print(n.native_status().available, n.native_status().reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(FOLDER.parent)})  # fmt: skip
    assert done.stdout.startswith("False not built")
