"""A named template that writes otherwise than the tokenizer's own is reported, with both texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from luthier.data.own_template import OwnTemplate
from luthier.data.template import load_template
from luthier.material import read_material
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec
from tiny_tokenizers import byte_level

TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def found(source: Any, name: str, **data: Any) -> str | None:
    tokenizer = byte_level(TOKENS, source)
    own = OwnTemplate.of(tokenizer)
    assert own is not None
    return own.difference(load_template(tokenizer, DataSpec(template=name, **data)))


def test_no_difference() -> None:
    assert found(CHATML, "chatml") is None
    assert found({"default": CHATML, "tool_use": "other"}, "chatml") is None
    assert found(CHATML, "tokenizer") is None
    assert OwnTemplate.of(byte_level(TOKENS)) is None


def test_both_texts_are_shown() -> None:
    assert found(CHATML, "default") == (
        "data.template=default is trained and saved in place of the tokenizer's own chat template, and writes "
        "otherwise\n  default: 'System: Be brief.</s>\\nHuman: How are you?</s>\\nAssistant:Fine.</s>\\n"
        "Human: Why?</s>\\nAssistant:It is sunny.</s>\\n'\n"
        "  its own: '<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHow are you?<|im_end|>\\n"
        "<|im_start|>assistant\\nFine.<|im_end|>\\n<|im_start|>user\\nWhy?<|im_end|>\\n"
        "<|im_start|>assistant\\nIt is sunny.<|im_end|>\\n'"
    )


def test_its_own_end_token_is_the_one_that_it_had() -> None:
    own = CHATML.replace("'<|im_end|>\n'", "eos_token + '\n'")
    text = found(own, "chatml")
    assert text is not None and "Be brief.</s>" in text.partition("its own:")[2]


def test_a_default_system_prompt_and_a_prompt_alone_count() -> None:
    text = found(CHATML, "qwen")
    assert text is not None and "qwen: '<|im_start|>system\\nYou are Qwen" in text and "Be brief" not in text
    text = found(CHATML, "chatml", default_system="Mine.")
    assert text is not None and "chatml: '<|im_start|>system\\nMine." in text
    thinking = CHATML.replace("assistant\n'", "assistant\n<think>'")
    text = found(thinking, "chatml")
    assert text is not None and text.endswith("Why?<|im_end|>\\n<|im_start|>assistant\\n<think>'")


def test_what_its_own_refuses() -> None:
    assert found(NO_SYSTEM, "chatml") == (
        "data.template=chatml is trained and saved in place of the tokenizer's own chat template, which does not "
        "write every conversation that this one writes: the chat template refuses it (no system)"
    )


@pytest.mark.parametrize(("name", "notes"), [("llama2", 1), ("chatml", 0), (None, 0)])
def test_a_run_says_it_once_as_text(name: str | None, notes: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    tree = {
        "model": {"path": "nowhere"},
        "data": {"train": [str(tmp_path / "rows.jsonl")], "template": name, "cache": str(tmp_path / "cache")},
        "stage": {"type": "sft"},
        "train": {"output": str(tmp_path / "run")},
    }
    said: list[str] = []
    read_material(load_recipe(tree).recipe, byte_level(TOKENS, CHATML), said.append)
    texts = [text for text in said if text.startswith("note: data.template")]
    assert len(texts) == notes
    # rich markup, in which [/INST] would close a tag
    assert all("llama2: '<s>[INST] <<SYS>>" in Text.from_markup(text).plain for text in texts)
