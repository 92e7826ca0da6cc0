"""What TRL learns with `assistant_only_loss` and what is learnt here, token by token, with the same tokenizer.

TRL replaces a vendor's template by a training one with `{% generation %}` marks; here the named template of the same
family is used. Every difference is listed with its reason in docs/templates.md: one that is not listed fails, and so
does a listed one that has vanished. The tokenizer has a token for each byte and each control token, so that no bound of
a mask is hidden inside of one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from luthier.data import families
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.rendering import chat_messages
from luthier.data.template import ChatTemplate, load_template
from luthier.recipe.schema import DataSpec
from luthier.recipe.thinking import ThinkingSpec
from luthier.types import Conversation, Row
from tiny_tokenizers import byte_level
from vendors import CONVERSATIONS, REFERENCES, control_tokens, source_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "templates.md"
KEPT = ThinkingSpec(history="keep", empty="learn")
POLICIES = {"": ThinkingSpec(), " kept": KEPT}
"""By what stands behind the family's name in the table: the default, and what TRL's templates of Qwen do."""
_THOUGHT = re.compile(
    r"^Ċ?(?:⟦<think>⟧Ċ?)?[^⟦]*⟦</think>⟧Ċ*"
    r"|^⟦<\|channel\|>⟧analysis⟦<\|message\|>⟧[^⟦]*⟦<\|end\|>⟧⟦<\|start\|>⟧assistant"
)
_OPENED = re.compile(r"⟦<think>⟧Ċ?$")


def _has_training(name: str) -> bool:
    try:
        return source_of(f"{REFERENCES[name].template}_training") is not None
    except FileNotFoundError:
        return False


FAMILIES = [
    name
    for name in REFERENCES
    if name in families.names() and REFERENCES[name].template.startswith("trl/") and _has_training(name)
]
NAMES = [*FAMILIES, *(f"{name} kept" for name in ("qwen3", "qwen3_5", "qwen3_6"))]


@dataclass(frozen=True, slots=True)
class Learnt:
    """Tokens that are learnt in a row, and all that stand before them; control tokens between ⟦ and ⟧."""

    before: str
    text: str


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    reference = REFERENCES[name]
    plain, training = source_of(reference.template), source_of(f"{reference.template}_training")
    assert plain is not None and training is not None
    special = {*control_tokens(plain, ""), *control_tokens(training, ""), "<think>", "</think>"}
    special |= {token for token in (reference.bos, reference.eos, families.find(name).eos) if token}
    described = json.loads(byte_level().backend_tokenizer.to_str())
    described["model"]["merges"] = []
    backend = Tokenizer.from_str(json.dumps(described))
    backend.add_special_tokens(sorted(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=reference.bos or None,
        eos_token=reference.eos,
        unk_token="<unk>",
        chat_template=plain,
    )


def runs(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], mask: Sequence[float]) -> Iterator[Learnt]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    spelled = [f"⟦{t}⟧" if t in special else t for t in tokenizer.convert_ids_to_tokens(list(ids))]
    start = None
    for at, learnt in enumerate([*mask, 0]):
        if learnt and start is None:
            start = at
        elif not learnt and start is not None:
            yield Learnt("".join(spelled[:start]), "".join(spelled[start:at]))
            start = None


def theirs(name: str, talk: Conversation) -> list[Learnt] | None:
    """What TRL's SFTTrainer makes of a row with `messages` and `tools`; None where the template refuses it."""
    tokenizer, messages = tokenizer_of(name), chat_messages(talk)
    if name == "gpt_oss":  # whose template reads another field
        for message in messages:
            message |= (
                {"thinking": message.pop("reasoning_content")} if "reasoning_content" in message else {}
            )
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=source_of(f"{REFERENCES[name].template}_training"),
            tools=list(talk.tools) or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except jinja2.TemplateError:
        return None
    return list(runs(tokenizer, encoded["input_ids"], encoded["assistant_masks"]))


