"""What is trained is what the tokenizer's chat template gives, on real conversations and real templates."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.data.formats import to_row
from luthier.data.gate import gate
from luthier.data.read import read_rows
from luthier.data.registry import resolve_datasets
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Row

SETS = {
    "alpaca_en_demo": 999,
    "identity": 91,
    "kto_en_demo": 300,
    "glaive_toolcall_en_demo": 109,
    "mllm_demo": 6,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return load_template(tokenizer, DataSpec())


def chat(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def rows(name: str, folder: Path) -> list[Row]:
    """The conversations of a demonstration set that have no tools."""
    (attr,) = resolve_datasets([name], DataSpec(directory=str(folder)))
    made = [to_row(raw, attr, "conversation") for raw in read_rows(attr)]
    return [_of_text(row) for row in made if row.conversation and not row.conversation.tools]


def _of_text(row: Row) -> Row:
    """The words alone of rows with images."""
    assert row.conversation is not None
    messages = tuple(replace(message, media=()) for message in row.conversation.messages)
    return replace(row, conversation=replace(row.conversation, messages=messages))


@pytest.mark.parametrize("name", SETS)
def test_every_conversation_token_by_token(
    name: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, shared_data: Path
) -> None:
    found = rows(name, shared_data)
    assert len(found) == SETS[name]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in found:
        assert row.conversation is not None
        messages = chat(row.conversation)
        encoded = template.encode(row.conversation)
        assert encoded.input_ids == tokenizer.apply_chat_template(messages)["input_ids"], row.index
        assert encoded.rewritten == ()
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        assert [span.message for span in encoded.answers] == answers and answers
        for span in encoded.answers:
            prompt = tokenizer.apply_chat_template(messages[: span.message], add_generation_prompt=True)[
                "input_ids"
            ]
            assert encoded.input_ids[: span.start] == prompt
            assert template.prompt(Conversation(row.conversation.messages[: span.message])) == prompt
            answer = encoded.input_ids[span.start : span.stop]
            assert answer[-1] == stop and answer.count(stop) == 1
            assert tokenizer.decode(answer[:-1]) == messages[span.message]["content"]
    assert gate(template, found) == len(found)


SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<|im_",
    "start|>",
    "\n",
    "system",
    " ",
]
# this vocabulary lacks some control characters, and some bytes of characters beyond U+3FFFF: it reads nothing there
characters = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF)
texts = st.lists(st.sampled_from(SPECIAL) | st.text(characters, max_size=5), max_size=7).map("".join)


@settings(max_examples=200, deadline=None)
@given(texts, texts, texts)
def test_special_tokens_of_users_never_become_special(system: str, question: str, answer: str) -> None:
    template = _smollm2_template()
    turns = (Message("system", system), Message("user", question), Message("assistant", answer))
    ids = template.encode(Conversation(turns)).input_ids
    # <|im_start|> role ... <|im_end|> three times, and nothing else
    assert [i for i in ids if i <= 16] == [1, 2] * 3
    assert [i for i in template.text(question) if i <= 16] == []
    assert template.decode(ids) == template.rendering(Conversation(turns))


_CACHE: dict[str, ChatTemplate] = {}


@pytest.fixture(autouse=True)
def _share_template(template: ChatTemplate) -> None:
    """Hypothesis does not take fixtures that it would share between examples."""
    _CACHE["smollm2"] = template


def _smollm2_template() -> ChatTemplate:
    return _CACHE["smollm2"]


# TRL's copies of vendors' templates whose control tokens SmolLM2 has, with how many of the three answers
# stand in one sequence (the others are shown otherwise once the conversation goes on)
TRL_TEMPLATES = {
    "qwen2_5": 3,
    "qwen2_5_training": 3,
    "qwen2_5_vl_training": 3,
    "qwen3": 1,
    "qwen3_training": 3,
    "qwen3_instruct_2507": 3,
    "qwen3_instruct_2507_training": 3,
    "qwen3_5_nothink_training": 3,
    "qwen3_8_training": 3,
    "lfm2": 3,
    "lfm2_training": 3,
}
THREE = Conversation(
    (
        Message("user", "Hi there"),
        Message("assistant", "Hello!"),
        Message("user", "Can you count?"),
        Message("assistant", "One, two, three."),
        Message("user", "And then?"),
        Message("assistant", "Four."),
    )
)


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_vendors_templates(name: str, smollm2: Path) -> None:
    file = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(tokenizer, DataSpec(template=str(file)))
    encoded = template.encode(THREE)
    assert gate(template, [Row(name, 0, THREE)]) == 1
    assert len(encoded.answers) == TRL_TEMPLATES[name]
    assert len(encoded.answers) + len(encoded.rewritten) == 3
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(chat(THREE), tokenize=False)
    for span in encoded.answers:
        answer = tokenizer.decode(encoded.input_ids[span.start : span.stop])
        assert answer.rstrip("\n").endswith(f"{THREE.messages[span.message].content}<|im_end|>")


@pytest.mark.parametrize("name", [name for name in TRL_TEMPLATES if name.endswith("_training")])
def test_generation_spans_are_transformers_mask_without_what_the_prompt_gives(
    name: str, smollm2: Path
) -> None:
    file = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(tokenizer, DataSpec(template=str(file)))
    encoded = template.encode(THREE)
    out = tokenizer.apply_chat_template(chat(THREE), return_assistant_tokens_mask=True)
    runs = _runs(out["assistant_masks"])
    ours = [tokenizer.decode(encoded.input_ids[a.start : a.stop]) for a in encoded.answers]
    theirs = [tokenizer.decode(out["input_ids"][a:b]) for a, b in runs]
    assert len(ours) == len(theirs) == 3
    for span, mine, other in zip(encoded.answers, ours, theirs, strict=True):
        given = other.removesuffix(mine)
        assert other.endswith(mine)
        prompt = template.prompt(Conversation(THREE.messages[: span.message]))
        assert tokenizer.decode(prompt).endswith(given)


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    padded = [0, *mask, 0]
    starts = [i for i in range(len(mask)) if padded[i] == 0 and padded[i + 1] == 1]
    stops = [i for i in range(len(mask) + 1) if padded[i] == 1 and padded[i + 1] == 0]
    return list(zip(starts, stops, strict=True))
