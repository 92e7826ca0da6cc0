"""Mask and text of random conversations, for every named template on tokenizers of every kind.

What a token covers is found without the code under test: a byte-level token is as many bytes long as it has
characters, and the places of the answers come from `tokenizer.apply_chat_template` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.gate import gate
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec, TemplateSpec
from luthier.types import Conversation, Message, Row, RowError
from tiny_tokenizers import BOS, EOS, byte_level, metaspace, unigram

TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|observation|>", "[gMASK]", "sop", "<reserved_106>", "<reserved_107>"),
)
FOUR = TemplateSpec(prefix="A chat.", prompt="Q: {query}\nA:", separator="\n")
NAMES = (
    *(
        "alpaca",
        "baichuan2",
        "chatglm3",
        "chatml",
        "deepseek",
        "default",
        "gemma",
        "llama2",
        "llama3",
        "mistral",
        "phi",
    ),
    *("qwen", "vicuna", "zephyr", "ziya"),
)
TEMPLATES: dict[str, str | TemplateSpec] = {**{name: name for name in NAMES}, "four strings": FOUR}

LEADS = {"chatglm3": "\n", "mistral": " "}
"""What a template writes between the generation prompt and the answer: learnt with it."""
ANY_ROLE = {"chatml", "chatglm3", "gemma", "llama3", "phi", "qwen", "zephyr"}
"""Templates that take a tool's message, and users who write twice."""

