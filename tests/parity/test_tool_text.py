"""Tools, calls and results stand as the vendors' published templates and LLaMA-Factory 0.9.5 write them.

`data/llamafactory_tools.json` holds what that version's tool formats made of two tools and two calls. Where Luthier's
text is another one, `families/tools/formats.yaml` says why; here stands in what.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from luthier.data import families, tool_formats
from luthier.data.answer_form import AnswerForm
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.formats import to_row
from luthier.data.read import read_rows
from luthier.data.registry import resolve_datasets
from luthier.data.rendering import Renderer, chat_messages
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, ToolCall
from tests.templates_with_tools import template_with
from tests.tiny import chat_tokenizer

RECORDED = json.loads((Path(__file__).parent / "data" / "llamafactory_tools.json").read_text("utf-8"))
TOOLS = tuple({"type": "function", "function": tool} for tool in RECORDED["tools"])
CALLS = tuple(ToolCall(call["name"], call["arguments"]) for call in RECORDED["calls"])
BARE = (
    tool_formats.PLACE
    + "{%- for message in messages -%}{{- message.role + ':' + message.content + ';' -}}{%- endfor -%}"
)
SAME_TOOLS = {"default", "glm4", "glm4_moe", "ling", "mistral", "qwen"}
SAME_CALLS = {"default", "gemma4", "glm4", "lfm2", "ling", "llama3", "minimax1", "qwen", "qwen3_5"}


def written(name: str, *messages: Message, tools: tuple[Any, ...] = ()) -> str:
    source = tool_formats.with_tools(BARE, name)
    return Renderer(source, {}).render(chat_messages(Conversation(messages)), tools)


def test_every_format_of_the_other_tool_is_there_and_every_difference_is_explained() -> None:
    assert RECORDED["formats"].keys() <= set(tool_formats.names())
    explained = {name for name in RECORDED["formats"] if tool_formats.about(name)[1]}
    assert RECORDED["formats"].keys() - SAME_TOOLS & SAME_CALLS <= explained


@pytest.mark.parametrize("name", RECORDED["formats"])
def test_against_llamafactory(name: str) -> None:
    expected = RECORDED["formats"][name]
    tools = written(name, Message("system", "Be."), tools=TOOLS)
    assert (tools == f"system:Be.{expected['tools']};") == (name in SAME_TOOLS)
    one = written(name, Message("assistant", "", None, CALLS[:1]))
    assert (one == f"assistant:{expected['one']};") == (name in SAME_CALLS), one
    if expected["two"] is not None:
        two = written(name, Message("assistant", "", None, CALLS))
        assert (two == f"assistant:{expected['two']};") == (name in SAME_CALLS - {"qwen3_5"}), two


TALK = (
    Message("system", "Be kind."),
    Message("user", "Q"),
    Message("assistant", "I look.", None, CALLS),
    Message("tool", "rain"),
    Message("tool", "done"),
    Message("assistant", "It rains."),
)


def published(name: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("vendor", "talk"),
    [
        ("qwen2_5", TALK),
        ("qwen2_5", TALK[1:]),
        ("qwen2_5", (*TALK[:2], Message("assistant", "", None, CALLS[:1]))),
        ("qwen3_instruct_2507", TALK),
    ],
)
def test_qwen_is_the_vendors(vendor: str, talk: tuple[Message, ...]) -> None:
    conversation = Conversation(talk, TOOLS)
    ours = load_template(chat_tokenizer(), DataSpec(template="qwen"))
    assert ours.rendering(conversation) == template_with(published(vendor)).rendering(conversation)


def test_glm4_moe_writes_tools_and_calls_as_the_vendor() -> None:
    talk = (Message("user", "Q"), Message("assistant", "I look.", None, CALLS))
    theirs = Renderer(published("glm4moe"), {}).render(chat_messages(Conversation(talk)), TOOLS)
    ours = written("glm4_moe", *talk, tools=TOOLS)
    calls = theirs.partition("I look.")[2]
    assert calls and ours.partition("I look.")[2] == calls + ";"
    block = theirs.partition("# Tools")[2].partition("<|user|>")[0]
    assert ours.partition("# Tools")[2].partition(";user:")[0].strip() == block.strip()


def test_qwen3_5_writes_tools_and_calls_as_the_vendor() -> None:
    talk = (Message("user", "Q"), Message("assistant", "I look.", None, CALLS))
    theirs = Renderer(published("qwen3_5_nothink"), {}).render(chat_messages(Conversation(talk)), TOOLS)
    ours = written("qwen3_5", *talk, tools=TOOLS)
    assert theirs.partition("I look.")[2].removesuffix("<|im_end|>\n") == ours.partition("I look.")[2][:-1]
    block = theirs.partition("# Tools")[2].partition("<|im_end|>")[0]
    assert ours.partition("# Tools")[2].partition(";user:")[0] == block


@pytest.mark.parametrize("vendor", ["llama3_1", "llama3_2"])
def test_llama3_writes_calls_as_the_vendor(vendor: str) -> None:
    talk = (Message("user", "Q"), Message("assistant", "", None, CALLS[:1]), Message("tool", "rain"))
    theirs = Renderer(published(vendor), {"bos_token": ""}).render(chat_messages(Conversation(talk)), TOOLS)
    family = families.find("llama3")
    ours = Renderer(family.source, {"bos_token": ""}).render(chat_messages(Conversation(talk)), TOOLS)
    cut = "Q<|eot_id|>"
    # the tool's result is a JSON text in the vendor's template
    assert ours.partition(cut)[2] == theirs.partition(cut)[2].replace('"rain"', "rain")


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gptoss", "lfm2_2_5", "llama3_1", "gemma4_v5"]
)
def test_calls_are_read_out_of_the_vendors_own_templates(name: str) -> None:
    template = template_with(published(name))
    form = AnswerForm.of(template)
    call = ToolCall("look", {"place": "Rom {é}", "days": 3}, "abcdefghi")
    text = template.rendering(
        Conversation((Message("user", "Q"), Message("assistant", "", None, (call,))), TOOLS)
    )
    at = text.rindex("look")
    begins = (
        form.call.begins if hasattr(form.call, "begins") else "{" if form.call else "<|start|>assistant to="
    )
    text = (
        text[text.rindex(begins, 0, at) :]
        .removesuffix("\n")
        .removesuffix("<|im_end|>")
        .removesuffix("<|eot_id|>")
    )
    text = text.removeprefix("<|start|>assistant").removesuffix("<turn|>")
    form = form.after("</think>") if form.reason_closes and not form.reason_opens else form
    spoken = form.read(text, tools={"look": TOOLS[0]["function"]["parameters"]})
    assert [(c.name, c.arguments) for c in spoken.calls] == [("look", call.arguments)]


@pytest.mark.parametrize("name", tool_formats.names())
def test_real_rows_are_trained_and_read_back(name: str, shared_data: Path) -> None:
    """LLaMA-Factory's 300 tool conversations: every call that is trained is parsed to what the row says."""
    (attr,) = resolve_datasets(["glaive_toolcall_en_demo"], DataSpec(directory=str(shared_data)))
    template = load_template(chat_tokenizer(), DataSpec(template="chatml", tool_format=name))
    form = AnswerForm.of(template)
    seen = 0
    for raw in list(read_rows(attr))[:40]:
        row = to_row(raw, attr, "conversation")
        assert row.conversation is not None
        encoded = template.encode(row.conversation)
        schemas = {
            t["function"]["name"]: t["function"].get("parameters") or {} for t in row.conversation.tools
        }
        for span in encoded.answers:
            message = row.conversation.messages[span.message]
            text = template.decode(encoded.input_ids[span.start : span.stop - 1])
            spoken = form.read(text, tools=schemas)
            assert [(c.name, c.arguments) for c in spoken.calls] == [
                (c.name, c.arguments) for c in message.tool_calls
            ]
            assert spoken.content == message.content
            seen += len(message.tool_calls)
        sample = sft_sample(row, template, EncodeOptions(max_length=100_000, overflow="error"))
        assert len(sample.samples) == 1
    assert seen > 20
