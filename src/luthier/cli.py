"""The `luthier` command. Every command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from click import Choice
from typer.core import TyperGroup

from luthier import __version__
from luthier.types import LuthierError, RunInterrupted

USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
SAVED = 75  # sysexits' EX_TEMPFAIL: stopped by a signal with a checkpoint saved; try again and it goes on


class _Commands(TyperGroup):
    """All commands end alike: what the user can mend is one message, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RunInterrupted as stop:
            typer.echo(str(stop), err=True)
            raise SystemExit(SAVED) from None
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A Luthier or LLaMA-Factory recipe (YAML or JSON).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE, for example train.epochs=2.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Train what RECIPE describes."""
    from luthier.run import train as run_train

    _finish(run_train(recipe, overrides or [], quiet=quiet), quiet)


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="A Luthier or LLaMA-Factory recipe (YAML or JSON).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE, for example data.workers=2.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Tokenize the data of RECIPE into the cache and stop."""
    from luthier.run import prepare as run_prepare

    data = run_prepare(recipe, overrides or [], quiet=quiet)
    if not quiet:
        for name, key in data.fingerprints.items():
            typer.echo(f"{name}: ready ({key[:16]})")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", show_default=False)],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Any name in the log; may be given several times.", show_default=False),
    ] = None,
    x: Annotated[
        str, typer.Option("--x", help="steps, tokens or time.", click_type=Choice(["steps", "tokens", "time"]))
    ] = "steps",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png, .svg or .pdf file (runs.png).", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is in the way.")] = False,
) -> None:
    """Draw the curves of RUNS in one picture; those of one run, without options, in its folder."""
    from luthier.trainer.compare_plots import plot_runs

    axis = cast(Literal["steps", "tokens", "time"], x)
    for file in plot_runs(runs, metrics=metric or [], axis=axis, output=output, overwrite=overwrite):
        typer.echo(str(file))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run directory.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train the embedded model on a small data set, to see all of it work here."""
    from luthier.quickstart.tour import run as run_quickstart

    _finish(run_quickstart(output), quiet=False)


def _finish(result: Any, quiet: bool) -> None:
    if not quiet and os.environ.get("RANK", "0") == "0":
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in result.metrics.items() if isinstance(value, (int, float))
        )
        typer.echo(f"{result.output}  {numbers}".rstrip())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from luthier.recipe.schema import Recipe

    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    typer.echo(json.dumps(described, indent=2))


@app.command()
def env() -> None:
    """Print versions, hardware, and the optional libraries with the line that installs each."""
    from luthier.environment import report

    typer.echo(report())


@app.command()
def migrate(
    file: Annotated[Path, typer.Argument(help="A LLaMA-Factory YAML or JSON file.")],
) -> None:
    """Print a LLaMA-Factory file as a native recipe, saying where each value came from."""
    from luthier.recipe.load import dump_recipe, load_recipe
    from luthier.types import RecipeError

    loaded = load_recipe(file)
    if not loaded.llamafactory:
        raise RecipeError(f"{file}: this is a native recipe already (no model_name_or_path in it)")
    typer.echo(dump_recipe(loaded, everything=False), nl=False)


def main() -> None:
    """The console entry point."""
    sys.exit(app())


if __name__ == "__main__":
    main()
