"""``memo``: one verb per file, loaded when it runs, so that ``memo --help`` answers at once.

Results go to stdout, talk to stderr. Errors that a user can do something about are one message without a
traceback; anything else is a bug of ours and shows where it happened.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup

from memo_runtime import __version__
from memo_runtime.cli.answering import answer
from memo_runtime.cli.bench import bench
from memo_runtime.cli.check import check
from memo_runtime.cli.doctor import doctor
from memo_runtime.cli.exits import exit_code
from memo_runtime.cli.fit import fit
from memo_runtime.cli.plan import plan
from memo_runtime.cli.profile import profile
from memo_runtime.cli.show import show
from memo_runtime.cli.solve import solve
from memo_runtime.errors import MemoError

_HELP = """\
Memory-managed long-context training for PyTorch: activations swapped and rebuilt by plan, exactly.

\b
Examples:
  memo doctor                  what works on this machine, with a self-test
  memo check --model llama     losses and gradients against the unwrapped model
  memo plan --model llama-8b --seq-len 1M --gpus 8 --gpu h100-80gb
  memo fit --model llama-8b --lora 16   the longest sequence that trains
  memo show plan.json          a plan or profile as a table
  memo solve trace.csv         an address for every tensor of a trace
  memo bench table rows.jsonl  contenders side by side, from committed rows

\b
Exit codes:
  0 ok   1 bug or failed check   2 usage   3 infeasible   4 not found in the time   5 plan does not match
"""


_HELP_OPTIONS = {"-h", "--help"}


class _Commands(TyperGroup):
    """Turns the runtime's own errors into a message and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MemoError as error:
            typer.echo(f"memo: {error}", err=True)
            raise typer.Exit(exit_code(error)) from error


app = typer.Typer(
    cls=_Commands,
    name="memo",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": sorted(_HELP_OPTIONS)},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        answer(f"memo-runtime {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say on stderr what the runtime does.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say errors only.")] = False,
) -> None:
    """Options that stand before the verb."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("memo_runtime").setLevel(level)


app.add_typer(bench)
app.command()(check)
app.command()(doctor)
app.command()(fit)
app.command()(plan)
app.command()(profile)
app.command()(show)
app.command()(solve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``memo`` with ``arguments`` (the command line's, when not given) and exits."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if _HELP_OPTIONS.isdisjoint(given):
        app(args=given, prog_name="memo")
    else:
        _print_help(given)


def _print_help(given: list[str]) -> NoReturn:
    """As answers are: typer itself ends with a traceback on a full disk, and with 1 where the reader has gone."""
    text, code = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            app(args=given, prog_name="memo")
        except SystemExit as ended:
            code = ended.code
    try:
        answer(text.getvalue().removesuffix("\n"))
    except typer.Exit as ended:
        code = ended.exit_code
    sys.exit(code)
