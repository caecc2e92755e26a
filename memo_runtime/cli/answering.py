"""How a verb prints its answer: all of it on stdout, or one line on stderr that says why not."""

from __future__ import annotations

import contextlib

import typer

from memo_runtime.cli.exits import ExitCode


def answer(text: str) -> None:
    """Print ``text``, the last thing that a verb does.

    Raises:
        typer.Exit: what is behind stdout takes no more, such as a full disk; it was said.
    """
    from memo_runtime.output import print_all

    if why := print_all(f"{text}\n"):
        with contextlib.suppress(OSError):  # stderr may be on the same disk
            typer.echo(f"memo: {why}", err=True)
        raise typer.Exit(ExitCode.USAGE)
