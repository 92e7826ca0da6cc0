"""Vendors' own chat templates, as tokenizers bring them: each can be trained, or a clear error says why not.

docs/templates.md has the outcome of each; a changed one fails. TRL's are tested everywhere, llama.cpp's where
LUTHIER_VENDORS names a folder that holds them (README.md in this folder).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from luthier.data.gate import gate
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, Row, RowError
from tiny_tokenizers import byte_level
from vendors import CONVERSATIONS, PROBES, control_tokens, folder, source_of, templates

DOCUMENT = Path(__file__).parents[2] / "docs" / "templates.md"
REASONS = {
    "the prompt is not a prefix of the training text": "prompt",
    "the stop token is not supervised": "no end",
    "has no place for": "no place",
    "the chat template refuses it": "refused",
    "leaves out": "left out",
    "generated span": "span",
}
"""What an error says -> what the table says; both are explained above the table."""


def outcome(template: ChatTemplate, talk: Conversation) -> str:
    """`learnt`, or the word of the table for the error."""
    try:
        encoded = template.encode(talk)
        assert gate(template, [Row("vendor", 0, talk)]) == 1
    except (DataError, RowError) as error:
        return next((word for text, word in REASONS.items() if text in str(error)), str(error))
    last = encoded.answers[-1]
    assert last.message == len(talk.messages) - 1
    learnt = template.decode(encoded.input_ids[last.start : last.stop])
    assert talk.messages[-1].content in learnt
    if talk.messages[-1].reasoning and talk.messages[-1].reasoning.strip() not in learnt:
        return "left out"
    return "learnt"


def outcomes(name: str) -> list[str]:
    source = source_of(name)
    assert source is not None
    tokenizer = byte_level(control_tokens(source, name.partition("/")[2]))
    tokenizer.chat_template = source
    template = load_template(tokenizer, DataSpec())
    return [outcome(template, CONVERSATIONS[title]) for title in PROBES]


def table() -> dict[str, list[str]]:
    """The outcomes that the document states."""
    text = DOCUMENT.read_text("utf-8").split("<!-- outcomes -->")[1]
    rows = (re.findall(r"[^|]+", line) for line in text.splitlines() if line.startswith("| `"))
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:4]] for cells in rows}


@pytest.mark.parametrize("name", templates())
def test_outcome_is_the_one_that_is_documented(name: str) -> None:
    assert outcomes(name) == table()[name]


def test_every_template_is_in_the_table() -> None:
    stated = set(table())
    assert len(stated) == 142
    if folder() is None:
        stated = {name for name in stated if name.startswith("trl/")}
    assert stated == set(templates())
    assert {cell for row in table().values() for cell in row} <= {"learnt", *REASONS.values()}