FRAGMENTS = (
    *TOKENS,
    *(BOS, EOS, "<unk>", "<|im_", "start|>", "<|", "|>", "<|user", "[gMASK", "<0x0A>", "▁"),
    *("", "", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\0", "\u2028", "\ufeff", "\u200d", "\u00a0"),
    *("system", "user", "assistant", "USER: ", "### Response:\n", "[INST] ", " [/INST]", "Human: ", "<bot>:"),
    *("{{ x }}", "{% endfor %}", "{query}", '"', "\\", "\\n", "</think>", "<tool_call>"),
    *(
        "é",
        "e\u0301",
        "ß",
        "中文",
        "שלום",
        "\u202eمرحبا\u202c",
        "👩‍👩‍👧",
        "🇩🇪",
        "👍🏽",
        "😀",
        "\U000f0000",
        "\U000f0002",
    ),
    *("Hello there", "It is a test.", "42"),
)
WEIGHTS = (None, None, None, 0.0, 0.25, 1.0, 2.0)


def texts(alphabet: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(FRAGMENTS) | st.text(alphabet, max_size=4), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, text: st.SearchStrategy[str], *, any_role: bool) -> Conversation:
    """A system message or none, then users (and tools) who are answered, and perhaps one who is not yet."""
    messages = [Message("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        asking = draw(st.lists(st.sampled_from(("user", "tool")), max_size=1)) if any_role else []
        messages += [Message(role, draw(text)) for role in ("user", *asking)]
        messages.append(Message("assistant", draw(text), weight=draw(st.sampled_from(WEIGHTS))))
    if draw(st.integers(0, 4)) == 0:
        messages.append(Message("user", draw(text)))
    return Conversation(tuple(messages))


def chat(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def special_ids(template: ChatTemplate, ids: list[int]) -> list[int]:
    """Special tokens in a sequence; the unknown token is what unknown characters give, and no control token."""
    found = template.tokenizer.added_tokens_decoder
    return [i for i in ids if i in found and found[i].special and i != template.tokenizer.unk_token_id]


def without_words(conversation: Conversation) -> Conversation:
    """The same roles, every text that is not empty replaced by one letter: what is special in it is the template's."""
    return Conversation(tuple(Message(m.role, "x" if m.content else "") for m in conversation.messages))


def check_what_holds_everywhere(template: ChatTemplate, conversation: Conversation) -> None:
    encoded = template.encode(conversation)
    plain = template.encode(without_words(conversation))
    assert special_ids(template, encoded.input_ids) == special_ids(template, plain.input_ids)
    assert gate(template, [Row("demo", 0, conversation)]) == 1
    answered = {k for k, message in enumerate(conversation.messages) if message.role == "assistant"}
    assert {span.message for span in encoded.answers} | set(encoded.rewritten) == answered
    for span in encoded.answers:
        prompt = template.prompt(Conversation(conversation.messages[: span.message]))
        assert encoded.input_ids[: span.start] == prompt
        assert encoded.input_ids[span.stop - 1] in template.end_token_ids


def byte_bounds(template: ChatTemplate, ids: list[int]) -> np.ndarray[Any, Any]:
    """Where each token begins in the UTF-8 text, and where the last one ends."""
    added = template.tokenizer.added_tokens_decoder
    lengths = [
        len(added[i].content.encode())
        if i in added
        else len(str(template.tokenizer.convert_ids_to_tokens(i)))
        for i in ids
    ]
    return np.cumsum([0, *lengths])


def expected_samples(
    template: ChatTemplate, conversation: Conversation
) -> list[tuple[str, dict[int, float]]]:
    """Text of each sample, and the weight of each byte that is learnt, from transformers' rendering alone."""

    def rendered(messages: tuple[Message, ...], *, asking: bool = False) -> str:
        return str(
            template.tokenizer.apply_chat_template(
                chat(messages), tokenize=False, add_generation_prompt=asking
            )
        )

    messages = conversation.messages
    lead = LEADS.get(template.name, "")
    (end,) = template.tokenizer.convert_ids_to_tokens(list(template.end_token_ids))
    whole, samples, shared = rendered(messages), [], {}
    for k, message in enumerate(messages):
        if message.role != "assistant":
            continue
        weight = message.weight if message.weight is not None else float(bool(message.content.strip()))
        before = rendered(messages[:k], asking=True)
        answer = f"{lead}{message.content}{end}"
        learnt = dict.fromkeys(range(len(before.encode()), len((before + answer).encode())), weight)
        if whole.startswith(before + answer):
            shared |= learnt
        elif weight:
            samples.append((rendered(messages[: k + 1]), learnt))
    return [*samples, (whole, shared)] if any(shared.values()) else samples


def check_text_and_mask(template: ChatTemplate, conversation: Conversation) -> None:
    encoded = sft_sample(Row("demo", 0, conversation), template, EncodeOptions(1 << 16, "error"))
    expected = expected_samples(template, conversation)
    assert len(encoded.samples) == len(expected)
    assert encoded.lost.dropped == (None if expected else "no answer to learn")
    for sample, (text, learnt) in zip(encoded.samples, expected, strict=True):
        ids = sample.input_ids.tolist()
        assert template.decode(ids) == text
        bounds = byte_bounds(template, ids)
        assert bounds[-1] == len(text.encode())
        for token, (start, stop) in enumerate(pairwise(bounds.tolist())):
            weights = {learnt.get(byte, 0.0) for byte in range(start, stop)}
            assert weights == {float(sample.weights[token])}, (token, text)


def run(
    template: ChatTemplate,
    alphabet: st.SearchStrategy[str],
    num_examples: int,
    check: Callable[[ChatTemplate, Conversation], None],
) -> Counter[str]:
    """Random conversations through the checks; returns how many there were, and how many the template took."""
    seen: Counter[str] = Counter()

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)
    @given(conversations(texts(alphabet), any_role=template.name in ANY_ROLE))
    def each(conversation: Conversation) -> None:
        seen["drawn"] += 1
        try:
            check_what_holds_everywhere(template, conversation)
            check(template, conversation)
        except RowError as error:
            seen[error.reason] += 1
        else:
            seen["encoded"] += 1

    each()
    return seen


ANY = st.characters(exclude_categories=["Cs"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_mask_and_weights_byte_by_byte(name: str) -> None:
    template = load_template(byte_level(TOKENS), DataSpec(template=TEMPLATES[name]))
    seen = run(template, ANY, 40, check_text_and_mask)
    assert seen == {"drawn": seen["drawn"], "encoded": seen["drawn"]} and seen["drawn"] >= 40


OTHER_KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "normalizing": lambda: byte_level(TOKENS, nfc=True),
    "metaspace first": lambda: metaspace(TOKENS),
    "metaspace always": lambda: metaspace(TOKENS, scheme="always"),
    "unigram": lambda: unigram(TOKENS),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_other_kinds_of_tokenizers(name: str, kind: str) -> None:
    template = load_template(OTHER_KINDS[kind](), DataSpec(template=TEMPLATES[name]))
    seen = run(template, ANY, 15, lambda template, conversation: None)
    # the one reason that random text gives a tokenizer that cannot be handed pieces
    assert seen.keys() <= {
        "drawn",
        "encoded",
        "the tokenizer merges the prompt's end with the answer's beginning",
    }
    assert seen["encoded"] >= seen["drawn"] / 3 and seen["drawn"] >= 15


@pytest.mark.parametrize("name", ["its own", "default", "chatglm3", "four strings"])
def test_a_real_tokenizer(name: str, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    wanted = None if name == "its own" else TEMPLATES[name]
    template = load_template(tokenizer, DataSpec(template=wanted))
    # this vocabulary lacks control characters and bytes of characters beyond U+3FFFF: it reads nothing there
    known = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF)
    lacking = {"\r\n", "\t", "\0", "\U000f0000", "\U000f0002"}
    text = st.lists(
        st.sampled_from([f for f in FRAGMENTS if f not in lacking]) | st.text(known, max_size=4), max_size=6
    ).map("".join)
    count = 0

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(conversations(text, any_role=False))
    def each(conversation: Conversation) -> None:
        nonlocal count
        check_what_holds_everywhere(template, conversation)
        check_text_and_mask(template, conversation)
        count += 1

    each()
    assert count >= 25
