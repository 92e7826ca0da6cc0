"""The command that talks to a model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from luthier.cli.app import USAGE_ERROR, app
from luthier.types import RecipeError

_Engine = Annotated[
    Literal["hf", "vllm"] | None,
    typer.Option(
        "--engine", help="hf, or vllm where it is installed (generation.engine).", show_default=False
    ),
]


def named_folders(words: list[str]) -> dict[str, str]:
    """NAME=FOLDER, each name once. Raises RecipeError."""
    named: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder or name in named:
            raise RecipeError(f"--adapter {word}: write NAME=FOLDER, each name once")
        named[name] = folder
    return named


@app.command()
def chat(
    target: Annotated[
        str,
        typer.Argument(
            help="A run, checkpoint, adapter, export or model (folder or hub name), a recipe, or embedded."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=VALUE, for example temperature=0.7 max_new_tokens=256.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="NAME=FOLDER of one more adapter on the same base; may be repeated.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Of a model that has none of its own.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="As cpu or cuda:1.", show_default=False)
    ] = None,
    engine: _Engine = None,
) -> None:
    """Talk to a model, with the template that it was trained with. /help in it lists the commands.

    Through pipes, each line is a turn, and the answers alone are on stdout; the exit status is 2 where one could not be
    answered.
    """
    from luthier.chat.verb import chat as run_chat

    every = run_chat(
        target,
        settings or [],
        adapters=named_folders(adapter or []),
        base=base,
        template=template,
        system=system,
        device=device,
        engine=engine,
    )
    if not every:
        raise typer.Exit(USAGE_ERROR)
