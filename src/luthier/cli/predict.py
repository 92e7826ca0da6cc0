"""The command that answers the rows of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import app
from luthier.cli.options import BaseOption


@app.command()
def predict(
    target: Annotated[
        str,
        typer.Argument(help="A run, checkpoint, adapter or model (folder or name), or a recipe."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE, for example generation.temperature=0.7.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A name in dataset_info.json or a file; may be repeated (data.eval).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder (TARGET/predictions).", show_default=False),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", help="Other predictions of these rows, or their run.", show_default=False),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option("--max-samples", min=1, help="The first rows of each data set.", show_default=False),
    ] = None,
    base: BaseOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other predictions that are in the way.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Answer the rows of a data set with TARGET, and measure the answers: BLEU, ROUGE, chrF, exact matches.

    Stopped and started again, it goes on: rows that are answered are not answered again.
    """
    from luthier.predict_verb import predict as run_predict

    result = run_predict(
        target,
        overrides or [],
        data=data or [],
        output=output,
        compare=compare,
        max_samples=max_samples,
        base=base,
        overwrite=overwrite,
        quiet=as_json,
    )
    if as_json:
        typer.echo(result.json())
