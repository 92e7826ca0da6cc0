"""The table of named templates: every name renders, learns and stops; what its entry says is what happens."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import resources
from typing import Any

import pytest
import yaml

from luthier.data import families
from luthier.data.families import Family
from luthier.data.gate import gate
from luthier.data.rendering import chat_messages
from luthier.data.template import ChatTemplate, load_template
from luthier.data.turns import CUT, Turns
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, Message, Row, RowError
from tiny_tokenizers import EOS, byte_level

FOLDER = resources.files("luthier") / "families"
TABLE: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "templates.yaml").read_text("utf-8"))
OWN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALKS = [
    Conversation((Message("user", "Q1?"), Message("assistant", "A1."))),
    Conversation(
        (
            Message("system", "Be\nbrief. 简短"),
            *(Message("user", "法国的首都？"), Message("assistant", "巴黎。\n\nParis 😀")),
            *(Message("user", "And {{ it }}?"), Message("assistant", "{% set %}")),
        )
    ),
    Conversation((Message("system", ""), Message("user", "a </s> b"), Message("assistant", "c"))),
]


def tokens_of(family: Family) -> list[str]:
    """What the vocabulary of a model with this template has."""
    # "###" is text at which generation stops, and no token of its own
    return [token for token in (family.eos, *family.stop) if token and token != "###"]


def lent(name: str) -> ChatTemplate:
    """The named template on a tokenizer that has what it ends answers with."""
    return load_template(byte_level(tokens_of(families.find(name)), OWN), DataSpec(template=name))


def test_an_entry_has_known_keys_and_no_file_is_left_over() -> None:
    known = {field.name for field in fields(Family)} - {"name", "marked_source"} | {"jinja", "turns"}
    assert list(TABLE) == sorted(TABLE) == families.names()
    for name, entry in TABLE.items():
        assert known >= entry.keys() and entry["about"], name
        assert not {"jinja", "turns"} <= entry.keys(), name
    used = {e.get("jinja", name) for name, e in TABLE.items() if "turns" not in e} - {"tokenizer"}
    found = {file.name for file in FOLDER.iterdir()}
    assert found == {f"{name}.jinja" for name in used} | {"templates.yaml", "tools"}


@pytest.mark.parametrize("name", families.names())
def test_every_name_renders_learns_and_stops(name: str) -> None:
    template = lent(name)
    encoded = 0
    for talk in TALKS:
        try:
            result = template.encode(talk)
        except RowError:
            continue
        encoded += 1
        saved = template.tokenizer.apply_chat_template(chat_messages(talk), tokenize=False)
        assert template.decode(result.input_ids) == template.rendering(talk) == saved
        for span in result.answers:
            given = template.prompt(Conversation(talk.messages[: span.message]))
            assert given == result.input_ids[: span.start]
            learnt = result.input_ids[span.start : span.stop]
            assert learnt[-1] in template.stop_ids and learnt[-1] in template.end_token_ids
            said = template.decode(learnt[:-1])
            assert talk.messages[span.message].content in said
        assert result.answers[-1].message == len(talk.messages) - 1
        assert gate(template, [Row("demo", 0, talk)]) == 1
    assert encoded == len(TALKS)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.get("default_system")])
def test_a_default_system_prompt_stands_where_there_is_none(name: str) -> None:
    without, given, empty = (lent(name).rendering(talk) for talk in TALKS)
    system = TABLE[name]["default_system"]
    assert without.count(system) == 1 and system not in given and system not in empty
    family = families.find(name)
    tokens = tokens_of(family)
    own = load_template(byte_level(tokens, OWN), DataSpec(template=name, default_system="Mine."))
    assert own.rendering(TALKS[0]) == without.replace(system, "Mine.")
    off = load_template(byte_level(tokens, OWN), DataSpec(template=name, default_system=""))
    assert system not in off.rendering(TALKS[0]) and "Q1?" in off.rendering(TALKS[0])


@pytest.mark.parametrize("name", families.names())
def test_a_translated_recipe_keeps_the_name(name: str) -> None:
    tree = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "dataset": "d", "template": name}
    assert load_recipe(tree).recipe.data.template == name


def test_the_tokenizers_own_by_name() -> None:
    named, unnamed = (
        load_template(byte_level((), OWN), DataSpec(template=name)) for name in ("tokenizer", None)
    )
    assert [named.rendering(talk) for talk in TALKS] == [unnamed.rendering(talk) for talk in TALKS]
    assert named.tokenizer.chat_template == OWN
    with pytest.raises(DataError, match=r"the tokenizer has no chat template; name one with data\.template"):
        load_template(byte_level(()), DataSpec(template="tokenizer"))


@pytest.mark.parametrize(
    ("wrong", "near"), [("qwen3_nothinking", "qwen3_nothink"), ("openchat3.6", "openchat-3.6")]
)
def test_an_unknown_name_gives_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(DataError, match=rf"no template '{wrong}'; did you mean {near}"):
        families.find(wrong)


def test_turns_are_written_as_jinja() -> None:
    turns = Turns(
        begin="{bos}",
        system='<s y="1">{content}</s>\n',
        user="U: {content}{eos}",
        opening="{bos}A:",
        assistant="{content}",
        last="{eos}",
        earlier="|",
        tool="T: {content}",
    )
    source = turns.jinja.replace(CUT, "")
    tokenizer = byte_level((), source)
    chat = [
        {"role": "system", "content": "S"},
        *({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}),
        *({"role": "tool", "content": "R"}, {"role": "assistant", "content": "B"}),
    ]
    text = f'<s><s y="1">S</s>\nU: Q{EOS}<s>A:A|T: R<s>A:B{EOS}'
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f'<s><s y="1">S</s>\nU: Q{EOS}<s>A:'
    assert json.dumps('<s y="1">') in source
    # where pieces end: after begin and end tokens and the system message, and before the end of the last answer
    marked = turns.jinja.replace("{{- cut -}}", "{{- '/' -}}")
    tokenizer.chat_template = marked
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        f'<s>/<s y="1">S</s>\n/U: Q/{EOS}/<s>/A:A/|T: R<s>/A:B/{EOS}/'
    )
    merged = byte_level(
        (), Turns(user="[{content}]", opening="", system="{content}+", system_in_user=True).jinja
    )
    merged.chat_template = str(merged.chat_template).replace(CUT, "")
    assert merged.apply_chat_template(chat[:3], tokenize=False) == f"[S+Q]A{EOS}"
    with pytest.raises(Exception, match="this template has no role tool"):
        merged.apply_chat_template(chat, tokenize=False)
