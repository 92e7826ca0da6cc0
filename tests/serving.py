"""A real server on a free port of this machine, in a thread, and ways to talk to it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any

from openai import OpenAI

from luthier.api.app import Endpoints, Limits, create_app
from luthier.api.scores import ScoredModel
from luthier.api.served import Served
from luthier.api.server import bound, make_server

TIMEOUT = 60.0


@dataclass(frozen=True)
class Running:
    """A server that answers. `stop` ends it as a signal would."""

    port: int
    ends: Endpoints
    server: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=TIMEOUT)

    def connection(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def send(
        self, path: str, body: Any = None, *, method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of one request; `body` may be bytes as they stand."""
        connection = self.connection()
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, content, names)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, json.loads(text) if "json" in found.get("content-type", "") else text

    def begin(self, body: dict[str, Any]) -> tuple[HTTPConnection, HTTPResponse]:
        """A stream of which the first line has been read."""
        connection = self.connection()
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        return connection, answer

    def until(self, running: int) -> None:
        """Wait until so many answers are outstanding."""
        end = time.monotonic() + TIMEOUT
        while self.ends.worker.outstanding != running:
            assert time.monotonic() < end, f"{self.ends.worker.outstanding} answers are still outstanding"
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True


def hang_up(connection: HTTPConnection, answer: HTTPResponse | None = None) -> None:
    """Close a connection as a client does that has died."""
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
    if answer is not None:
        answer.close()
    connection.close()


@contextmanager
def running(model: Served | ScoredModel, **limits: Any) -> Iterator[Running]:
    with bound("127.0.0.1", 0) as listener:
        app, ends = create_app(model, Limits(**limits))
        server = make_server(app, ends.worker.close)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield Running(listener.getsockname()[1], ends, server)
        finally:
            server.should_exit = True
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the server did not stop"
