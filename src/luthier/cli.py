"""The `luthier` command. Every command imports what it needs when it runs, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from luthier import __version__
from luthier.types import LuthierError, RunInterrupted

USAGE_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended
CLAIM_FAILS = 1
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
def selfcheck(
    recipe: Annotated[Path, typer.Argument(help="A Luthier or LLaMA-Factory recipe (YAML or JSON).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE, for example data.max_samples=50.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Run this check alone; may be repeated.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Prove the fast paths on RECIPE's own model and data: packed = padded, resumed = straight and the others.

    The exit status is 1 where a claim does not hold.
    """
    import json

    from luthier.selfcheck.outcome import table
    from luthier.selfcheck.verb import selfcheck as run_selfcheck

    result = run_selfcheck(recipe, overrides or [], only=only or [], quiet=as_json)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else "\n" + table(result.outcomes))
    if not result.holds:
        raise typer.Exit(CLAIM_FAILS)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A Luthier or LLaMA-Factory recipe (YAML or JSON).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="KEY=VALUE, for example train.epochs=2.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Samples to show token by token.")] = 3,
    everything: Annotated[
        bool, typer.Option("--all", help="Show the recipe's defaults too, not only what was given.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure a few optimizer steps, for the time.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page with plots to FILE.", metavar="FILE", show_default=False),
    ] = None,
) -> None:
    """Say what RECIPE would do, without training: data, samples, parameters, memory, time, and every refusal.

    The exit status is 2 where `train` would refuse.
    """
    from luthier.check.command import run as run_check

    if not run_check(
        recipe,
        overrides or [],
        samples=samples,
        everything=everything,
        probe=probe,
        as_json=as_json,
        html=html,
    ):
        raise typer.Exit(USAGE_ERROR)


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
def templates(
    name: Annotated[
        str | None, typer.Argument(help="A template's name or a .jinja file.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="A folder or hub name (embedded).", show_default=False),
    ] = None,
) -> None:
    """List the named chat templates, or show NAME at work: a conversation, and what is learnt of it."""
    from luthier.show import speaker
    from luthier.templates import listing, shown

    if name is None:
        typer.echo(listing())
    else:
        speaker(quiet=False)(shown(name, tokenizer))


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="Folder of a reward model, a reward adapter or its run.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Rows with answers, or with chosen and rejected (JSON, CSV, Parquet).", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Score one answer to this.", show_default=False)
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The answer.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the scores to a .jsonl file.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is in the way.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Longest row in tokens (that of the run).", show_default=False
        ),
    ] = None,
) -> None:
    """Say what a reward model thinks of answers: one JSON line for each row, then a summary (on stderr)."""
    import json

    from luthier.score import score_file, score_text
    from luthier.types import RecipeError

    if (file is None) == (text is None) or (prompt is None) != (text is None):
        raise RecipeError("give a FILE with rows, or --prompt and --text")
    how: dict[str, Any] = {"base": base, "max_length": max_length}
    if file is not None:
        scores = score_file(model, file, output=output, overwrite=overwrite, **how)
    else:
        scores = score_text(model, prompt or "", text or "", **how)
    if output is None:
        typer.echo(scores.lines(), nl=False)
    if file is not None:
        typer.echo(json.dumps(scores.summary()), err=True)


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(help="A run, checkpoint, adapter or model (folder), or a recipe (YAML or JSON)."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the model (export.output).", show_default=False),
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the weights.", show_default=False)] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="As 5GB.", show_default=False)
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", help="One more adapter on top; may be repeated.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="Upload what passed to OWNER/NAME.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an exported model that is in the way.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge what was trained into one plain model, read it back, and prove that it is the trained one.

    The exit status is 1 where it is not; the folder is then marked with EXPORT_FAILED.
    """
    from luthier.export_verb import export as run_export

    result = run_export(
        source,
        output=output,
        dtype=dtype,
        shard_size=shard_size,
        adapters=adapters or [],
        base=base,
        push_to_hub=push_to_hub,
        overwrite=overwrite,
        quiet=as_json,
    )
    typer.echo(result.json() if as_json else result.text())
    if not result.passed:
        typer.echo(f"error: {result.output} is not the model that was trained; it is marked so", err=True)
        raise typer.Exit(CLAIM_FAILS)


class PlotAxis(StrEnum):
    steps = "steps"
    tokens = "tokens"
    time = "time"


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", show_default=False)],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help="Any name in the logs; may be repeated.", show_default=False),
    ] = None,
    x: Annotated[PlotAxis, typer.Option("--x", help="What the horizontal axis counts.")] = PlotAxis.steps,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png, .svg or .pdf file (runs.png).", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is in the way.")
    ] = False,
) -> None:
    """Draw the curves of RUNS in one picture; those of one run, without options, in its folder."""
    from luthier.trainer.compare_plots import plot_runs

    for file in plot_runs(runs, metrics=metric or [], axis=x.value, output=output, overwrite=overwrite):
        typer.echo(str(file))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file (YAML or JSON): recipe, search, space.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the trials and run none.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Train a recipe with many values and find the best; started again, it goes on."""
    from luthier.sweep import run

    if dry_run:
        typer.echo(run.dry_run(file))
    else:
        run.sweep(file, quiet=quiet)


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
def schema(
    sweep: Annotated[bool, typer.Option("--sweep", help="That of a sweep file instead.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from luthier.recipe.schema import Recipe
    from luthier.recipe.sweep import SweepSpec

    kind = SweepSpec if sweep else Recipe
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
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

    loaded = load_recipe(file, to_export=True)
    if not loaded.llamafactory:
        raise RecipeError(f"{file}: this is a native recipe already (no model_name_or_path in it)")
    typer.echo(dump_recipe(loaded, everything=False), nl=False)


def main() -> None:
    """The console entry point."""
    sys.exit(app())


if __name__ == "__main__":
    main()
