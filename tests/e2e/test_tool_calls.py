"""Chat and serve read calls back in the forms of other families than Hermes', whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.answering import Answerer, open_model
from luthier.api.served import Served
from luthier.chat.commands import run_command
from luthier.chat.session import Session
from luthier.data.formats import to_row
from luthier.data.read import read_rows
from luthier.data.registry import resolve_datasets
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import GenerationError
from tests.scripted import ScriptedEngine
from tests.serving import running
from tests.tiny import chat_model, chat_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
ARGUMENTS = {"place": "Rom <é>", "days": 3}
SAID = {
    "qwen3_5": "I look.\n\n<tool_call>\n<function=look>\n<parameter=place>\nRom <é>\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm4_moe": "I look.\n<tool_call>look\n<arg_key>place</arg_key>\n<arg_value>Rom <é></arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "deepseek": "I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>"
    '{"place": "Rom <é>", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "lfm2": 'I look.<|tool_call_start|>[look(place="Rom <é>", days=3)]<|tool_call_end|>',
    "default": 'I look.\nAction: look\nAction Input: {"place": "Rom <é>", "days": 3}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=16384)


@pytest.fixture(params=SAID)
def answerer(request: pytest.FixtureRequest, folder: Path) -> Answerer:
    """A tiny model with a template of this format, whose engine gives a call and then an answer."""
    tokenizer = chat_tokenizer()
    load_template(tokenizer, DataSpec(template="chatml", tool_format=request.param))
    tokenizer.save_pretrained(folder)
    opened = open_model(folder)
    return replace(opened, engine=ScriptedEngine(opened, [SAID[request.param], "It rains.", "And now?"]))


@pytest.mark.parametrize("stream", [False, True])
def test_serve(answerer: Answerer, stream: bool) -> None:
    asked: list[Any] = [{"role": "user", "content": "Rain?"}]
    with running(Served("tiny", answerer)) as server:
        client = server.client()
        fields: dict[str, Any] = {"model": "tiny", "tools": [TOOL]}
        if stream:
            content, calls, finish = "", [], None
            for chunk in client.chat.completions.create(messages=asked, stream=True, **fields):
                content += chunk.choices[0].delta.content or ""
                calls += chunk.choices[0].delta.tool_calls or []
                finish = chunk.choices[0].finish_reason or finish
        else:
            (choice,) = client.chat.completions.create(messages=asked, **fields).choices
            content, calls, finish = choice.message.content, choice.message.tool_calls, choice.finish_reason
        (call,) = calls
        assert (content, call.function.name, finish) == ("I look.", "look", "tool_calls")
        assert json.loads(call.function.arguments) == ARGUMENTS
        said = {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"id": call.id, "type": "function", "function": call.function.model_dump()}],
        }
        result = {"role": "tool", "tool_call_id": call.id, "name": "look", "content": "31 mm"}
        last = client.chat.completions.create(messages=[*asked, said, result], **fields).choices[0]
        assert (last.message.content, last.finish_reason) == ("It rains.", "stop")
    engine = answerer.engine
    assert isinstance(engine, ScriptedEngine)
    # the model is shown its own call as it wrote it
    assert all(part in engine.asked[1] for part in ("Rom <é>", "31 mm", "I look."))
    assert engine.asked[1].startswith(engine.asked[0])


def test_chat(answerer: Answerer, tmp_path: Path) -> None:
    session = Session(answerer)
    (tmp_path / "tools.json").write_text(json.dumps([TOOL["function"]]))
    assert run_command(session, f"/tools {tmp_path / 'tools.json'}").note == "tools: look"
    with pytest.raises(GenerationError, match="no tool was called"):
        run_command(session, "/result 31 mm")
    shown = "".join(piece.text for piece in session.ask("Rain?"))
    assert shown == 'I look.\n[call] look {"place": "Rom <é>", "days": 3}'
    assert [call.name for call in session.open_calls] == ["look"]
    answer: Iterator[Any] | None = run_command(session, "/result 31 mm").answer
    assert answer is not None and "".join(piece.text for piece in answer) == "It rains."
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[1].tool_calls[0].arguments == ARGUMENTS
    # what is saved is a row of training data: the same messages and tools
    session.save(tmp_path / "talk.jsonl")
    spec = {"file_name": "talk.jsonl", "formatting": "openai", "columns": {"tools": "tools"}}
    data = DataSpec.model_validate({"train": [spec], "directory": str(tmp_path)})
    (attr,) = resolve_datasets(data.train, data)
    (raw,) = read_rows(attr)
    conversation = to_row(raw, attr, "conversation").conversation
    assert conversation is not None
    assert conversation.messages == tuple(session.messages)
    assert conversation.tools == session.tools