@cache
def template_of(name: str, policy: str) -> ChatTemplate:
    own = copy.deepcopy(tokenizer_of(name))  # which gets the family's end token
    return load_template(own, DataSpec(template=name, thinking=POLICIES[policy]))


def ours(name: str, policy: str, talk: Conversation) -> list[list[Learnt]]:
    """What each sample learns; none where the row is dropped."""
    options = EncodeOptions(max_length=10_000, overflow="error")
    samples = sft_sample(Row("rows", 0, talk), template_of(name, policy), options).samples
    return [
        list(runs(tokenizer_of(name), sample.input_ids.tolist(), sample.weights.tolist()))
        for sample in samples
    ]


def between(here: Learnt, there: Learnt, *, shared: bool) -> set[str]:
    """The words for what makes the second one of the first one; `shared`: other samples have the answers before it."""
    words, text, before = set[str](), there.text, there.before
    if text.endswith("⟧Ċ") and not here.text.endswith("Ċ"):
        words.add("newline")
        text = text.removesuffix("Ċ")
    ends = [re.search(r"⟦[^⟧]*⟧$", one) for one in (here.text, text)]
    if all(ends) and ends[0][0] != ends[1][0]:  # type: ignore[index]
        words.add("end token")
        text = text.removesuffix(ends[1][0]) + ends[0][0]  # type: ignore[index]
    if _THOUGHT.search(here.text) and not text.endswith(here.text):
        bare = _THOUGHT.sub("", text)  # another one, if any
        shown = _THOUGHT.sub("", here.text)
        if bare.endswith(shown):
            words.add("thought")
            here, text = Learnt(_OPENED.sub("", here.before), shown), bare
    if text != here.text and here.before.endswith(text.removesuffix(here.text)):
        words.add("prompt")
        text, before = here.text, before + text.removesuffix(here.text)
    if text != here.text:
        return {"text"}
    if before != here.before:
        words.add("own sample" if shared else "context")
    return words


def differences(name: str, policy: str, talk: Conversation) -> set[str]:
    here, there = ours(name, policy, talk), theirs(name, talk)
    if not here or there is None:
        return set() if not here and there is None else {"refused" if there is None else "dropped"}
    answers = [(one, len(here) > 1) for sample in here for one in sample]
    if len(answers) != len(there):
        return {"text"}
    found = [
        set[str]().union(
            *(between(one, other, shared=shared) for (one, shared), other in zip(order, there, strict=True))
        )
        for order in permutations(answers)
    ]
    return min(found, key=lambda words: ("text" in words, len(words)))


def listed() -> dict[tuple[str, str], set[str]]:
    """By family and pattern of conversations: the differences that the document states."""
    table: dict[tuple[str, str], set[str]] = {}
    for line in DOCUMENT.read_text("utf-8").split("<!-- trl -->")[1].splitlines():
        if line.startswith("| `"):
            names, where, what = (cell.strip() for cell in line.strip("|").split("|")[:3])
            for name in re.findall(r"`([^`]+)`", names):
                for pattern in re.findall(r"`([^`]+)`", where):
                    table.setdefault((name, pattern), set()).add(what)
    return table


@pytest.mark.parametrize("named", NAMES)
def test_what_is_learnt_is_what_trl_learns_or_the_difference_is_listed(named: str) -> None:
    name, _, policy = named.partition(" ")
    rows = {pattern: words for (of, pattern), words in listed().items() if of == named}
    used = set[tuple[str, str]]()
    for title, talk in CONVERSATIONS.items():
        known = {
            (pattern, word) for pattern, words in rows.items() for word in words if fnmatch(title, pattern)
        }
        used |= known
        found = differences(name, f" {policy}" if policy else "", talk)
        assert found == {word for _, word in known}, (
            f"{title}: {ours(name, f' {policy}' if policy else '', talk)} {theirs(name, talk)}"
        )
    assert used == {(pattern, word) for pattern, words in rows.items() for word in words}


def test_every_family_with_a_training_template_of_trl_is_compared() -> None:
    assert {named for named, _ in listed()} <= set(NAMES)
    assert len(FAMILIES) >= 14
