"""The verb serve: load what is asked for, bind an address, answer until a signal comes."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import uvicorn

from luthier.answering import open_model, parts_of
from luthier.api.app import LOOPBACK_NAMES, MEDIA_BODY, TEXT_BODY, Limits, create_app
from luthier.api.scores import ScoredModel
from luthier.api.served import Served
from luthier.recipe.settings import read_settings
from luthier.rewards.scorer import Scorer
from luthier.show import quiet_libraries
from luthier.types import RecipeError

_GRACE = 10
"""Seconds that connections get to close."""
_CONNECTIONS = 1024


def serve(
    target: str | Path,
    settings: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    base: str | None = None,
    template: str | None = None,
    rows: int | None = None,
    queue: int = 128,
    max_body: int | None = None,
    device: str | None = None,
    engine: Literal["hf", "vllm"] | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Serve what `target` names (see `open_model`) until SIGINT or SIGTERM.

    settings: words like `temperature=0.7`, for requests that do not say it. port: 0 for any that is free. key: the
    bearer token; on another address than loopback one is made, and shown once, where none is given. name: of the
    model in requests; the last part of `target` where absent. rows: the most answers under way, queue: that wait.
    max_body: bytes of a request; absent: 4 MiB, and 32 MiB of a model that takes images.
    Raises RecipeError for an address that cannot be had, and what `open_model` raises.
    """
    quiet_libraries()
    require_key(key)
    said = read_settings(settings)
    with bound(host, port) as listener:
        if key is None and not is_loopback(host):
            key = secrets.token_urlsafe(32)
            say(f"API key (made now, shown only here): {key}")
        model = load(
            target,
            said,
            name=name,
            adapters=adapters,
            base=base,
            template=template,
            rows=rows,
            device=device,
            engine=engine,
            say=say,
        )
        hosts = LOOPBACK_NAMES | {host.lower(), f"[{host.lower()}]"}
        takes_media = isinstance(model, Served) and model.takes_media
        limits = Limits(key, hosts, queue, max_body or (MEDIA_BODY if takes_media else TEXT_BODY))
        app, ends = create_app(model, limits)
        server = make_server(app, ends.worker.close)
        _log_to_stderr()
        say(f"serving {', '.join(model.names)} at {url(listener)}")
        # uvicorn raises a signal again once it has shut down; by then it has done what was asked.
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def load(
    target: str | Path,
    said: Mapping[str, Any],
    *,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    base: str | None = None,
    template: str | None = None,
    rows: int | None = None,
    device: str | None = None,
    engine: Literal["hf", "vllm"] | None = None,
    say: Callable[[str], object] = print,
) -> Served | ScoredModel:
    """The model behind the server. said: settings before those of the recipe. Raises what `open_model` raises."""
    called = name or Path(str(target)).expanduser().resolve().name
    if parts_of(target, base).kind == "reward":
        given = {
            "--adapter": adapters,
            "--template": template,
            "--rows": rows,
            "--engine": engine,
            "a setting": said,
        }
        wrong = [option for option, value in given.items() if value]
        if wrong:
            raise RecipeError(f"{wrong[0]}: {target} is a reward model, which scores and answers nothing")
        return ScoredModel(called, Scorer(target, base, None))
    answerer = open_model(
        target,
        adapters=adapters,
        base=base,
        template=template,
        rows=rows,
        device=device,
        engine=engine,
        say=say,
    )
    answerer = replace(answerer, spec=answerer.spec.model_copy(update=dict(said)))
    if (answerer.settings().num_beams) > 1:
        say("note: beams are not searched while serving; every answer is drawn or greedy")
    served = Served(called, answerer)
    _ = served.names, served.decode  # a taken name, and a template that cannot be asked, are found now
    return served


class _Server(uvicorn.Server):  # type: ignore[misc]
    """uvicorn, but what is under way is ended before it waits for connections to close."""

    def __init__(self, config: Any, closing: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._closing()
        await super().shutdown(sockets)


def make_server(app: Any, closing: Callable[[], Awaitable[None]]) -> _Server:
    """The server of an application; `closing` ends its answers."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
    )
    return _Server(config, closing)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key(key: str | None) -> None:
    """Raise RecipeError for a key that no header can carry."""
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise RecipeError("--api-key: expected letters, digits and signs of ASCII without spaces")


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, not yet listening. Raises RecipeError where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise RecipeError(f"--host {host}: {error.strerror or error}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RecipeError(
            f"{host}, port {port}: {error.strerror or error}; choose another --host or --port"
        ) from error
    return listener


def url(listener: socket.socket) -> str:
    """Where the API is."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def _log_to_stderr() -> None:
    """One line for each request: path, status and time, never what was asked or answered, nor a key."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("luthier.api")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False
