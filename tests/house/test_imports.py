"""Imports point one way; the arrows are those of the design.

errors, units <- output, config <- placement, sizes <- moments <- records <- persist, reports
blocks, losses, planning, reporting, native -> the nouns  profiling, execution -> blocks, native, the nouns
profiling -> losses
execution -> capture -> blocks, the nouns                  offline -> execution, for what blocks take by tiles
offline -> integrations, for whether wrap tiles the loss
planning -> memo_solver                                   wrapping, checking, api -> the three stages
"""

import pytest

from tests.house.sources import ROOT, imports, module_name, python_files

NOUNS = {"records", "placement", "sizes", "config", "errors", "units", "output"}
STAGES = {"profiling", "planning", "execution"}

#: Part of memo_runtime -> parts it may import, itself aside. Parts that are not listed make the test fail.
ALLOWED = {
    "errors": set(),
    "units": set(),
    "config": {"errors", "units"},
    "output": {"errors", "units"},
    "placement": set(),
    "sizes": set(),
    "moments": {"sizes"},
    "records": {"moments", "placement", "sizes"},
    "reports": {"records", "placement"},
    "persist": NOUNS | {"soundness"},
    "soundness": NOUNS | {"planning"},
    "arguments": NOUNS,
    "blocks": NOUNS | {"recent"},
    "losses": NOUNS,
    "reporting": {"records", "reports", "placement", "sizes", "units", "errors", "output", "config"},
    "native": NOUNS,
    "profiling": NOUNS | {"blocks", "losses", "native"},
    "planning": NOUNS | {"traces"},
    "traces": NOUNS,
    "machines": NOUNS | {"reporting"},
    "offline": NOUNS
    | {"blocks", "capture", "execution", "profiling", "recording", "traces", "machines", "planning", "reporting"}
    | {"integrations"},
    "simulation": NOUNS | {"traces"},
    "allocator": NOUNS,
    "arena": NOUNS | {"allocator", "planning", "recent", "recording", "traces"},
    "recording": NOUNS | {"traces", "profiling"},
    "capture": NOUNS | {"blocks"},
    "execution": NOUNS | {"recent", "blocks", "capture", "native", "reports"},
    "integrations": NOUNS | {"blocks", "losses", "execution"},
    # The front door: the only place where the three stages meet.
    "wrapping": NOUNS | STAGES | {"arena", "blocks", "gate", "integrations", "kinds", "recent"},
    "gate": {"errors"},
    "kinds": {"profiling", "recent", "records"},
    "recent": set(),
    "lookup": NOUNS | {"execution", "wrapping"},
    "checking": NOUNS | {"arguments", "blocks", "lookup", "profiling", "reports", "wrapping", "api"},
    "rehearsal": NOUNS | {"arguments", "blocks", "lookup", "profiling", "wrapping", "api"},
    "api": NOUNS
    | STAGES
    | {"allocator", "arguments", "blocks", "checking", "lookup", "persist", "rehearsal", "reports", "soundness"}
    | {"wrapping"},
    "cli": NOUNS
    | {
        "allocator",
        "api",
        "arguments",
        "blocks",
        "losses",
        "machines",
        "native",
        "offline",
        "persist",
        "planning",
        "profiling",
        "rehearsal",
        "reporting",
        "__version__",
    },
    "__init__": NOUNS | {"api", "losses", "persist", "reports"},
    "__main__": {"cli"},
}
#: (file, imported part): records print themselves as tables, when asked to.
LAZY_EXCEPTIONS = {("records", "reporting"), ("reports", "reporting")}

WITHOUT_TORCH = {
    "errors", "units", "config", "output", "records", "reports", "moments", "placement", "sizes", "persist",
    "soundness", "reporting", "planning", "traces", "simulation", "machines", "__init__",
}  # fmt: skip
SOLVERS = {"ortools", "pulp", "memo_solver"}
MAY_SOLVE = {"planning", "cli"}


def part_of(path):
    parts = path.relative_to(ROOT / "memo_runtime").with_suffix("").parts
    return parts[0]


def runtime_imports():
    return [(part_of(path), found) for path in python_files("memo_runtime") for found in imports(path)]


def top(module):
    return module.split(".")[0]


def test_every_part_of_the_runtime_has_a_place_in_the_rules():
    parts = {part_of(path) for path in python_files("memo_runtime")}
    assert parts - set(ALLOWED) == set(), "say in ALLOWED what the new part may import"


def test_imports_point_one_way():
    wrong = []
    for part, found in runtime_imports():
        if top(found.module) != "memo_runtime":
            continue
        target = [*found.module.split("."), "__init__"][1]
        exempt = found.lazy and (part, target) in LAZY_EXCEPTIONS
        if target != part and target not in ALLOWED[part] and not exempt:
            wrong.append(str(found))
    assert wrong == []


def test_nouns_files_and_tables_do_without_torch():
    assert [
        str(found) for part, found in runtime_imports() if part in WITHOUT_TORCH and top(found.module) == "torch"
    ] == []


def test_packages_know_nothing_of_the_benchmarks():
    """They are no part of what is installed; `memo bench` starts them as a process."""
    found = [one for path in python_files("memo_runtime", "solver") for one in imports(path)]
    assert [str(one) for one in found if top(one.module) in {"benchmarks", "geometries"}] == []


def test_only_planning_solves():
    assert [
        str(found) for part, found in runtime_imports() if part not in MAY_SOLVE and top(found.module) in SOLVERS
    ] == []


def test_importing_the_package_imports_nothing_of_it():
    found = imports(ROOT / "memo_runtime" / "__init__.py")
    assert [str(one) for one in found if top(one.module) == "memo_runtime" and not one.typing] == []


@pytest.mark.parametrize("banned", ["torch", "memo_runtime"])
def test_the_solver_knows_neither_torch_nor_the_runtime(banned):
    found = [one for path in python_files("solver") for one in imports(path)]
    assert [str(one) for one in found if top(one.module) == banned] == []


def test_one_module_of_the_solver_imports_ortools():
    modules = {
        module_name(path) for path in python_files("solver") for one in imports(path) if top(one.module) == "ortools"
    }
    assert len(modules) <= 1, modules


def test_nobody_imports_the_command_line():
    everyone = python_files("memo_runtime", "solver", "benchmarks")
    assert [
        str(found)
        for path in everyone
        if "memo_runtime/cli" not in path.as_posix() and path.name != "__main__.py"
        for found in imports(path)
        if found.module.startswith("memo_runtime.cli")
    ] == []


def test_solvers_are_imported_when_something_is_solved():
    """A top-level import of ortools or pulp would make every import of planning pay for it."""
    everyone = python_files("memo_runtime")
    assert [
        str(found)
        for path in everyone
        for found in imports(path)
        if top(found.module) in {"ortools", "pulp"} and not found.lazy and not found.typing
    ] == []
