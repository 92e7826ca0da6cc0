"""The command that talks to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.app import USAGE_ERROR, app
from luthier.cli.options import (
    AdapterOption,
    AnsweringArgument,
    BaseOption,
    DeviceOption,
    EngineOption,
    TemplateOption,
    named_folders,
)


@app.command()
def chat(
    target: AnsweringArgument,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=VALUE, for example temperature=0.7 max_new_tokens=256.", show_default=False
        ),
    ] = None,
    adapter: AdapterOption = None,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message.", show_default=False)
    ] = None,
    base: BaseOption = None,
    template: TemplateOption = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
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
