"""Commands about trained models and their runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.app import CLAIM_FAILS, app
from luthier.cli.options import BaseOption


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
    base: BaseOption = None,
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
    base: BaseOption = None,
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
