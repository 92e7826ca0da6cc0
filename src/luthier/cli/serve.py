"""The command that serves a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.app import app
from luthier.cli.options import (
    AdapterOption,
    AnsweringArgument,
    BaseOption,
    DeviceOption,
    EngineOption,
    TemplateOption,
    named_folders,
)

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
_Name = Annotated[
    str | None,
    typer.Option("--name", help="Of the model in requests (the last part of TARGET).", show_default=False),
]
_Queue = Annotated[
    int, typer.Option("--max-queue", min=0, help="Answers that may wait; more get status 429.")
]
_MaxBody = Annotated[
    int | None,
    typer.Option(
        "--max-body",
        min=1,
        help="MiB of a request; larger ones get status 413 (4; 32 where the model takes images).",
        show_default=False,
    ),
]
_Rows = Annotated[
    int | None,
    typer.Option("--rows", min=1, help="The most answers under way (generation.rows).", show_default=False),
]


@app.command()
def serve(
    target: AnsweringArgument,
    settings: _Settings = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key: _ApiKey = None,
    adapter: AdapterOption = None,
    name: _Name = None,
    max_queue: _Queue = 128,
    max_body: _MaxBody = None,
    rows: _Rows = None,
    base: BaseOption = None,
    template: TemplateOption = None,
    device: DeviceOption = None,
    engine: EngineOption = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API: chat, completions, and scores of a reward model."""
    from luthier.environment import require

    for module in ("fastapi", "uvicorn"):
        require(module, "luthier serve")
    from luthier.api.server import serve as run_server

    run_server(
        target,
        settings or [],
        host=host,
        port=port,
        key=api_key,
        name=name,
        adapters=named_folders(adapter or []) or None,
        base=base,
        template=template,
        rows=rows,
        queue=max_queue,
        max_body=None if max_body is None else max_body * 2**20,
        device=device,
        engine=engine,
        say=typer.echo,
    )
