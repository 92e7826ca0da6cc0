"""Named templates against those that their vendors publish, text by text and, with real tokenizers, token by token.

The vendors' texts are known by their hashes (README.md in this folder says how they are recorded). Every difference is
listed with its reason in docs/templates.md: one that is not listed fails, and so does a listed one that has vanished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.data import families
from luthier.data.rendering import chat_messages
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, RowError
from tiny_tokenizers import byte_level
from vendors import CONVERSATIONS, REFERENCES, Reference, cases, folder, short_hash, source_of

ROOT = Path(__file__).parents[2]
RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "vendor_renderings.json").read_text("utf-8")
)
NAMES = [name for name in REFERENCES if name in families.names()]
_THOUGHT = re.compile(r"<think>\n.*?\n</think>\n\n", re.DOTALL)
MENDS: dict[str, Callable[[str, Reference], str]] = {
    "end token": lambda text, reference: text.removesuffix(reference.eos),
    "end of text": lambda text, reference: text + reference.eos,
    "thought": lambda text, _: _THOUGHT.sub("", text),
    "empty thought": lambda text, _: text.replace("<think></think>", "</think>"),
}
"""Differences that can be undone: what is left has to be the vendor's text."""


def listed() -> Iterator[tuple[str, str, str]]:
    """The rows of the table of differences: family, pattern of cases, name of the difference."""
    text = (ROOT / "docs" / "templates.md").read_text("utf-8")
    table = text.split("<!-- differences -->")[1]
    for line in table.splitlines():
        if line.startswith("| `"):
            names, where, what = (cell.strip() for cell in line.strip("|").split("|")[:3])
            for name in re.findall(r"`([^`]+)`", names):
                for pattern in re.findall(r"`([^`]+)`", where):
                    yield name, pattern, what


LISTED = list(listed())


@cache
def installed(name: str) -> str:
    """The template that a recipe with this name saves."""
    tokens = [token for token in (families.find(name).eos, REFERENCES[name].eos) if token]
    tokenizer = load_template(byte_level(tokens), DataSpec(template=name)).tokenizer
    return str(tokenizer.chat_template)


def comparable(name: str, case: str) -> bool:
    """Whether the template has a place for what the conversation holds (the tool formats name reasoning only to pass
    it on to the layout)."""
    if case.startswith("tools"):
        return "tool_calls" in installed(name)
    if case.startswith("reasoning_in") or not case.startswith("reasoning"):
        return True
    return "reasoning_content" in families.find(name).layout


@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_vendors_or_the_difference_is_listed(name: str) -> None:
    reference, expected = REFERENCES[name], RECORDED[name]["cases"]
    source = installed(name)
    ours = {case: text for case, text in cases(source, reference).items() if comparable(name, case)}
    rows = [(pattern, what) for family, pattern, what in LISTED if family == name]
    used = set()
    for case in ours.keys() & expected.keys():
        text, known = ours[case], [row for row in rows if fnmatch(case, row[0])]
        used.update(known)
        if not known:
            assert short_hash(text) == expected[case], f"{case}: {text!r} is not the vendor's text"
            continue
        assert short_hash(text) != expected[case], f"{case}: listed as different, but it is the vendor's text"
        if all(what in MENDS for _, what in known):
            for _, what in known:
                text = MENDS[what](text, reference)
            assert short_hash(text) == expected[case], f"{case} without {known}: {text!r} is not the vendor's"
    assert used == set(rows), "listed, but no conversation shows it"
    assert len(ours.keys() & expected.keys()) >= 20


def test_every_listed_difference_is_of_a_verified_family() -> None:
    assert {family for family, _, _ in LISTED} <= REFERENCES.keys()


@pytest.mark.parametrize("name", REFERENCES)
def test_hashes_are_those_of_the_vendors_files(name: str) -> None:
    reference = REFERENCES[name]
    source = source_of(reference.template)
    if source is None:
        pytest.skip(f"LUTHIER_VENDORS is not set, and {reference.template} lies there")
    assert RECORDED[name]["template"] == reference.template
    assert RECORDED[name]["sha256"] == short_hash(source)
    assert RECORDED[name]["cases"] == {k: short_hash(text) for k, text in cases(source, reference).items()}


