"""The command that serves a model over HTTP."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from luthier.cli.app import app

_Target = Annotated[
    str,
    typer.Argument(
        help="A run, checkpoint, adapter, export or model (folder or hub name), a recipe, or embedded."
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="NAME=VALUE for requests that do not say it, as temperature=0.7.", show_default=False
    ),
]
_Host = Annotated[str, typer.Option("--host", help="Address; on another than loopback a key is asked for.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LUTHIER_API_KEY",
        show_envvar=True,
        help="The bearer token that requests must carry.",
        show_default=False,
    ),
]
_Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=FOLDER of one more adapter on the same base; may be repeated.",
        show_default=False,
    ),
]
_Name = Annotated[
    str | None,
    typer.Option("--name", help="Of the model in requests (the last part of TARGET).", show_default=False),
]
_Queue = Annotated[
    int, typer.Option("--max-queue", min=0, help="Answers that may wait; more get status 429.")
]
_Rows = Annotated[
    int | None,
    typer.Option("--rows", min=1, help="The most answers under way (generation.rows).", show_default=False),
]
_Base = Annotated[
    str | None,
    typer.Option("--base", help="The model below the adapter, where it moved.", show_default=False),
]
_Template = Annotated[
    str | None,
    typer.Option("--template", help="Of a model that has none of its own.", show_default=False),
]
_Engine = Annotated[
    Literal["hf", "vllm"] | None,
    typer.Option(
        "--engine", help="hf, or vllm where it is installed (generation.engine).", show_default=False
    ),
]
_Device = Annotated[str | None, typer.Option("--device", help="As cpu or cuda:1.", show_default=False)]


@app.command()
def serve(
    target: _Target,
    settings: _Settings = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key: _ApiKey = None,
    adapter: _Adapters = None,
    name: _Name = None,
    max_queue: _Queue = 128,
    rows: _Rows = None,
    base: _Base = None,
    template: _Template = None,
    device: _Device = None,
    engine: _Engine = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API: chat, completions, and scores of a reward model."""
    from luthier.environment import require

    for module in ("fastapi", "uvicorn"):
        require(module, "luthier serve")
    from luthier.api.server import serve as run_server
    from luthier.types import RecipeError

    named: dict[str, str] = {}
    for word in adapter or []:
        given, equals, folder = word.partition("=")
        if not equals or not folder or given in named:
            raise RecipeError(f"--adapter {word}: write NAME=FOLDER, each name once")
        named[given] = folder
    run_server(
        target,
        settings or [],
        host=host,
        port=port,
        key=api_key,
        name=name,
        adapters=named or None,
        base=base,
        template=template,
        rows=rows,
        queue=max_queue,
        device=device,
        engine=engine,
        say=typer.echo,
    )
