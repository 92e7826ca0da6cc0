"""Commands that train, or look at what training would do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.app import CLAIM_FAILS, USAGE_ERROR, app
from luthier.cli.options import (
    AccelerateOption,
    NodesOption,
    OverridesArgument,
    ProcessesOption,
    RecipeArgument,
    accelerate_words,
    parallel_words,
)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    processes: ProcessesOption = None,
    nodes: NodesOption = None,
    accelerate: AccelerateOption = None,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            "--rendezvous", metavar="HOST:PORT", help="Where the machines meet.", show_default=False
        ),
    ] = None,
    run_id: Annotated[
        str | None,
        typer.Option(
            "--run-id",
            metavar="NAME",
            help="Of this launch, the same on all machines; started again under it, the run goes on.",
            show_default=False,
        ),
    ] = None,
    master: Annotated[
        str | None,
        typer.Option(
            "--master",
            metavar="HOST:PORT",
            help="Machine 0, instead of --rendezvous; without restarts.",
            show_default=False,
        ),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option("--node-rank", metavar="N", help="This machine, with --master.", show_default=False),
    ] = None,
) -> None:
    """Train what RECIPE describes, on all visible GPUs."""
    from luthier.launch.placement import Meeting
    from luthier.launch.verb import train as run_train

    words = [*accelerate_words(accelerate), *(overrides or []), *parallel_words(processes, nodes)]
    meeting = Meeting(rendezvous, run_id, master, node_rank)
    _finish(run_train(recipe, words, quiet=quiet, meeting=meeting), quiet)


@app.command()
def selfcheck(
    recipe: RecipeArgument,
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
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    accelerate: AccelerateOption = None,
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
        [*accelerate_words(accelerate), *(overrides or [])],
        samples=samples,
        everything=everything,
        probe=probe,
        as_json=as_json,
        html=html,
    ):
        raise typer.Exit(USAGE_ERROR)


@app.command()
def prepare(
    recipe: RecipeArgument,
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
    if not quiet and result.metrics and os.environ.get("RANK", "0") == "0":
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in result.metrics.items() if isinstance(value, (int, float))
        )
        typer.echo(f"{result.output}  {numbers}".rstrip())
