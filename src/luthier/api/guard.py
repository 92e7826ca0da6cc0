"""What stands before every request: who asks, how much is sent, and that a web page of another site cannot ask.

It reads the body itself, so that nothing larger than the bound is ever held.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from luthier.api.faults import ApiError
from luthier.api.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("luthier.api")
OPEN_PATHS = frozenset({"/health"})
"""What is told to everybody."""


class Guard:
    """An ASGI middleware. `key`: the bearer token, or None where none is asked for. `max_body`: bytes.

    hosts: names under which the server may be called, where no token is asked for: a page that had its own name
    resolve to this machine (DNS rebinding) calls it by that name. None: any.
    """

    def __init__(
        self,
        app: App,
        *,
        metrics: Metrics,
        paths: frozenset[str],
        key: str | None,
        max_body: int,
        hosts: frozenset[str] | None,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._key = None if key is None else key.encode()
        self._max_body, self._hosts = max_body, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            body = await self._admitted(scope, receive)
        except ApiError as error:
            await _refuse(error, noted)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), noted)
        finally:
            took = time.perf_counter() - began
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests[path, status] += 1
            self._metrics.seconds.observe(took)
            log.info("%s %s %d %.3fs", scope["method"][:10], path, status, took)

    async def _admitted(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the asker is gone. Raises ApiError for who may not ask."""
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        self._require_host(headers)
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            self._require_key(headers)
        length = headers.get("content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > self._max_body):
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                break
        if scope["method"] == "POST":
            kind = headers.get("content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                # A page of another site may send plain text without asking; JSON it may not.
                raise ApiError(415, "send JSON, with the header Content-Type: application/json")
        return bytes(body)

    def _require_host(self, headers: dict[str, bytes]) -> None:
        if self._hosts is None:
            return
        name = headers.get("host", b"").decode("latin-1").lower()
        bare = name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
        if bare not in self._hosts:
            raise ApiError(403, "this server is called by the name of this machine alone", code="wrong_host")

    def _require_key(self, headers: dict[str, bytes]) -> None:
        scheme, _, given = headers.get("authorization", b"").partition(b" ")
        # Both are compared in full: the time that it takes tells nothing of the key.
        right = hmac.compare_digest(given.strip(), self._key or b"")
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._max_body} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, then what comes after it: that the asker is gone."""
    read = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(error: ApiError, send: Send) -> None:
    content = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": content})
