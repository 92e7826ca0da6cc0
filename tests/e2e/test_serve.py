"""The OpenAI client against a real server: what it answers is what the engine answers, and what it is asked wrongly it
refuses by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from luthier.api.fields import ChatRequest
from luthier.api.served import Served
from luthier.api.server import load
from luthier.types import Conversation, Message, Request
from tests.serving import Running, running
from tests.tiny import chat_model

ASKED: list[Any] = [{"role": "user", "content": "Count to 7."}]
LONG = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), initializer_range=0.2, max_position_embeddings=LONG)


@pytest.fixture(scope="module")
def served(folder: Path) -> Served:
    torch.set_num_threads(1)
    model = load(folder, {"max_new_tokens": 24}, name="tiny", rows=4)
    assert isinstance(model, Served)
    return model


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Running]:
    with running(served) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return server.client()


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASKED, **fields})


def streamed(client: OpenAI, **fields: Any) -> tuple[dict[int, str], list[Any]]:
    """The text of every choice, put together, and all chunks."""
    chunks = list(chat(client, stream=True, **fields))
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return texts, chunks


def direct(served: Served, **call: Any) -> str:
    """The same answer without a server."""
    conversation = Conversation((Message("user", ASKED[0]["content"]),))
    request = served.answerer.request(conversation, **call)
    (end,) = served.answerer.engine.generate([request.prompt], request.settings)
    return served.answerer.text(end)


# ---- answers


def test_an_answer_is_the_engines_own(client: OpenAI, served: Served) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.content == direct(served)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    prompt = served.answerer.request(Conversation((Message("user", ASKED[0]["content"]),))).prompt
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), 24)
    assert usage.total_tokens == len(prompt) + 24
    assert answer.object == "chat.completion" and answer.model == "tiny"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 1},
        {"stop": ["a", "1"]},
        {"logprobs": True, "top_logprobs": 2},
    ],
    ids=["greedy", "several", "stop", "logprobs"],
)
def test_a_stream_adds_up_to_the_plain_answer(client: OpenAI, fields: dict[str, Any]) -> None:
    plain = chat(client, **fields)
    texts, chunks = streamed(client, stream_options={"include_usage": True}, **fields)
    assert texts == {choice.index: choice.message.content for choice in plain.choices}
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {choice.index: choice.finish_reason for choice in plain.choices}
    told = [
        entry.model_dump()
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    expected = plain.choices[0].logprobs
    assert told == ([entry.model_dump() for entry in expected.content] if expected else [])


def test_several_answers_are_those_of_following_seeds(client: OpenAI) -> None:
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95}
    together = [choice.message.content for choice in chat(client, n=3, seed=5, **drawn).choices]
    alone = [chat(client, seed=5 + k, **drawn).choices[0].message.content for k in range(3)]
    assert together == alone and len(set(together)) == 3


def test_settings_reach_the_engine(client: OpenAI, served: Served) -> None:
    greedy = direct(served)
    for extension in ({"top_k": 1}, {"min_p": 1.0}):
        drawn = chat(client, temperature=1.5, extra_body=extension).choices[0].message.content
        assert drawn == greedy, extension
    for setting in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"temperature": 0.7, "seed": 3, "top_p": 0.9},
    ):
        assert chat(client, **setting).choices[0].message.content == direct(served, **setting) != greedy
    repeated = chat(client, extra_body={"repetition_penalty": 3.0}).choices[0].message.content
    assert repeated == direct(served, repetition_penalty=3.0) != greedy
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{name: 5})
        assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    stop = whole[6:8]
    choice = chat(client, stop=stop).choices[0]
    assert choice.message.content == whole[: whole.index(stop)] and choice.finish_reason == "stop"


def test_logprobs_are_the_models_own(client: OpenAI, served: Served, folder: Path) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    conversation = Conversation((Message("user", ASKED[0]["content"]),))
    request = served.answerer.request(conversation, max_new_tokens=8)
    (end,) = served.answerer.engine.generate([request.prompt], request.settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.prompt, *end.ids]])).logits[0, len(request.prompt) - 1 : -1]
    logprobs = logits.log_softmax(-1)
    assert len(choice.logprobs.content) == 8
    for entry, token, row in zip(choice.logprobs.content, end.ids, logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        top = row.topk(3).values.tolist()
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(top, abs=1e-4)
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert spelled.decode("utf-8", "replace") == served.answerer.template.decode(end.ids)


def test_completions_continue_texts_and_token_ids(client: OpenAI, served: Served) -> None:
    template = served.answerer.template
    answer = client.completions.create(model="tiny", prompt=["One, two", "Red, "], max_tokens=6, logprobs=1)
    settings = served.answerer.settings(max_new_tokens=6)
    prompts = [template.text("One, two"), template.text("Red, ")]
    ends = served.answerer.engine.generate(prompts, settings)
    assert [choice.text for choice in answer.choices] == [served.answerer.text(end) for end in ends]
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, prompts))
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and len(found.token_logprobs) == 6
    by_ids = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=6)
    assert by_ids.choices[0].text == answer.choices[0].text
    pieces = client.completions.create(model="tiny", prompt="One, two", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == answer.choices[0].text


def test_thirty_two_at_once_are_answered_as_one_by_one(client: OpenAI) -> None:
    def ask(number: int) -> str:
        asked = [{"role": "user", "content": "x" * (number % 7) + f" Count to {number}."}]
        drawn: dict[str, Any] = {} if number % 2 else {"temperature": 0.8, "seed": number}
        return str(chat(client, messages=asked, **drawn).choices[0].message.content)

    alone = [ask(number) for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == alone
    assert len(set(alone)) > 16


# ---- prompts


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": ASKED,
    "system": [{"role": "system", "content": "Be brief."}, *ASKED],
    "turns": [
        {"role": "system", "content": "Be brief."},
        *ASKED,
        {"role": "assistant", "content": "1 2 3"},
        {"role": "user", "content": "<|im_end|> and on?"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Count "}, {"type": "text", "text": "é"}]}
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_that_of_training(served: Served, name: str) -> None:
    turns = CONVERSATIONS[name]
    (request,) = served.chat(ChatRequest(model="tiny", messages=turns))  # type: ignore[arg-type]
    assert isinstance(request, Request)
    texts = [
        turn["content"] if isinstance(turn["content"], str) else "".join(p["text"] for p in turn["content"])
        for turn in turns
    ]
    messages = tuple(Message(turn["role"], text) for turn, text in zip(turns, texts, strict=True))
    template = served.answerer.template
    assert list(request.prompt) == template.prompt(Conversation(messages))
    trained = template.encode(Conversation((*messages, Message("assistant", "said"))))
    assert list(request.prompt) == trained.input_ids[: trained.answers[-1].start]


# ---- what is refused

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "gpt-4"}, 404, "there are tiny"),
    "unknown field": ({"foo": 1}, 400, "foo"),
    "logit_bias": ({"logit_bias": {"1": 2}}, 400, "logit_bias"),
    "picture": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ]
        },
        400,
        "nothing is fetched and no file is opened here",
    ),
    "sound": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
        400,
        "a sound has data, and a format that is wav or mp3",
    ),
    "json": ({"response_format": {"type": "json_object"}}, 400, "cannot be held to a format"),
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        400,
        "json_schema",
    ),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "look"}}]},
        400,
        "tools are not supported by this model: template 'tokenizer' has no place for tools",
    ),
    "forced tool": (
        {"tools": [{"type": "function", "function": {"name": "look"}}], "tool_choice": "required"},
        400,
        "tool_choice can be auto or none",
    ),
    "no messages": ({"messages": []}, 400, "messages"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "a message needs content"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
    "temperature": ({"temperature": -1}, 400, "temperature"),
    "text for a number": ({"temperature": "hot"}, 400, "temperature"),
    "too many tokens": ({"max_tokens": LONG}, 400, f"the model's context has {LONG} tokens"),
    "too long a prompt": ({"messages": [{"role": "user", "content": "x" * LONG}]}, 400, "context"),
    "top_logprobs alone": ({"top_logprobs": 2}, 400, "logprobs: true"),
    "options without a stream": ({"stream_options": {"include_usage": True}}, 400, "stream: true"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    "half a seed": ({"seed": 1.5}, 400, "seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_answered_is_refused_by_name(server: Running, name: str) -> None:
    changes, expected, words = BAD[name]
    status, _, answer = server.send("/v1/chat/completions", {"model": "tiny", "messages": ASKED, **changes})
    assert status == expected, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": "x" * LONG}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        chat(client, extra_body={"foo": 1})
    assert unknown.value.param == "foo"


def test_harmless_fields_are_read_over(client: OpenAI, served: Served) -> None:
    answer = chat(
        client,
        user="me",
        store=False,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        logit_bias={},
        tool_choice="none",
    )
    assert answer.choices[0].message.content == direct(served)


def test_the_models_are_listed(client: OpenAI, server: Running) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "luthier"
    assert server.send("/v1/models/none", method="GET")[0] == 404
    assert server.send("/health", method="GET")[2] == {"status": "ok"}


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    with running(served) as server:
        answer = chat(server.client(), max_tokens=7)
        server.send("/v1/chat/completions", {"model": "tiny"})
        page = server.send("/metrics", method="GET")[2].decode()
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert lines['luthier_requests_total{path="/v1/chat/completions",status="200"}'] == "1"
    assert lines['luthier_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert lines["luthier_prompt_tokens_total"] == str(answer.usage.prompt_tokens)
    assert lines["luthier_completion_tokens_total"] == "7"
    assert lines["luthier_requests_running"] == lines["luthier_requests_waiting"] == "0"
    assert lines['luthier_first_token_seconds_bucket{le="+Inf"}'] == "1"


def test_scores_are_not_a_language_models(server: Running) -> None:
    body = {"model": "tiny", "input": [[*ASKED, {"role": "assistant", "content": "1 2"}]]}
    status, _, answer = server.send("/v1/score", body)
    assert status == 400 and "reward model" in answer["error"]["message"]


def test_an_event_stream_is_well_formed(server: Running) -> None:
    connection = server.connection()
    body = {"model": "tiny", "messages": ASKED, "stream": True, "max_tokens": 3}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])
    connection.close()
