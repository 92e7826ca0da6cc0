"""Text and mask of random conversations with reasoning and tool calls, for named templates that have places for both.

What is expected comes from `tokenizer.apply_chat_template` alone, byte by byte; see `test_conversation_properties.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.gate import gate
from luthier.data.rendering import chat_messages
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Row, RowError, ToolCall
from tiny_tokenizers import EOS, byte_level

TOKENS = (
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|observation|>",
        "[gMASK]",
        "<sop>",
    ),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|call|>",
        "<|return|>",
    ),
    *("<|endoftext|>", "<seed:bos>", "<seed:eos>", "]~b]", "]~!b[", "[e~["),
)
FRAGMENTS = (
    *TOKENS,
    *(
        EOS,
        "<|im_",
        "end|>",
        "",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\u2028",
        "<think>",
        "</think>",
        "<tool_call>",
        "/nothink",
    ),
    *(
        "<tool_response>",
        "</tool_response>",
        "final",
        "{{ x }}",
        '"',
        "\\",
        "é",
        "中文",
        "👩‍👩‍👧",
        "\U000f0000",
        "Hello",
    ),
)
TEMPLATES = (
    *("qwen3", "qwen3_nothink", "qwen3_5", "qwen3_6", "deepseekr1", "glm4_moe", "glm4_7", "gpt_oss"),
    *("minimax2", "seed_oss"),
)
WITHOUT = {"deepseekr1": "tools", "qwen3_nothink": "reasoning"}
"""What a template has no place for."""
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks <|im_end|> up.",
        "parameters": {
            "type": "object",
            "properties": {"what": {"type": "string", "description": "What"}},
            "required": ["what"],
        },
    },
}
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, without: str) -> Conversation:
    """Questions and answers, with reasoning or without, some of which look something up first."""
    thoughts = st.none() if without == "reasoning" else st.none() | TEXTS.filter(str.strip)
    messages = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS)))
        if without != "tools" and draw(st.booleans()):
            call = ToolCall("look", {"what": draw(TEXTS)})
            messages += [
                Message("assistant", "", reasoning=draw(thoughts), tool_calls=(call,)),
                Message("tool", draw(TEXTS)),
            ]
        messages.append(Message("assistant", draw(TEXTS.filter(str.strip)), reasoning=draw(thoughts)))
    return Conversation(tuple(messages), () if without == "tools" else (TOOL,))


def special_ids(template: ChatTemplate, ids: list[int]) -> list[int]:
    found = template.tokenizer.added_tokens_decoder
    return [i for i in ids if i in found and found[i].special and i != template.tokenizer.unk_token_id]


def without_words(conversation: Conversation) -> Conversation:
    """The same messages, every text that has letters replaced by one: what is special in it is the template's."""

    def plain(text: str) -> str:
        return "x" if text.strip() else text

    return Conversation(
        tuple(
            replace(
                message,
                content=plain(message.content),
                reasoning=None if message.reasoning is None else "x",
                tool_calls=tuple(ToolCall("look", {"what": "x"}) for _ in message.tool_calls),
            )
            for message in conversation.messages
        ),
        conversation.tools and ({**TOOL, "function": {**TOOL["function"], "description": "x"}},),
    )


def byte_bounds(template: ChatTemplate, ids: list[int]) -> np.ndarray[Any, Any]:
    """Where each token begins in the UTF-8 text, and where the last one ends."""
    added = template.tokenizer.added_tokens_decoder
    lengths = [
        len(added[i].content.encode()) if i in added else len(template.tokenizer.convert_ids_to_tokens(i))
        for i in ids
    ]
    return np.cumsum([0, *lengths])


def expected_samples(template: ChatTemplate, conversation: Conversation) -> list[tuple[str, set[int]]]:
    """Text of each sample, and the bytes that are learnt, from transformers' rendering alone."""
    messages, tools = conversation.messages, conversation.tools
    ends = template.tokenizer.convert_ids_to_tokens(list(template.end_token_ids))

    def rendered(number: int, *, asking: bool = False) -> str:
        return str(
            template.tokenizer.apply_chat_template(
                chat_messages(Conversation(messages[:number])),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=asking,
            )
        )

    whole, samples, shared = rendered(len(messages)), [], set()
    for k, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before, upto = rendered(k, asking=True), rendered(k + 1)
        assert upto.startswith(before)
        stop = max(upto.rfind(end) + len(end) for end in ends if end in upto[len(before) :])
        learnt = set(range(len(before.encode()), len(upto[:stop].encode())))
        if whole.startswith(upto):
            shared |= learnt
        else:
            samples.append((upto, learnt))
    return [*samples, (whole, shared)]


def check(template: ChatTemplate, conversation: Conversation) -> None:
    encoded = template.encode(conversation)
    plain = template.encode(without_words(conversation))
    assert special_ids(template, encoded.input_ids) == special_ids(template, plain.input_ids)
    assert gate(template, [Row("demo", 0, conversation)]) == 1
    for span in encoded.answers:
        before = Conversation(conversation.messages[: span.message], conversation.tools)
        assert encoded.input_ids[: span.start] == template.prompt(before)
    found = sft_sample(Row("demo", 0, conversation), template, EncodeOptions(1 << 16, "error")).samples
    expected = expected_samples(template, conversation)
    assert len(found) == len(expected)
    for sample, (text, learnt) in zip(found, expected, strict=True):
        ids = sample.input_ids.tolist()
        assert template.decode(ids) == text
        bounds = byte_bounds(template, ids)
        assert bounds[-1] == len(text.encode())
        for token, (start, stop) in enumerate(pairwise(bounds.tolist())):
            assert {float(byte in learnt) for byte in range(start, stop)} == {float(sample.weights[token])}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_mask_and_special_tokens(name: str) -> None:
    tokenizer = byte_level(TOKENS)
    template = load_template(tokenizer, DataSpec(template=name))
    seen: Counter[str] = Counter()

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(conversations(WITHOUT.get(name, "")))
    def each(conversation: Conversation) -> None:
        seen["drawn"] += 1
        try:
            check(template, conversation)
        except RowError as error:
            seen[error.reason] += 1
        else:
            seen["encoded"] += 1

    each()
    assert seen == {"drawn": seen["drawn"], "encoded": seen["drawn"]} and seen["drawn"] >= 15
