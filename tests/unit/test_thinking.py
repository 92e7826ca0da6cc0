"""Reasoning and its policy: what is trained, what the saved template renders and what is served agree."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.gate import gate
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.template import ChatTemplate, load_template
from luthier.data.thinking import Marks, without_policy
from luthier.recipe.schema import DataSpec
from luthier.recipe.thinking import ThinkingSpec
from luthier.types import Conversation, DataError, Encoded, Message, Row
from tests.templates_with_tools import HERMES, OPENED
from tests.tiny import CHATML, chat_tokenizer

TRL = (
    Path((find_spec("trl") or pytest.fail("trl is a test dependency")).origin or "").parent / "chat_templates"
)
EMPTY = "<think>\n\n</think>\n\n"


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, why: str | None = None) -> Message:
    return Message("assistant", text, why)


TALK = Conversation(
    (user("q1"), answer("a1", "r1"), user("q2"), answer("a2"), user("q3"), answer("a3", "r3"))
)


def source(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def loaded(template: str, **thinking: Any) -> ChatTemplate:
    return load_template(tokenizer_of(template), DataSpec(thinking=ThinkingSpec(**thinking)))


def parts(template: ChatTemplate, conversation: Conversation = TALK, **changes: Any) -> list[str]:
    """The targets of each sample, in order."""
    options = EncodeOptions.of(DataSpec(thinking=template.reasoning.spec, max_length=4000, **changes), "sft")
    row = template.reasoning.split_row(Row("demo", 0, conversation))
    encoded = sft_sample(row, template, options)
    assert encoded.samples, encoded.lost
    return [template.decode(s.input_ids[s.weights > 0].tolist()) for s in encoded.samples]


def answers(*texts: str) -> str:
    return "".join(f"{text}<|im_end|>" for text in texts)


def thought(why: str, said: str) -> str:
    return f"<think>\n{why}\n</think>\n\n{said}"


# --------------------------------------------------------------------------------------------------
# Policy x template: closed form

QWEN3, QWEN36, OPENS = "qwen3", "qwen3_6", "qwen3_5_think"
"""Its prompt begins with nothing; knows preserve_thinking and opens the thought; opens the thought."""

TABLE: list[tuple[str, dict[str, Any], list[str]]] = [
    (QWEN3, {}, [answers(thought("r1", "a1")), answers(EMPTY + "a2"), answers(thought("r3", "a3"))]),
    (
        QWEN3,
        {"history": "keep"},
        [answers(EMPTY + "a2"), answers(thought("r1", "a1"), thought("r3", "a3"))],
    ),
    (
        QWEN3,
        {"history": "keep", "empty": "learn"},
        [answers(thought("r1", "a1"), EMPTY + "a2", thought("r3", "a3"))],
    ),
    (
        QWEN3,
        {"history": "keep", "empty": "prompt"},
        [answers(thought("r1", "a1"), "a2", thought("r3", "a3"))],
    ),
    (QWEN3, {"empty": "prompt"}, [answers(thought("r1", "a1")), answers("a2"), answers(thought("r3", "a3"))]),
    (
        QWEN3,
        {"answers": "none", "empty": "prompt", "enable": False},
        [answers(t) for t in ("a1", "a2", "a3")],
    ),
    (
        QWEN3,
        {"answers": "none", "empty": "prompt", "history": "keep"},
        [answers("a1", "a2", "a3")],
    ),
    (QWEN3, {"answers": "last"}, [answers(EMPTY + "a2"), answers(thought("r3", "a3"))]),
    (
        QWEN36,
        {"history": "keep"},
        [answers("r1\n</think>\n\na1", "\n</think>\n\na2", "r3\n</think>\n\na3")],
    ),
    (
        OPENS,
        {"history": "keep", "empty": "prompt"},
        [answers("r1\n</think>\n\na1", "a2", "r3\n</think>\n\na3")],
    ),
    ("qwen3_5_nothink", {}, [answers("r1\n</think>\n\na1"), answers("a2"), answers("r3\n</think>\n\na3")]),
    (HERMES, {}, [answers(thought("r1", "a1"), "a2", thought("r3", "a3"))]),
    (HERMES, {"history": "strip"}, [answers(thought("r1", "a1")), answers("a2", thought("r3", "a3"))]),
    (
        HERMES,
        {"empty": "learn"},
        [answers(EMPTY + "a2"), answers(thought("r1", "a1"), thought("r3", "a3"))],
    ),
    (HERMES, {"answers": "none", "empty": "prompt"}, [answers("a1"), answers("a2"), answers("a3")]),
    (CHATML, {"answers": "none"}, [answers("a1", "a2", "a3")]),
]


@pytest.mark.parametrize(("name", "thinking", "expected"), TABLE)
def test_what_is_learnt_saved_and_served(name: str, thinking: dict[str, Any], expected: list[str]) -> None:
    template = loaded(name if "{" in name else source(name), **thinking)
    assert parts(template) == expected
    assert gate(template, [Row("demo", 0, TALK)]) == 1
    # another program with the saved template, which knows nothing of policies, asks with the same tokens
    tokenizer = template.tokenizer
    saved = tokenizer.chat_template
    for k in (1, 3, 5):
        before = Conversation(TALK.messages[:k])
        for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            asked = [{"role": m.role, "content": m.content} for m in before.messages]
            for message, kept in zip(asked, before.messages, strict=True):
                if kept.reasoning:
                    message["reasoning_content"] = kept.reasoning
            text = tokenizer.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True, **variables
            )
            if "reasoning" in saved or not before.messages[1:]:
                assert template.decode(template.prompt(before, variables)) == text
    # a policy that is there already is not put there twice, and goes with the saved tokenizer
    assert (
        load_template(tokenizer, DataSpec(thinking=template.reasoning.spec)).tokenizer.chat_template == saved
    )
    assert load_template(tokenizer, DataSpec()).tokenizer.chat_template == saved


def test_a_default_system_message_stands_before_the_policy_and_stays() -> None:
    spec = DataSpec(default_system="Be kind.", thinking=ThinkingSpec(history="keep"))
    tokenizer = tokenizer_of(source(QWEN3))
    first = load_template(tokenizer, spec)
    assert first.rendering(TALK).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert thought("r1", "a1") in first.rendering(TALK)
    saved = tokenizer.chat_template
    again = load_template(tokenizer, spec.model_copy(update={"default_system": None}))
    assert again.tokenizer.chat_template == saved


def test_the_last_thought_alone_is_learnt_where_all_are_shown() -> None:
    template = loaded(source(QWEN3), history="keep", answers="last", empty="learn")
    assert parts(template) == [answers("a1", EMPTY + "a2", thought("r3", "a3"))]


def test_reasoning_in_the_content_is_reasoning_where_there_is_a_place() -> None:
    inline = Conversation(
        tuple(Message(m.role, thought(m.reasoning, m.content)) if m.reasoning else m for m in TALK.messages)
    )
    for name in (QWEN3, QWEN36, OPENS):
        template = loaded(source(name))
        assert parts(template, inline) == parts(template)
        # what the vendor's template makes of such a row by itself is the text that is trained
        chat = [{"role": m.role, "content": m.content} for m in inline.messages]
        plain = tokenizer_of(source(name)).apply_chat_template(chat, tokenize=False)
        assert template.rendering(inline) == plain
    stays = loaded(CHATML)
    assert parts(stays, inline) == [answers(thought("r1", "a1"), "a2", thought("r3", "a3"))]
    open_ended = Conversation((user("q"), answer("<think>never closed")))
    assert loaded(source(QWEN3)).reasoning.split(open_ended) == open_ended


def test_gpt_oss_has_a_field_and_marks_of_its_own() -> None:
    template = source("gptoss")
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]}
    )
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|return|>"
    loaded_ = load_template(tokenizer, DataSpec())
    assert loaded_.reasoning.field == "thinking" and loaded_.has_reasoning
    said = Conversation((user("q"), answer("a", "because")))
    (sample,) = sft_sample(Row("demo", 0, said), loaded_, EncodeOptions(4000, "drop")).samples
    text = loaded_.decode(sample.input_ids[sample.weights > 0].tolist())
    assert "analysis<|message|>because<|end|>" in text and text.endswith("final<|message|>a<|return|>")
    loaded_.require_variables({"reasoning_effort": "high"})
    high = loaded_.decode(loaded_.prompt(Conversation((user("q"),)), {"reasoning_effort": "high"}))
    assert "Reasoning: high" in high
    with pytest.raises(DataError, match="does not know enable_thinking"):
        loaded_.require_variables({"enable_thinking": False})


def test_reasoning_without_a_place_is_counted() -> None:
    options = EncodeOptions(4000, "drop")
    lost = sft_sample(Row("demo", 0, TALK), loaded(CHATML), options).lost
    assert lost.dropped == "template 'tokenizer' has no place for reasoning"
    # a template that cuts the thought even from the answer that is being learnt
    cuts = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    inline = Conversation((user("q"), answer("<think>\nr\n</think>\n\na")))
    lost = sft_sample(Row("demo", 0, inline), loaded(cuts), options).lost
    assert lost.dropped == "template 'tokenizer' leaves out the reasoning of an answer"
    drops = HERMES.replace("message.reasoning_content +", "'' if message.reasoning_content else '' +")
    lost = sft_sample(Row("demo", 0, TALK), loaded(drops), options).lost
    assert lost.dropped == "template 'tokenizer' has no place for reasoning"


def test_a_field_that_is_only_passed_on_is_no_place_for_reasoning() -> None:
    """Marked reasoning stays in the content then, as the docs promise, and in earlier answers too."""
    passes = "{%- set kept = messages[0].reasoning_content -%}" + CHATML
    inline = answer("<think>\nr\n</think>\n\na")
    talk = Conversation((user("q"), inline, user("again"), inline))
    for template in (loaded(passes), loaded(passes, history="keep"), loaded(CHATML, history="keep")):
        encoded = sft_sample(Row("demo", 0, talk), template, EncodeOptions(4000, "drop"))
        (sample,) = encoded.samples
        assert encoded.lost.dropped is None
        shown = template.decode(sample.input_ids.tolist())
        assert shown.count("<think>\nr\n</think>\n\na") == 2


def test_pairs_and_feedback_have_reasoning_too() -> None:
    template, options = loaded(source(QWEN3), empty="prompt"), EncodeOptions(4000, "drop")
    better, worse = (Conversation((user("q"), a)) for a in (answer("a", "r"), answer("b", "s")))
    (sample,) = pair_sample(Row("demo", 0, better, rejected=worse), template, options).samples
    first, second = sample.branches
    assert template.decode(sample.input_ids[first:second].tolist()) == answers(thought("r", "a"))
    assert template.decode(sample.input_ids[second:].tolist()) == answers(thought("s", "b"))
    (sample,) = feedback_sample(
        Row("demo", 0, Conversation((user("q"), answer("a"))), desirable=True), template, options
    ).samples
    assert template.decode(sample.input_ids.tolist()).endswith("assistant\n" + EMPTY + "a<|im_end|>")
    assert template.decode(sample.input_ids[sample.branches[0] :].tolist()) == "a<|im_end|>"
    mixed = Conversation((user("q"), answer("b")))
    lost: Encoded = pair_sample(Row("demo", 0, better, rejected=mixed), template, options)
    assert lost.lost.dropped == "prompts of chosen and rejected differ"


@pytest.mark.parametrize(
    ("template", "thinking", "message"),
    [
        (
            CHATML.replace("message['content']", "message['content'].split('</think>')[-1]"),
            {"history": "keep"},
            "which takes reasoning out itself",
        ),
        (CHATML, {"enable": True}, "does not know enable_thinking"),
        (source("qwen3_5_nothink"), {"empty": "learn"}, "empty: learn does not go with this chat template"),
    ],
)
def test_templates_that_cannot_hold_a_policy(template: str, thinking: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded(template, **thinking)


def test_policies_that_contradict_themselves() -> None:
    with pytest.raises(ValueError, match="write empty: prompt"):
        ThinkingSpec(enable=False, empty="learn")


def test_marks_and_variables() -> None:
    assert loaded(source(QWEN3)).reasoning.marks == Marks()
    assert loaded(OPENED).reasoning.marks == Marks()
    template = loaded(source(QWEN3))
    template.require_variables({"enable_thinking": True})
    for name, why in (
        ("enable_thinkin", "does not know"),
        ("messages", "own input"),
        ("eos_token", "own input"),
    ):
        with pytest.raises(DataError, match=why):
            template.require_variables({name: True})
    served = loaded(source(QWEN3), enable=False)
    ask = Conversation((user("q"),))
    assert served.decode(served.prompt(ask)).endswith(EMPTY)
    assert not served.decode(served.prompt(ask, {"enable_thinking": True})).endswith(EMPTY)
    assert without_policy(served.tokenizer.chat_template) == source(QWEN3)


def test_a_planted_fault_is_seen() -> None:
    template = loaded(source(QWEN3), empty="prompt")
    template.tokenizer.chat_template = without_policy(template.tokenizer.chat_template) + " "
    with pytest.raises(DataError, match="was changed after it was loaded"):
        gate(template, [Row("demo", 0, TALK)])
