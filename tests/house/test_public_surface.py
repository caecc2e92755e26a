"""What ``import memo_runtime`` gives, and what it costs."""

import json
import subprocess
import sys

import pytest

import memo_runtime
from tests.house.sources import ROOT, python_files

MAX_NAMES = 16


def modules_after(statement):
    """The top-level modules loaded by ``statement`` in a new process, and whether CUDA was touched."""
    code = (
        f"{statement}\nimport sys, json\ntorch = sys.modules.get('torch')\n"
        "print(json.dumps([sorted(sys.modules), bool(torch and torch.cuda.is_initialized())]))"
    )
    path = "import sys; sys.path[:0] = ['.', 'solver']\n"
    result = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules, cuda = json.loads(result.stdout.splitlines()[-1])
    return {name.split(".")[0] for name in modules}, cuda


def test_few_public_names_and_each_is_there():
    assert len(memo_runtime.__all__) <= MAX_NAMES
    for name in memo_runtime.__all__:
        assert getattr(memo_runtime, name) is not None
    assert set(memo_runtime.__all__) <= set(dir(memo_runtime))


def test_public_functions_and_classes_are_documented():
    for name in set(memo_runtime.__all__) - {"__version__"}:
        assert getattr(memo_runtime, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        memo_runtime.nonsense  # noqa: B018 - reading it is the test


def test_no_module_is_called_like_a_public_function():
    """Importing ``memo_runtime.plan`` would replace the function ``memo_runtime.plan``."""
    names = {path.stem for path in python_files("memo_runtime") if path.parent == ROOT / "memo_runtime"}
    names |= {path.parent.name for path in python_files("memo_runtime") if path.name == "__init__.py"}
    assert names & (set(memo_runtime.__all__) - {"errors"}) == set()


def test_functions_survive_the_import_of_everything():
    from memo_runtime import api, persist, reporting  # noqa: F401

    assert memo_runtime.plan is api.plan
    assert memo_runtime.profile is api.profile
    assert memo_runtime.report is api.report


@pytest.mark.parametrize(
    "statement",
    [
        "import memo_runtime",
        "from memo_runtime import Plan, Profile, Report, MemoError, errors",
        "import memo_runtime.persist, memo_runtime.reporting.plan_table",
        "import memo_runtime.cli.app",
    ],
)
def test_names_files_and_help_need_no_torch(statement):
    modules, _ = modules_after(statement)
    assert modules & {"torch", "numpy", "ortools", "pulp", "transformers", "pandas"} == set()


def test_the_front_door_costs_torch_and_no_more():
    modules, cuda = modules_after("import memo_runtime; memo_runtime.wrap")
    assert "torch" in modules
    assert modules & {"ortools", "pulp", "transformers", "pandas", "liger_kernel"} == set()
    assert not cuda


def test_the_types_are_shipped():
    assert (ROOT / "memo_runtime" / "py.typed").exists()
    assert (ROOT / "solver" / "memo_solver" / "py.typed").exists()
