"""Commands that tell what there is: templates, the schema, this machine, another tool's file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.app import app


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