def test_the_table_says_which_families_are_verified() -> None:
    entries = yaml.safe_load((ROOT / "src" / "luthier" / "families" / "templates.yaml").read_text("utf-8"))
    said = {name: [v for v in entry.get("verified", ()) if "/" in v] for name, entry in entries.items()}
    assert {name: found for name, found in said.items() if found} == {
        name: [REFERENCES[name].template] for name in NAMES
    }


def _tokenizer(reference: Reference) -> PreTrainedTokenizerBase:
    found = folder()
    if found is None:
        pytest.skip("LUTHIER_VENDORS is not set, and real tokenizers lie there")
    path = found / str(reference.tokenizer)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path)


WITH_TOKENIZER = [name for name in NAMES if REFERENCES[name].tokenizer]
TALKS = ("system", "many_turns", "special_tokens", "chinese", "emoji", "reasoning_history", "tools_content")


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_tokens_are_those_of_the_vendors_text(name: str) -> None:
    """Special tokens in text included, which become special where `parse_special_tokens` says so."""
    reference = REFERENCES[name]
    tokenizer = _tokenizer(reference)
    source = source_of(reference.template)
    special = {"bos_token": reference.bos, "eos_token": reference.eos}
    tokenizer.add_special_tokens({key: token for key, token in special.items() if token})
    template = load_template(tokenizer, DataSpec(template=name, parse_special_tokens=True))
    compared = 0
    for title in TALKS:
        talk = CONVERSATIONS[title]
        if not comparable(name, title):
            continue
        before = Conversation(talk.messages[:-1], talk.tools)
        if any(family == name and fnmatch(f"{title}/prompt", pattern) for family, pattern, _ in LISTED):
            continue
        theirs = tokenizer.apply_chat_template(
            chat_messages(before),
            tools=list(talk.tools) or None,
            chat_template=source,
            add_generation_prompt=True,
            tokenize=False,
            **special,
        )
        ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
        if not any(message.role == "assistant" for message in before.messages):
            assert template.prompt(before) == ids, title
        assert template.decode(template.prompt(before)) == template.decode(ids), title
        compared += 1
        if any(family == name and fnmatch(f"{title}/text", pattern) for family, pattern, _ in LISTED):
            continue
        whole = tokenizer.apply_chat_template(
            chat_messages(talk),
            tools=list(talk.tools) or None,
            chat_template=source,
            tokenize=False,
            **special,
        )
        assert template.whole(talk) == tokenizer(whole, add_special_tokens=False)["input_ids"], title
    assert compared >= 4


@pytest.mark.parametrize("name", NAMES)
def test_answers_can_be_learnt(name: str) -> None:
    """Prompt and answer part where the template says, for every conversation that it takes."""
    reference = REFERENCES[name]
    tokens = [token for token in (families.find(name).eos, reference.bos, reference.eos) if token]
    template = load_template(byte_level([*tokens, "<|call|>", "<|end|>"]), DataSpec(template=name))
    learnt, refused = 0, []
    for title in ("plain", "many_turns", "reasoning", "reasoning_history", "tools", "tools_content"):
        talk = CONVERSATIONS[title]
        try:
            encoded = template.encode(talk)
        except RowError:
            continue
        except DataError as error:
            # reasoning, after a prompt that has closed it
            refused.append((title, "not a prefix" in str(error)))
            continue
        last = encoded.answers[-1]
        assert last.message == len(talk.messages) - 1
        answer = template.decode(encoded.input_ids[last.start : last.stop])
        assert talk.messages[-1].content in answer
        if talk.messages[-1].reasoning:
            assert talk.messages[-1].reasoning.strip() in answer
        assert encoded.input_ids[last.stop - 1] in template.end_token_ids
        learnt += 1
    assert learnt >= 2
    assert set(refused) <= (
        {("reasoning", True), ("reasoning_history", True)} if name == "qwen3_5_nothink" else set()
    )
