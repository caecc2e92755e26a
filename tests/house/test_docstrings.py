"""Everything public says what it is for."""

import ast

from tests.house.sources import python_files, shown, tree

DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def undocumented(path):
    if not ast.get_docstring(tree(path)) and path.read_text(encoding="utf-8").strip():
        yield shown(path)

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, DEFINITIONS) or child.name.startswith("_"):
                continue
            overrides = any("overload" in ast.unparse(decorator) for decorator in child.decorator_list)
            if not ast.get_docstring(child) and not overrides:
                yield f"{shown(path)}:{child.lineno} {child.name}"
            if isinstance(child, ast.ClassDef):
                yield from visit(child)

    yield from visit(tree(path))


def test_modules_classes_and_functions_have_docstrings():
    files = python_files("memo_runtime", "solver", "examples")
    assert [missing for path in files for missing in undocumented(path)] == []


def test_public_functions_are_annotated():
    missing = []
    for path in python_files("memo_runtime", "solver", "examples"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [one.arg for one in given if one.annotation is None and one.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    missing.append(f"{shown(path)}:{node.lineno} {node.name} {bare}")
    assert missing == []
