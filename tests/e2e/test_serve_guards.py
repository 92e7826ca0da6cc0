"""Who may ask, how much, and what becomes of a server when askers leave, lie, or the engine fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from luthier.api.served import Served
from luthier.api.server import is_loopback, load
from luthier.cli import app
from luthier.types import RecipeError
from tests.serving import Running, hang_up, running
from tests.tiny import chat_model

ASKED = [{"role": "user", "content": "Count to 7."}]
PATH = "/v1/chat/completions"
KEY = "a-key-of-this-test"
SHORT = {"model": "tiny", "messages": ASKED, "max_tokens": 4}
ENDLESS = {"model": "tiny", "messages": ASKED, "max_tokens": 100_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never stops by itself: the logit of its end token is 0, and others are larger."""
    folder = tmp_path_factory.mktemp("model")
    chat_model(folder, initializer_range=0.2, max_position_embeddings=2**20)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    torch.set_num_threads(1)
    model = load(folder, {"max_new_tokens": 4}, name="tiny", rows=1)
    assert isinstance(model, Served)
    return model


@pytest.fixture
def server(served: Served) -> Iterator[Running]:
    with running(served, queue=2) as found:
        yield found


@pytest.fixture(scope="module")
def standing(served: Served) -> Iterator[Running]:
    with running(served) as found:
        yield found


def answer_of(server: Running) -> str:
    status, _, answer = server.send(PATH, SHORT)
    assert status == 200, answer
    return str(answer["choices"][0]["message"]["content"])


# ---- keys, sizes, names


def test_a_wrong_token_is_refused_before_the_body_is_read(served: Served) -> None:
    with running(served, key=KEY) as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
        ):
            status, told, answer = server.send(PATH, b"not even JSON", **headers)
            assert status == 401 and told["www-authenticate"] == "Bearer"
            assert answer["error"]["code"] == "invalid_api_key"
        assert server.send("/metrics", method="GET")[0] == 401
        assert server.send("/openapi.json", method="GET")[0] == 401
        assert server.send("/health", method="GET")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert [model.id for model in server.client(KEY).models.list()] == ["tiny"]
        # Who has the key may call the server by any name.
        assert (
            server.send("/v1/models", method="GET", host="far.example", authorization=f"bearer {KEY}")[0]
            == 200
        )


def test_without_a_key_the_server_has_the_names_of_this_machine_alone(standing: Running) -> None:
    for name, expected in {
        "localhost:1": 200,
        "[::1]:80": 200,
        "far.example": 403,
        "localhost.far.example": 403,
    }.items():
        assert standing.send("/v1/models", method="GET", host=name)[0] == expected, name


def test_a_form_of_another_site_is_refused(standing: Running) -> None:
    status, _, answer = standing.send(PATH, json.dumps(SHORT).encode(), content_type="text/plain")
    assert status == 415 and "application/json" in answer["error"]["message"]


