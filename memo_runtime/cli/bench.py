"""``memo bench``: measures the contenders of a checkout side by side, and makes tables of committed rows.

The harness is no part of the package. Its rows are worth something only beside the commit that ran and the rows that
are there, and both are in a checkout; an installed package has neither. So the verb finds the checkout and becomes its
harness (``exec``), in this environment: options, errors and exit codes are the harness's own, written once, and nothing
of the runtime imports it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

from memo_runtime.errors import CheckoutMissingError

_RUN, _TABLE = "benchmarks.harness", "benchmarks.harness.tables"
#: What a checkout has, and an installed package does not.
_MARKS = ("benchmarks/harness/__main__.py", "memo_runtime/__init__.py")
#: Everything behind the verb is the harness's, --help too.
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

bench = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""\
Measure one training step under different memory managers, and compare committed rows.

Needs a checkout of memo_runtime: the one that this command runs from, or the one around the current folder.

\b
Examples:
  memo bench run --contenders unwrapped,checkpoint,memo-auto --lengths 16K,32K --out rows.jsonl
  memo bench run --rehearse --scope step --contenders checkpoint,memo-auto --lengths 64K,4M
  memo bench table rows.jsonl
  memo bench run --help
""",
)


@bench.command(context_settings=_PASSED_ON, add_help_option=False)
def run(context: typer.Context) -> None:
    """Measure contenders at lengths and write a row for each; the same command goes on where it stopped."""
    become(_RUN, context.args)


@bench.command(context_settings=_PASSED_ON, add_help_option=False)
def table(context: typer.Context) -> None:
    """Print the side-by-side tables of files of rows, as documents show them."""
    become(_TABLE, context.args)


def find_checkout(*, package: Path, current: Path) -> Path:
    """The checkout that holds ``package``, else the one around ``current``.

    Raises:
        CheckoutMissingError: neither is one.
    """
    for folder in (package.parent, current, *current.parents):
        if all((folder / mark).is_file() for mark in _MARKS):
            return folder
    raise CheckoutMissingError(
        f"the benchmarks are not part of the installed package ({package}), and {current} is in no checkout of "
        "memo_runtime, which has them in benchmarks/: run this in a checkout, or install one with "
        "pip install --editable '.[hf]'"
    )


def become(module: str, arguments: list[str]) -> NoReturn:
    """Run ``module`` of the checkout in place of this process.

    Raises:
        CheckoutMissingError: there is none.
    """
    root = find_checkout(package=Path(__file__).resolve().parents[1], current=Path.cwd())
    paths = [str(root), str(root / "solver"), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the shell
            stream.flush()
    # -P: a folder called benchmarks where the user stands is not taken for the checkout's.
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *arguments], environment)
