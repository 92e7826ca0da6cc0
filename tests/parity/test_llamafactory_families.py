"""Every template name of LLaMA-Factory 0.9.5: its text, its pieces, its end and stop tokens, or a stated difference.

`data/llamafactory_families.json` holds what that version's `SupervisedDatasetProcessor` and templates made of a few
conversations, in the pieces that it tokenizes apart: for each turn those of the prompt and those of the answer. A
name whose pieces are another one's names that. See the README in `data/llamafactory`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from luthier.data import families
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Row
from tiny_tokenizers import BOS, EOS, byte_level, metaspace

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_families.json").read_text("utf-8")
)
NAMES: dict[str, Any] = RECORDED["names"]
TALKS: dict[str, Any] = RECORDED["conversations"]
OURS = {"baichuan2", "tokenizer", "ziya"}
"""Names that version 0.9.5 does not have."""
TEXT_DIFFERS = {
    *(
        "deepseekr1",
        "glm4_7",
        "glm4_moe",
        "gpt_oss",
        "minimax2",
        "qwen3",
        "qwen3_5",
        "qwen3_5_nothink",
        "qwen3_6",
    ),
    *("empty", "gemma4", "gemma4n", "granite4", "lfm2", "lfm2_vl", "minimax1", "ministral3", "seed_oss"),
    "smollm2",
}
"""Where the published template's text, or one that can be trained, is not LLaMA-Factory's."""
ENDS_ONCE = {"bailing_v2", "dots_ocr", "gemma2"}
"""Answers that LLaMA-Factory ends twice where they stand last."""
OWN_END = {"gemma2": "<end_of_turn>", "gpt_oss": "<|return|>", "minimax2": "[e~[", "seed_oss": "<seed:eos>"}
"""The model's own end token, where LLaMA-Factory leaves the tokenizer's."""
SPELT_OUT = {"seed_oss": {BOS: "<seed:bos>", EOS: "<seed:eos>"}}
"""The model's begin and end tokens, where the template spells them out and LLaMA-Factory asks the tokenizer."""
ALIKE = [name for name in NAMES if name not in TEXT_DIFFERS]
PLAIN = [name for name in ALIKE if not families.find(name).thinking]

Turns = list[tuple[list[str], list[str]]]


def tokens_of(name: str) -> tuple[str, ...]:
    """What the vocabulary of a model with this template has at least."""
    family = families.find(name)
    return tuple(dict.fromkeys(token for token in (family.eos, *family.stop, *ends(name)) if token))


def ends(name: str) -> list[str]:
    """Tokens that end an answer by the template's own text."""
    answer = "".join(recorded(name, "no system")[0][1]).partition("Thank you.")[2].strip()
    return [answer] if answer and answer not in (EOS, "###") and " " not in answer else []


def recorded(name: str, title: str, *, thoughts: bool = False) -> Turns:
    entry = NAMES[name]
    talks = entry["talks"]
    talks = NAMES[talks]["talks"] if isinstance(talks, str) else talks
    thought = None if thoughts else entry.get("thought")
    spelt = SPELT_OUT.get(name, {})
    return [
        ([spelt.get(p, p) for p in ask if p != thought], [spelt.get(p, p) for p in say if p != thought])
        for ask, say in talks[title]
    ]


def conversation(title: str) -> Conversation:
    described = TALKS[title]
    # that tool reads an empty system message as none, and so do the readers of rows here
    system = [Message("system", described["system"])] if described["system"] else []
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(described["texts"])]
    return Conversation((*system, *turns))


def loaded(
    name: str, make: Callable[..., PreTrainedTokenizerFast] = byte_level, *, pieces: bool = False
) -> ChatTemplate:
    return load_template(make(tokens_of(name)), DataSpec(template=name), pieces=pieces)


def last_end(name: str) -> str:
    return EOS if NAMES[name].get("efficient_eos") and name not in ENDS_ONCE else ""


def test_every_name_is_there_and_every_difference_is_stated() -> None:
    assert NAMES.keys() | OURS == set(families.names())
    for name in TEXT_DIFFERS | ENDS_ONCE:
        assert families.find(name).differs, name


@pytest.mark.parametrize("name", ALIKE)
def test_text_and_what_is_learnt(name: str) -> None:
    template = loaded(name)
    thinking = families.find(name).thinking
    for title in TALKS:
        talk, turns = conversation(title), recorded(name, title)
        text = "".join(part for turn in turns for parts in turn for part in parts)
        assert template.rendering(talk) == text + last_end(name), title
        if thinking:
            continue
        places = [k for k, message in enumerate(talk.messages) if message.role == "assistant"]
        given = ""
        for k, (ask, say) in zip(places, turns, strict=True):
            given += "".join(ask)
            assert template.decode(template.prompt(Conversation(talk.messages[:k]))) == given, title
            given += "".join(say)
        options = EncodeOptions(max_length=4096, overflow="error", train_after_stop=True)
        samples = sft_sample(Row("demo", 0, talk), template, options).samples
        learnt = "".join(template.decode(s.input_ids[s.weights > 0].tolist()) for s in samples)
        # an earlier answer that has no end of its own is learnt with the token at which generation has to stop
        ended = ["".join(say) + last_end(name) for _, say in turns]
        assert learnt == "".join(ended), title


@pytest.mark.parametrize("make", [byte_level, metaspace], ids=["byte level", "metaspace"])
@pytest.mark.parametrize("name", PLAIN)
def test_pieces(name: str, make: Callable[..., PreTrainedTokenizerFast]) -> None:
    template = loaded(name, make, pieces=True)
    tokenizer = make(tokens_of(name))
    for title in TALKS:
        pieces = [part for turn in recorded(name, title) for parts in turn for part in parts]
        pieces += [last_end(name)] if last_end(name) else []
        expected = [i for part in pieces for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        assert template.encode(conversation(title)).input_ids == expected, title


@pytest.mark.parametrize("name", sorted(TEXT_DIFFERS))
def test_a_stated_difference_is_there(name: str) -> None:
    template = loaded(name)
    texts = [
        "".join(part for turn in recorded(name, title) for parts in turn for part in parts) + last_end(name)
        for title in TALKS
    ]
    assert [template.rendering(conversation(title)) for title in TALKS] != texts


@pytest.mark.parametrize("name", NAMES)
def test_end_and_stop_tokens(name: str) -> None:
    template, expected = loaded(name), NAMES[name]
    assert template.tokenizer.bos_token == BOS
    assert template.tokenizer.eos_token == OWN_END.get(name, expected["eos"])
    found = set(map(template.tokenizer.convert_ids_to_tokens, template.stop_ids))
    assert found >= set(expected["stop"]) - ({EOS} if name in OWN_END else set())
    ending = {str(template.tokenizer.convert_ids_to_tokens(i)) for i in template.end_token_ids}
    assert found - set(expected["stop"]) <= ending | {"<eos>", "<|role_end|>"}