def test_a_large_request_is_refused(served: Served) -> None:
    with running(served, max_body=1000) as server:
        status, headers, answer = server.send(PATH, {**SHORT, "user": "x" * 2000})
        assert (
            status == 413
            and answer["error"]["code"] == "request_too_large"
            and headers["connection"] == "close"
        )
        connection = server.connection()  # the length is not told
        chunks = (b"x" * 400 for _ in range(5))
        connection.request("POST", PATH, chunks, {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert answer_of(server)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "")),
    ],
)
def test_what_loopback_is(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# ---- the queue


def test_a_full_queue_is_told_and_drains(server: Running, served: Served) -> None:
    streams = [server.begin({**ENDLESS, "stream": True}) for _ in range(3)]
    status, headers, answer = server.send(PATH, SHORT)
    assert status == 429 and headers["retry-after"] == "1" and answer["error"]["code"] == "queue_full"
    with pytest.raises(openai.RateLimitError):
        server.client().chat.completions.create(**SHORT)  # type: ignore[call-overload]
    page = server.send("/metrics", method="GET")[2].decode()
    assert "luthier_requests_running 1\n" in page and "luthier_requests_waiting 2\n" in page
    assert server.send(PATH, {**SHORT, "n": 4})[0] == 400
    for stream in streams:
        hang_up(*stream)
    server.until(0)
    assert answer_of(server)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_who_leaves_frees_the_place(server: Running, served: Served, stream: bool) -> None:
    if stream:
        hang_up(*server.begin({**ENDLESS, "stream": True}))
    else:
        connection = server.connection()
        connection.request("POST", PATH, json.dumps(ENDLESS), {"content-type": "application/json"})
        server.until(1)
        hang_up(connection)
    server.until(0)
    assert answer_of(server)
    assert not served.answerer.engine.busy


# ---- what goes wrong


def test_a_step_that_fails_fails_its_own_requests_alone(
    server: Running, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_of(server)
    model: Any = served.answerer.engine.model
    forward, calls = model.forward, 0

    def failing(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            time.sleep(0.5)  # until the other one waits
            raise RuntimeError("planted")
        return forward(*args, **given)

    # The engine has asked for the names of the arguments already, so only the values pass through here.
    monkeypatch.setattr(model, "forward", failing)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.send, PATH, ENDLESS)
        server.until(1)
        second = pool.submit(answer_of, server)
        status, _, answer = first.result()
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert "planted" not in answer["error"]["message"]
        assert second.result() == expected
    assert answer_of(server) == expected


def test_a_stream_whose_step_fails_says_so(
    server: Running, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = served.answerer.engine.model
    connection, answer = server.begin({**ENDLESS, "stream": True})

    def failing(*args: Any, **given: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(model, "forward", failing)
    events = answer.read().decode().split("\n\n")
    assert json.loads(events[-3].strip().removeprefix("data: "))["error"]["type"] == "server_error"
    assert events[-2:] == ["data: [DONE]", ""]
    connection.close()


def test_scores_that_are_no_numbers_are_the_servers_error(
    server: Running, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = served.answerer.engine.model
    forward = model.forward

    def not_numbers(*args: Any, **given: Any) -> Any:
        out = forward(*args, **given)
        out.logits = torch.full_like(out.logits, torch.nan)
        return out

    monkeypatch.setattr(model, "forward", not_numbers)
    status, _, answer = server.send(PATH, SHORT)
    assert status == 500 and "no numbers" in answer["error"]["message"]
    monkeypatch.undo()
    assert answer_of(server)


def test_a_shutdown_ends_streams_and_answers(served: Served) -> None:
    with running(served, queue=4) as server, ThreadPoolExecutor(1) as pool:
        connection, answer = server.begin({**ENDLESS, "stream": True})
        plain = pool.submit(server.send, PATH, ENDLESS)
        server.until(2)
        server.stop()
        events = answer.read().decode().split("\n\n")
        assert json.loads(events[-3].strip().removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert events[-2] == "data: [DONE]"
        assert plain.result()[0] == 503
        connection.close()
    assert not served.answerer.engine.busy


# ---- anything at all


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value."""


def of_schema(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Mostly what our own OpenAPI document describes, sometimes anything."""
    fitting = _fitting(schema, parts)
    return st.integers(0, 7).flatmap(lambda number: fitting if number else ANYTHING)


def _fitting(schema: dict[str, Any], parts: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        return _fitting(parts[schema["$ref"].rpartition("/")[2]], parts)
    for choices in ("anyOf", "oneOf"):
        if choices in schema:
            return st.one_of([_fitting(choice, parts) for choice in schema[choices]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        needed = set(schema.get("required", ()))
        inner = {name: of_schema(part, parts) for name, part in schema["properties"].items()}
        return st.fixed_dictionaries(
            {name: part for name, part in inner.items() if name in needed},
            optional={name: part for name, part in inner.items() if name not in needed},
        )
    if kind == "array":
        return st.lists(of_schema(schema["items"], parts), max_size=3)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=12),
        "integer": st.integers(-3, 40),
        "number": st.floats(-1, 3),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return simple.get(kind, ANYTHING)


def test_nothing_that_is_sent_stops_the_server(served: Served, standing: Running) -> None:
    document = standing.send("/openapi.json", method="GET")[2]
    parts = document["components"]["schemas"]
    posts = [path for path, methods in document["paths"].items() if "post" in methods]
    assert sorted(posts) == [PATH, "/v1/completions", "/v1/score"]
    bodies = {
        path: of_schema(
            document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"], parts
        )
        for path in posts
    }
    seen: set[int] = set()

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def anything(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(posts))
        body = data.draw(bodies[path])
        if isinstance(body, dict):
            body = {**body, "model": data.draw(st.sampled_from(["tiny", "tiny", "tiny", "other", 1]))}
            if path != "/v1/score":
                body.pop("max_completion_tokens", None)  # answers of any length would only take time
                body["max_tokens"] = data.draw(st.sampled_from([1, 2, 0, None, "x"]))
        text = json.dumps(body).encode()
        if data.draw(st.integers(0, 9)) == 0:
            text = text[: data.draw(st.integers(0, len(text)))] + data.draw(st.binary(max_size=6))
        status, _, answer = standing.send(path, text)
        seen.add(status)
        assert status in (200, 400, 404), (status, text, answer)
        if status != 200:
            assert set(answer["error"]) == {"message", "type", "param", "code"}

    anything()
    assert 400 in seen
    assert standing.ends.worker.outstanding == 0
    assert answer_of(standing)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": ' * 5000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "half", "list", "null", "bytes", "deep list", "deep object", "long number"],
)
def test_what_is_not_json_is_refused(standing: Running, body: bytes) -> None:
    status, _, answer = standing.send(PATH, body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_a_deep_value_in_a_field_is_refused(standing: Running) -> None:
    deep = b'{"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "metadata": '
    for depth in (200, 900, 20_000):
        status, _, answer = standing.send(PATH, deep + b"[" * depth + b"]" * depth + b"}")
        assert status in (200, 400), answer
    assert answer_of(standing)


# ---- the command


def test_the_command_serves_until_a_signal(folder: Path, tmp_path: Path) -> None:
    """On every address a key is made and shown once; the log has neither it nor what was asked."""
    environment = {name: value for name, value in os.environ.items() if name != "LUTHIER_API_KEY"}
    words = ["serve", str(folder), "max_new_tokens=3", "--host", "0.0.0.0", "--port", "0", "--name", "tiny"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "luthier.cli", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
    assert process.stdout is not None
    try:
        key = process.stdout.readline().rpartition(" ")[2].strip()
        said = process.stdout.readline()
        port = int(re.findall(r":(\d+)/v1$", said.strip())[0])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a secret plan"}]
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        rest = process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()
    written = (tmp_path / "log").read_text()
    assert len(key) > 30 and key not in rest + written
    assert f"POST {PATH} 200" in written and "GET /v1/models 401" in written
    assert "secret" not in written


def test_an_address_that_is_taken_and_a_key_without_letters_are_refused(
    folder: Path, standing: Running
) -> None:
    from luthier.api.server import serve

    with pytest.raises(RecipeError, match=f"port {standing.port}: .*in use"):
        serve(folder, port=standing.port)
    with pytest.raises(RecipeError, match="--api-key"):
        serve(folder, key="")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_libraries_the_command_says_how_to_get_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    done = CliRunner().invoke(app, ["serve", str(folder)])
    assert done.exit_code == 2
    assert f"luthier serve needs the package {missing}" in done.stderr
    assert "pip install 'luthier[api]'" in done.stderr
