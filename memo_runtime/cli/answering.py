"""How a verb prints its answer: all of it on stdout, or one line on stderr that says why not."""

from __future__ import annotations

import contextlib
import os
import sys

import typer

from memo_runtime.cli.exits import ExitCode


def answer(text: str) -> None:
    """Print ``text``, the last thing that a verb does. A reader that has gone (``| head``) changes nothing about it.

    Raises:
        typer.Exit: what is behind stdout takes no more, such as a full disk; it was said.
    """
    try:
        typer.echo(text)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_rest()
    except OSError as error:
        _drop_rest()
        typer.echo(f"memo: the answer cannot be printed: {error.strerror or error}", err=True)
        raise typer.Exit(ExitCode.USAGE) from error


def _drop_rest() -> None:
    """What is left in the buffer has nowhere to go; Python would try again at its end, complain and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
