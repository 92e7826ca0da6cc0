"""The template that a recipe asks for, put on its tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.data import families
from luthier.data.chat_template import ChatTemplate as ChatTemplate
from luthier.data.rendering import with_default_system
from luthier.data.thinking_policy import with_thinking
from luthier.recipe.schema import DataSpec, TemplateSpec
from luthier.types import DataError


def load_template(
    tokenizer: PreTrainedTokenizerBase, spec: DataSpec, *, pieces: bool = False
) -> ChatTemplate:
    """The template that a recipe asks for, installed on the tokenizer so that it is saved with the model.

    A named template (or a .jinja file, or four strings) replaces `tokenizer.chat_template` and, where the family has
    its own end token, `tokenizer.eos_token`; `default_system` (or else the family's) and `thinking` become part of the
    template. A tokenizer without a pad token gets its end token. `pieces`: see `chat_template`. Raises DataError for an
    unknown name, a tokenizer without chat template, an end token that the vocabulary lacks, and tokenizers without a
    fast backend.
    """
    family, marked = install_template(tokenizer, spec)
    return ChatTemplate(
        tokenizer,
        family=family,
        parse_special_tokens=spec.parse_special_tokens,
        marked=marked if pieces else None,
        thinking=spec.thinking,
    )


def install_template(
    tokenizer: PreTrainedTokenizerBase, spec: DataSpec
) -> tuple[families.Family | None, str | dict[str, str]]:
    """Put the recipe's template on the tokenizer, as `load_template` says; the family, and the text with its marks."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} has no fast (Rust) backend; convert it to a tokenizer.json first"
        )
    family = _family(tokenizer, spec.template)
    if spec.tool_format is not None:
        family = families.with_tool_format(family, spec.tool_format)
    marked: str | dict[str, str] | None = tokenizer.chat_template
    if family is not None:
        marked = family.marked_source or marked
        if family.eos is not None:
            _use_as_eos(tokenizer, family.eos, family.name)
    if not marked:
        raise DataError(
            "the tokenizer has no chat template; name one with data.template, such as chatml, alpaca or default; "
            "`luthier templates` lists them all"
        )
    special = {**tokenizer.special_tokens_map, "cut": ""}
    marked = _each(marked, lambda source: with_thinking(source, spec.thinking, special))
    system = spec.default_system
    if system is None and family is not None:
        system = family.default_system
    if system is not None:
        marked = _each(marked, lambda source: with_default_system(source, system))
    tokenizer.chat_template = _each(marked, lambda source: source.replace(families.CUT, ""))
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token (eos_token), so nothing could end an answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return family, marked


def _family(tokenizer: PreTrainedTokenizerBase, wanted: str | TemplateSpec | None) -> families.Family | None:
    if isinstance(wanted, TemplateSpec):
        return families.from_strings(wanted, begin=_begins_texts(tokenizer))
    return None if wanted is None else families.find(wanted)


def _begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself writes its begin token before every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and (
        tokenizer("a")["input_ids"][0] == bos or bool(getattr(tokenizer, "add_bos_token", False))
    )


def _each(template: str | dict[str, str], change: Any) -> Any:
    return (
        {key: change(source) for key, source in template.items()}
        if isinstance(template, dict)
        else change(template)
    )


def _use_as_eos(tokenizer: PreTrainedTokenizerBase, eos: str, name: str) -> None:
    if eos not in tokenizer.get_vocab():
        raise DataError(
            f"template {name!r} ends answers with {eos!r}, which the tokenizer's vocabulary lacks; "
            "choose a template that uses the tokenizer's own end token, such as default or alpaca"
        )
    tokenizer.eos_token = eos
