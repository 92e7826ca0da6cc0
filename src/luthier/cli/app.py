"""The `luthier` command itself: how every command ends, and with which exit status."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from luthier import __version__
from luthier.types import LuthierError, ProcessFailed, RunInterrupted

USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
CLAIM_FAILS = 1
CRASHED = 1  # what Python reports for a process that an exception ended
SAVED = 75  # sysexits' EX_TEMPFAIL: stopped by a signal with a checkpoint saved; try again and it goes on


class _Commands(TyperGroup):
    """All commands end alike: what the user can mend is one message, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RunInterrupted as stop:
            typer.echo(str(stop), err=True)
            raise SystemExit(SAVED) from None
        except ProcessFailed as failure:
            typer.echo(f"error: {failure}", err=True)
            raise SystemExit(CRASHED) from None
        except LuthierError as error:
            if os.environ.get("LUTHIER_TRACEBACK") == "1":
                raise
            text = str(error)
            typer.echo(f"error:\n{text}" if "\n" in text else f"error: {text}", err=True)
            raise SystemExit(USAGE_ERROR) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise SystemExit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Fine-tune language models, and prove every step on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"luthier {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
