"""Trained models behind the server: tools and reasoning that were learnt, adapters by name, scores of a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import luthier
from luthier.answering import open_model
from luthier.api.fields import ChatRequest
from luthier.api.scores import ScoredModel
from luthier.api.served import Served, conversation_of
from luthier.api.server import load
from luthier.score import score_file
from luthier.types import Conversation, Message, ModelError, RecipeError
from tests.reward import reward_recipe
from tests.serving import Running, running
from tests.templates_with_tools import HERMES, tokenizer_with
from tests.tiny import chat_model, write_alpaca

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
]
ASKED: list[Any] = [{"role": "user", "content": "Warm?"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": '{"at": "Rome"}'}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "Who knows?",
                "tool_calls": [CALL],
            },
        ],
        "tools": TOOLS,
    },
    {
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "Who knows?",
                "tool_calls": [CALL],
            },
            {"role": "tool", "content": "31"},
            {"role": "assistant", "content": "Hot.", "reasoning_content": "31 it is."},
        ],
        "tools": TOOLS,
    },
    {"messages": [*ASKED, {"role": "assistant", "content": "Yes!", "reasoning_content": "Hm."}], "tools": []},
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has three conversations by heart."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("learnt")
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 512}
    base = chat_model(folder / "base", **shape)
    tokenizer_with(HERMES).save_pretrained(base)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    columns = {"messages": "messages", "tools": "tools"}
    described = {"file_name": "rows.json", "formatting": "openai", "columns": columns}
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": [described], "directory": str(folder), "cache": str(folder / "cache")},
        "method": {"type": "full"},
        "optim": {"lr": 5e-3},
        "train": {"rows_per_device": 3, "max_steps": 150, "plots": False, "save_every": None},
    }
    recipe["train"]["output"] = str(folder / "run")
    return luthier.train(recipe, quiet=True).output


@pytest.fixture(scope="module")
def agent(learnt: Path) -> Any:
    model = load(learnt, {"max_new_tokens": 200}, name="agent")
    with running(model) as server:
        yield server


def ask(server: Running, **fields: Any) -> Any:
    return server.client().chat.completions.create(model="agent", messages=ASKED, **fields)


def test_a_learnt_call_is_a_call_again(agent: Running) -> None:
    (choice,) = ask(agent, tools=TOOLS).choices
    message = choice.message
    assert choice.finish_reason == "tool_calls"
    assert (message.content, message.reasoning_content) == ("I look.", "Who knows?")
    (call,) = message.tool_calls
    assert call.function.name == "look" and json.loads(call.function.arguments) == {"at": "Rome"}
    # The conversation goes on with what the tool says.
    said = message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": call.id, "content": "31"}
    client = agent.client()
    turns: Any = [*ASKED, said, result]
    last = client.chat.completions.create(model="agent", messages=turns, tools=TOOLS).choices[0]
    assert (last.message.content, last.finish_reason) == ("Hot.", "stop")


def test_a_call_in_a_stream(agent: Running) -> None:
    content = reasoning = ""
    calls: list[Any] = []
    finish = None
    for chunk in ask(agent, tools=TOOLS, stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        calls += choice.delta.tool_calls or []
        finish = choice.finish_reason or finish
    assert (content, reasoning, finish) == ("I look.", "Who knows?", "tool_calls")
    assert [(call.index, call.function.name) for call in calls] == [(0, "look")]
    assert json.loads(calls[0].function.arguments) == {"at": "Rome"}


def test_without_tools_there_are_none_in_the_prompt(agent: Running) -> None:
    plain = ask(agent).choices[0]
    assert (plain.message.content, plain.message.reasoning_content) == ("Yes!", "Hm.")
    assert plain.finish_reason == "stop"
    none = ask(agent, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.content == "Yes!" and none.message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="cannot be held to a call"):
        ask(agent, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "look"}})


def test_the_prompt_with_tools_is_that_of_training(agent: Running, learnt: Path) -> None:
    """Token for token up to each answer, tools, reasoning and calls in it."""
    served = load(learnt, {}, name="agent")
    assert isinstance(served, Served)
    message = {"role": "assistant", "content": "I look.", "reasoning_content": "Who knows?"}
    turns = [*ASKED, {**message, "tool_calls": [{"id": "a1b2c3d4e", **CALL}]}]
    turns.append({"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "31"})
    body = ChatRequest.model_validate({"model": "agent", "messages": turns, "tools": TOOLS})
    (request,) = served.chat(body)
    conversation = conversation_of(body.messages, TOOLS)
    answer = Message("assistant", "Hot.", "31 it is.")
    encoded = served.answerer.template.encode(
        Conversation((*conversation.messages, answer), conversation.tools)
    )
    assert list(request.prompt) == encoded.input_ids[: encoded.answers[-1].start]


# ---- adapters


def test_adapters_are_models_by_name(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base", initializer_range=0.1)
    write_alpaca(tmp_path / "rows.json", 8)
    runs = {}
    for number, name in enumerate(("first", "second")):
        recipe: dict[str, Any] = {
            "model": {"path": str(base)},
            "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
            "method": {"type": "lora", "rank": 4},
            "optim": {"lr": 0.004 * (1 + 2 * number)},
            "train": {"rows_per_device": 4, "max_steps": 3, "plots": False, "seed": number},
        }
        recipe["train"]["output"] = str(tmp_path / name)
        runs[name] = luthier.train(recipe, quiet=True).output
    targets = {"served": runs["first"], "base": base, "second": runs["second"]}
    expected = {}
    for name, target in targets.items():
        answerer = open_model(target)
        request = answerer.request(
            Conversation((Message("user", "Count"),)), max_new_tokens=12, temperature=0.0
        )
        (end,) = answerer.engine.generate([request.prompt], request.settings)
        expected[name] = answerer.text(end)
    assert len(set(expected.values())) == 3
    model = load(runs["first"], {}, name="served", adapters={"second": runs["second"]})
    with running(model) as server:
        client = server.client()
        assert {found.id for found in client.models.list()} == set(targets)
        asked: Any = [{"role": "user", "content": "Count"}]
        for name, text in expected.items():
            answer = client.chat.completions.create(model=name, messages=asked, max_tokens=12, temperature=0)
            assert answer.choices[0].message.content == text, name
            assert answer.model == name
    plain = load(base, {}, name="plain", adapters={"second": runs["second"]})
    assert isinstance(plain, Served) and plain.names == {"plain": "base", "second": "second"}
    with pytest.raises(ModelError, match="--name: 'second' is the name of an adapter"):
        load(base, {}, name="second", adapters={"second": runs["second"]})


# ---- scores


def test_scores_are_those_of_the_verb(tmp_path: Path) -> None:
    run = luthier.train(reward_recipe(tmp_path, {"type": "lora", "rank": 4}), quiet=True).output
    rows = json.loads((tmp_path / "pairs.json").read_text())[:3]
    wanted = [row.scores for row in score_file(run, tmp_path / "pairs.json").rows[:3]]
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row[name]}]
        for row in rows
        for name in ("chosen", "rejected")
    ]
    model = load(run, {}, name="reward")
    assert isinstance(model, ScoredModel)
    with running(model) as server:
        status, _, answer = server.send("/v1/score", {"model": "reward", "input": chats})
        assert status == 200, answer
        found = [entry["score"] for entry in answer["data"]]
        assert found == pytest.approx([score for pair in wanted for score in pair], abs=1e-5)
        assert [entry["index"] for entry in answer["data"]] == list(range(6))
        assert answer["usage"]["total_tokens"] > 60
        assert server.send("/v1/score", {"model": "other", "input": chats})[0] == 404
        status, _, answer = server.send("/v1/score", {"model": "reward", "input": [chats[0][:1] * 2]})
        assert status == 400 and "ends with the assistant's answer" in answer["error"]["message"]
        long = [[{"role": "user", "content": "x" * 500}, chats[0][1]]]
        status, _, answer = server.send("/v1/score", {"model": "reward", "input": long})
        assert status == 400 and "input.0 cannot be scored" in answer["error"]["message"]
        status, _, answer = server.send("/v1/chat/completions", {"model": "reward", "messages": chats[0]})
        assert status == 400 and "/v1/score" in answer["error"]["message"]
    with pytest.raises(RecipeError, match="--rows"):
        load(run, {}, rows=3)
