"""Rewards of a service, asked of a real server on this machine, in health and in each of its faults."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from luthier.conversations import Conversation, Message, ToolCall
from luthier.experience import Completion, Prompt, RewardError
from luthier.recipe.online import HttpRewardSpec
from luthier.rewards import build_rewards
from luthier.rewards.service import Service
from luthier.types import RecipeError
from tests.completions import answers, completion, prompt

Reply = Callable[["Server", BaseHTTPRequestHandler], None]


class Server:
    """Answers each request as the next of its replies says, the last one for ever; keeps what it was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.replies, self.asked, self.headers = replies, [], []  # type: ignore[var-annotated]
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(json.loads(body))
                outer.headers.append(dict(self.headers))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    outer.replies[min(len(outer.asked), len(outer.replies)) - 1](outer, self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def says(tree: Any, status: int = 200, **headers: str) -> Reply:
    """A reply with a JSON body, or with these bytes."""
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()

    def reply(server: Server, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def silent(server: Server, handler: BaseHTTPRequestHandler) -> None:
    server.released.wait(10)


def dripping(server: Server, handler: BaseHTTPRequestHandler) -> None:
    """Never silent for long, and never at its end."""
    handler.send_response(200)
    handler.end_headers()
    while not server.released.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def hangs_up(server: Server, handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_short(server: Server, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1')


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[Server] = []

    def start(*replies: Reply) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def decode(ids: Any) -> str:
    return "".join(f"<{number}>" for number in ids)


def service(url: str, waits: list[float] | None = None, **changes: Any) -> Service:
    wait = (waits if waits is not None else []).append
    return Service(HttpRewardSpec(url=url, **changes), "http", "stage.rewards.0", decode, wait)


def test_conversations_are_sent_and_scores_come_back(serve: Callable[..., Server]) -> None:
    server = serve(says({"scores": [1, -0.5]}))
    before = Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "Größe?"),
            Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}),)),
            Message("tool", "7"),
        )
    )
    asked = Prompt("sums", 0, (1, 2), before)
    rewards = build_rewards(
        [HttpRewardSpec(url=server.url, model="judge", headers={"X-Who": "me"})], decode=decode
    )
    found = rewards([completion("a", asked), completion("b", prompt("Why?"))])
    np.testing.assert_array_equal(found, np.float32([[1], [-0.5]]))
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert server.asked == [
        {
            "model": "judge",
            "messages": [
                [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Größe?"},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": "7"},
                    {"role": "assistant", "content": "a"},
                ],
                [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "b"}],
            ],
        }
    ]
    assert server.headers[0]["X-Who"] == "me" and server.headers[0]["Content-Type"] == "application/json"
    assert rewards([]).shape == (0, 1) and len(server.asked) == 1


def test_text_is_what_llamafactory_sends(serve: Callable[..., Server]) -> None:
    """`messages` are then strings: the tokens of prompt and answer, special tokens among them."""
    server = serve(says({"scores": [2.0]}))
    one = Completion(
        Prompt("sums", 0, (5, 6), Conversation((Message("user", "Hi"),))),
        np.array([7, 2], np.int32),
        np.zeros(2, np.float32),
        "x",
        "stop",
    )
    assert service(server.url, form="text")([one]) == [2.0]
    assert server.asked == [{"model": "model", "messages": ["<5><6><7><2>"]}]


def test_headers_may_name_the_environment(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(says({"scores": [1]}))
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    service(server.url, headers={"Authorization": "Bearer ${JUDGE_TOKEN}"})(answers(["a"]))
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(
        RecipeError,
        match=r"stage\.rewards\.0\.headers\.Authorization: the environment has no variable JUDGE_TOKEN",
    ):
        service(server.url, headers={"Authorization": "Bearer ${JUDGE_TOKEN}"})


@pytest.mark.parametrize("url", ["127.0.0.1:80", "file:///etc/passwd", "ftp://a/b", "http:///x"])
def test_only_http(url: str) -> None:
    with pytest.raises(ValidationError, match="write the whole address"):
        HttpRewardSpec(url=url)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (says(b"<html>busy</html>"), "it answered no JSON: '<html>busy</html>'"),
        (says(b""), "it answered no JSON: ''"),
        (says({"score": [1, 2]}), 'it answered no {"scores": [number, ...]} but \'{"score": [1, 2]}\''),
        (says([1, 2]), "it answered no {"),
        (says({"scores": 1.0}), "it answered no {"),
        (says({"scores": [1.0]}), "it answered 1 scores for 2 answers; asked of sums, row 0 and 1 more"),
        (says({"scores": [1, 2, 3]}), "it answered 3 scores for 2 answers"),
        (says({"scores": [1, [2]]}), "sums, row 1: http"),
        (says({"scores": [1, [2]]}), "answered the score [2], no number"),
        (says({"scores": ["1", 2]}), "answered the score '1', no number"),
        (says({"scores": [True, 2]}), "answered the score True, no number"),
        (says({"scores": [1, None]}), "answered the score None, no number"),
        (says({"detail": "no model judge"}, 404), 'it answered 404 Not Found: {"detail": "no model judge"}'),
        (says(b"x" * 5000, 422), "x" * 200 + " ..."),
        (says(b"", 302, Location="http://127.0.0.1:9/"), "it has moved to http://127.0.0.1:9/, name that"),
    ],
)
def test_a_wrong_answer_is_no_score_and_is_not_asked_for_again(
    serve: Callable[..., Server], reply: Reply, words: str
) -> None:
    server, waits = serve(reply), []  # type: ignore[var-annotated]
    with pytest.raises(RewardError, match=re.escape(words)) as raised:
        service(server.url, waits)(answers(["a", "b"]))
    assert "reward http: " in str(raised.value) and server.url in str(raised.value)
    assert "sums, row" in str(raised.value)
    assert len(server.asked) == 1 and waits == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400", "1e39"])
