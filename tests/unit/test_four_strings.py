"""The user's own template in four strings: prefix, prompt, separator, use_history."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.gate import gate
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec, TemplateSpec
from luthier.types import Conversation, DataError, Message, RecipeError, Row, RowError
from tiny_tokenizers import BOS, EOS, byte_level, metaspace

ODD = "Quote \" and \\ and ' {{ braces }} {% set x = 1 %} {# no #} \t\r\n é 😀 \x01 "


def written_out(
    spec: TemplateSpec, texts: list[str], system: str | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """The text of the first versions of LLaMA-Factory, plainly: (all of it, [prompt and answer of each turn])."""
    prefix = spec.prefix if system is None else system
    text = prefix + spec.separator if prefix else ""
    turns = []
    for i in range(0, len(texts), 2):
        text += (spec.separator if i else "") + spec.prompt.replace("{query}", texts[i])
        turns.append((text, texts[i + 1] + EOS))
        text += texts[i + 1] + EOS
    return text, turns


def talk(texts: list[str], system: str | None = None) -> Conversation:
    first = () if system is None else (Message("system", system),)
    roles = ("user", "assistant")
    return Conversation((*first, *(Message(roles[i % 2], text) for i, text in enumerate(texts))))


def load(spec: TemplateSpec, make: Any = byte_level, **data: Any) -> ChatTemplate:
    return load_template(make(), DataSpec(template=spec, **data))


SPECS = {
    "defaults": TemplateSpec(),
    "ziya": TemplateSpec(prompt="<human>:{query}\n<bot>:"),
    "prefix": TemplateSpec(prefix="Be kind.", prompt="Human: {query}\nAssistant: ", separator="\n\n"),
    "control tokens": TemplateSpec(prompt="<s>{query}</s>", separator="</s>"),
    "odd": TemplateSpec(prefix=ODD, prompt=f"{ODD}{{query}}{ODD}", separator=ODD),
    "nothing": TemplateSpec(prompt="{query}", separator=""),
}


# SentencePiece's kind puts spaces around control tokens and lacks some characters
CASES = [(name, byte_level) for name in SPECS] + [
    (name, metaspace) for name in ("defaults", "ziya", "nothing")
]


@pytest.mark.parametrize("system", [None, "You are\na model."])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_text_and_mask(name: str, system: str | None, make: Any) -> None:
    spec, texts = SPECS[name], ["Hello there!", "Fine.", "What is it?", "It is a test."]
    template = load(spec, make)
    conversation = talk(texts, system)
    text, turns = written_out(spec, texts, system)
    assert template.rendering(conversation) == text
    assert gate(template, [Row("demo", 0, conversation)]) == 1
    encoded = template.encode(conversation)
    assert template.decode(encoded.input_ids) == text
    found = [
        (template.decode(encoded.input_ids[: a.start]), template.decode(encoded.input_ids[a.start : a.stop]))
        for a in encoded.answers
    ]
    if make is byte_level:
        assert found == turns
    first = len(conversation.messages) - 3
    prompt = template.prompt(Conversation(conversation.messages[:first]))
    assert prompt == encoded.input_ids[: encoded.answers[0].start]
    (sample,) = sft_sample(Row("demo", 0, conversation), template, EncodeOptions(512, "error")).samples
    ends = [int(i) for i in sample.input_ids[sample.weights > 0] if i == template.tokenizer.eos_token_id]
    assert len(ends) == 2
    learnt = template.decode(sample.input_ids[sample.weights > 0].tolist())
    assert learnt.replace(" ", "") == "".join(answer for _, answer in turns).replace(" ", "")


def test_a_prompt_that_ends_with_a_space_is_not_for_every_tokenizer() -> None:
    conversation = talk(["What is it?", "It is a test."])
    assert load(SPECS["prefix"]).encode(conversation).answers
    with pytest.raises(RowError, match="merges the prompt's end with the answer's beginning"):
        load(SPECS["prefix"], metaspace).encode(conversation)


def test_the_four_strings_of_ziya_are_the_named_template() -> None:
    texts = ["Q1", "A1", "Q2", "A2"]
    for system in (None, "S"):
        own = load(SPECS["ziya"]).rendering(talk(texts, system))
        named = load_template(byte_level(), DataSpec(template="ziya")).rendering(talk(texts, system))
        assert named == BOS + own


def test_a_tokenizer_that_begins_texts_with_a_token_begins_these_too() -> None:
    tokenizer = byte_level()
    plain = load_template(tokenizer, DataSpec(template=SPECS["ziya"])).encode(talk(["a", "b"])).input_ids
    adding = byte_level()
    adding.add_bos_token = True
    begun = load_template(adding, DataSpec(template=SPECS["ziya"])).encode(talk(["a", "b"])).input_ids
    assert begun == [adding.bos_token_id, *plain]


def test_a_default_system_prompt_replaces_the_prefix() -> None:
    conversation = talk(["a", "b"])
    spec = SPECS["prefix"]
    assert load(spec).rendering(conversation).startswith("Be kind.\n\nHuman: a\n")
    assert load(spec, default_system="Be brief.").rendering(conversation).startswith("Be brief.\n\nHuman: a")
    assert load(spec, default_system="").rendering(conversation).startswith("Human: a\n")
    own = talk(["a", "b"], "Own.")
    assert load(spec, default_system="Be brief.").rendering(own).startswith("Own.\n\nHuman: a")


def test_without_history_several_turns_are_refused() -> None:
    spec = TemplateSpec(prompt="{query}: ", use_history=False)
    template = load(spec)
    assert template.rendering(talk(["a", "b"], "S")) == "S\na: b</s>"
    with pytest.raises(RowError) as caught:
        template.encode(talk(["a", "b", "c", "d"]))
    assert caught.value.reason == (
        "the chat template refuses it (this template shows one turn only: use_history is false)"
    )
    encoded = sft_sample(Row("demo", 0, talk(["a", "b", "c", "d"])), template, EncodeOptions(64, "drop"))
    assert encoded.samples == () and encoded.lost.dropped == caught.value.reason


@pytest.mark.parametrize(
    ("messages", "role"),
    [
        ((Message("user", "a"), Message("tool", "b"), Message("assistant", "c")), "tool"),
        ((Message("assistant", "b"),), "assistant"),
        ((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "user"),
        ((Message("user", "a"), Message("system", "b"), Message("assistant", "c")), "system"),
    ],
)
def test_other_orders_of_roles_are_refused(messages: tuple[Message, ...], role: str) -> None:
    with pytest.raises(RowError) as caught:
        load(TemplateSpec()).encode(Conversation(messages))
    assert caught.value.reason == (
        f"the chat template refuses it (this template has no place here for role {role})"
    )


def test_control_tokens_of_users_stay_text() -> None:
    template = load(SPECS["control tokens"])
    plain = template.encode(talk(["a", "b", "c", "d"])).input_ids
    evil = template.encode(talk(["a</s><s>", "</s>b", "<s>", "d</s>"])).input_ids
    special = {template.tokenizer.bos_token_id, template.tokenizer.eos_token_id}
    assert [i for i in evil if i in special] == [i for i in plain if i in special]
    assert (
        template.decode(evil)
        == written_out(SPECS["control tokens"], ["a</s><s>", "</s>b", "<s>", "d</s>"])[0]
    )


def test_the_saved_tokenizer_renders_what_was_trained(tmp_path: Path, smollm2: Path) -> None:
    """On a real tokenizer: saved, loaded again by transformers alone, token by token."""
    spec = TemplateSpec(prefix="A chat.", prompt="USER: {query} ASSISTANT:", separator="\n")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2)
    template = load_template(tokenizer, DataSpec(template=spec, default_system=None))
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    conversation = talk(["What is 1+1?", " It is 2.", "Why?\n", " Because."])
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    eos = tokenizer.eos_token
    expected = f"A chat.\nUSER: What is 1+1? ASSISTANT: It is 2.{eos}\nUSER: Why?\n ASSISTANT: Because.{eos}"
    assert reloaded.apply_chat_template(messages, tokenize=False) == expected
    encoded = template.encode(conversation)
    assert encoded.input_ids == reloaded.apply_chat_template(messages, return_dict=False)
    for span, answer in zip(encoded.answers, [" It is 2.", " Because."], strict=True):
        prompt = reloaded.apply_chat_template(
            messages[: span.message], add_generation_prompt=True, return_dict=False
        )
        assert encoded.input_ids[: span.start] == prompt
        assert tokenizer.decode(encoded.input_ids[span.start : span.stop]) == answer + eos
    again = ChatTemplate(reloaded)
    assert again.encode(conversation) == encoded


def test_it_is_part_of_the_fingerprint() -> None:
    specs = [*SPECS.values(), TemplateSpec(prefix="x"), TemplateSpec(use_history=False)]
    assert len({load(spec).fingerprint for spec in specs}) == len(specs)
    assert load(TemplateSpec()).fingerprint == load(TemplateSpec()).fingerprint


@pytest.mark.parametrize("prompt", ["no place", "{query} and {query}", "{{query}}"])
def test_a_prompt_without_its_place_is_refused(prompt: str) -> None:
    tree = {"model": {"path": "m"}, "data": {"train": ["a"], "template": {"prompt": prompt}}}
    with pytest.raises(RecipeError, match=re.escape("should contain {query} exactly once, in single braces")):
        load_recipe(tree)


def test_no_template_and_no_chat_template_still_names_the_choices() -> None:
    with pytest.raises(DataError, match=r"has no chat template; name one with data\.template"):
        load_template(byte_level(), DataSpec())
