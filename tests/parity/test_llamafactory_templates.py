"""Named templates render, learn and stop as LLaMA-Factory 0.9.5 does, character by character.

`data/llamafactory_templates.json` holds what that version's `SupervisedDatasetProcessor` made of three conversations
with each template, read back as text: `turns` are prompt and answer, `text` is the whole row, `learnt` its labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Row
from tiny_tokenizers import byte_level

RECORDED = json.loads((Path(__file__).parent / "data" / "llamafactory_templates.json").read_text("utf-8"))
TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|observation|>", "[gMASK]", "sop", "<reserved_106>", "<reserved_107>"),
)


def conversation(title: str) -> Conversation:
    described = RECORDED["conversations"][title]
    system = [] if described["system"] is None else [Message("system", described["system"])]
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], text) for i, text in enumerate(described["texts"])]
    return Conversation((*system, *turns))


@pytest.mark.parametrize("title", RECORDED["conversations"])
@pytest.mark.parametrize("name", RECORDED["templates"])
def test_text_and_targets(name: str, title: str) -> None:
    expected: dict[str, Any] = RECORDED["templates"][name]["rendered"][title]
    template = load_template(byte_level(TOKENS), DataSpec(template=name))
    talk = conversation(title)
    assert template.rendering(talk) == expected["text"]
    asked = [k for k, message in enumerate(talk.messages) if message.role == "assistant"]
    given = ""
    for k, (question, answer) in zip(asked, expected["turns"], strict=True):
        given += question
        assert template.decode(template.prompt(Conversation(talk.messages[:k]))) == given
        given += answer
    options = EncodeOptions(max_length=4096, overflow="error", train_after_stop=True)
    encoded = sft_sample(Row("demo", 0, talk), template, options)
    learnt = [sample.input_ids[sample.weights > 0].tolist() for sample in encoded.samples]
    assert template.decode([token for part in learnt for token in part]) == expected["learnt"]


@pytest.mark.parametrize("name", RECORDED["templates"])
def test_end_and_stop_tokens(name: str) -> None:
    template = load_template(byte_level(TOKENS), DataSpec(template=name))
    expected = RECORDED["templates"][name]
    assert template.tokenizer.eos_token == expected["eos"]
    assert sorted(map(template.tokenizer.convert_ids_to_tokens, template.stop_ids)) == expected["stop"]