def test_a_number_that_is_none_names_its_row(serve: Callable[..., Server], number: str) -> None:
    server = serve(says(f'{{"scores": [1.0, {number}]}}'.encode()))
    rewards = build_rewards([HttpRewardSpec(url=server.url)], decode=decode)
    with pytest.raises(
        RewardError, match=r"reward http: sums, row 1: it returned .*, which is no finite float32"
    ):
        rewards(answers(["a", "b"]))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(serve: Callable[..., Server], status: int) -> None:
    server, waits = serve(says({"error": "busy"}, status), says({}, status), says({"scores": [3.0]})), []  # type: ignore[var-annotated]
    assert service(server.url, waits)(answers(["a"])) == [3.0]
    assert waits == [0.5, 1.0] and len(server.asked) == 3 and server.asked[0] == server.asked[2]


def test_it_is_given_up(serve: Callable[..., Server]) -> None:
    server, waits = serve(says({"error": "busy"}, 503)), []  # type: ignore[var-annotated]
    with pytest.raises(
        RewardError, match=re.escape('it answered 503 Service Unavailable: {"error": "busy"} (tried 7 times)')
    ):
        service(server.url, waits, retries=6)(answers(["a"]))
    assert waits == [0.5, 1, 2, 4, 8, 8] and len(server.asked) == 7
    with pytest.raises(RewardError, match="tried once"):
        service(server.url, retries=0)(answers(["a"]))


def test_retry_after_is_kept_to(serve: Callable[..., Server]) -> None:
    server, waits = (
        serve(
            says({}, 429, Retry_After="3"),
            says({}, 429, Retry_After="9999"),
            says({}, 503, Retry_After="Fri, 1 Jan 2027"),
            says({"scores": [1]}),
        ),
        [],
    )  # type: ignore[var-annotated]
    assert service(server.url, waits)(answers(["a"])) == [1]
    assert waits == [3.0, 60.0, 2.0]


@pytest.mark.parametrize("reply", [hangs_up, cut_short])
def test_a_connection_that_breaks_is_tried_again(serve: Callable[..., Server], reply: Reply) -> None:
    server, waits = serve(reply, says({"scores": [1]})), []  # type: ignore[var-annotated]
    assert service(server.url, waits)(answers(["a"])) == [1] and waits == [0.5]
    broken = serve(reply)
    with pytest.raises(
        RewardError, match=r"(the connection broke|no connection): .* \(tried 2 times\); asked of sums, row 0"
    ):
        service(broken.url, retries=1)(answers(["a"]))


def test_a_service_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        waits: list[float] = []
        with pytest.raises(
            RewardError, match=r"no connection: .*refused.* \(tried 3 times\); asked of sums, row 0"
        ):
            service(url, waits, retries=2)(answers(["a"]))
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize("reply", [silent, dripping])
def test_a_service_that_is_too_slow(serve: Callable[..., Server], reply: Reply) -> None:
    server = serve(reply)
    begun = time.monotonic()
    with pytest.raises(
        RewardError, match=r"no answer within 0\.3 seconds \(tried 2 times\); asked of sums, row 0 and 2 more"
    ):
        service(server.url, timeout=0.3, retries=1)(answers(["a", "b", "c"]))
    assert time.monotonic() - begun < 5 and len(server.asked) == 2


def test_an_answer_without_end(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.rewards.service._MOST_BYTES", 1000)
    server = serve(says(b"[" + b"1," * 1000))
    with pytest.raises(RewardError, match="its answer is longer than 1,000 bytes"):
        service(server.url)(answers(["a"]))
    assert len(server.asked) == 1
