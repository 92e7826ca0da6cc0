"""The verb `templates`: the named chat templates, and what one makes of a short conversation."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from luthier.columns import aligned
from luthier.data import families
from luthier.show import example_text, quiet_libraries
from luthier.types import Conversation, DataError, Encoded, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM = Message("system", "You are a geographer.")
TURNS = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Japan?"),
    Message("assistant", "Tokyo."),
)
_LONGEST = 1 << 20


def listing() -> str:
    """One line for each named template: its name, the tokens at which generation stops, whether it has tools,
    reasoning and media, whether it is compared with a published template, and what it is.

    Needs no tokenizer and imports no torch.
    """
    found = [families.find(name) for name in families.names()]
    lines = [("name", "stops at", "has", "compared", "about")]
    lines += [
        (
            family.name,
            _stops(family),
            " ".join(_has(family)) or "-",
            "verified" if family.verified else "unverified",
            family.about,
        )
        for family in found
    ]
    return aligned(lines)


def shown(name: str, tokenizer: str | None = None) -> str:
    """A named template or .jinja file at work, as rich markup: a conversation with what is learnt of it marked.

    `tokenizer` is a folder or a hub name; the embedded model's where it is None, or, where that is not
    installed, the Jinja text alone. Raises DataError for an unknown template, and for one that the tokenizer
    cannot be trained with.
    """
    family = families.find(name)
    head = escape(
        "\n".join([f"{family.name}: {family.about}", f"stops at {_stops(family)}", *_facts(family)])
    )
    quiet_libraries()
    from luthier.model.load import EMBEDDED_INSTALL, EMBEDDED_PACKAGE

    if tokenizer is None and util.find_spec(EMBEDDED_PACKAGE) is None:
        source = family.source or "It is wherever a tokenizer has it."
        return (
            f"{head}\n\n{escape(source)}\n\n"
            f"This is the template itself. To see a conversation in it, with what is learnt marked, name a "
            f"tokenizer with --tokenizer, or install the embedded model: {EMBEDDED_INSTALL}"
        )
    try:
        return f"{head}\n{_sample(family, name, tokenizer)}"
    except DataError as error:
        if tokenizer is not None:
            raise
        raise DataError(
            f"{error}\nThis was tried with the embedded tokenizer; name another one with --tokenizer"
        ) from error


def _stops(family: families.Family) -> str:
    """The token that ends an answer, and the others at which generation stops."""
    return ", ".join((family.eos or "the tokenizer's end token", *family.stop))


def _has(family: families.Family) -> list[str]:
    """What it has a place for beside text."""
    parts = [("tools", family.tools), ("thinking", family.thinking), *((kind, True) for kind in family.media)]
    return [name for name, there in parts if there]


def _facts(family: families.Family) -> list[str]:
    """What the table says of it, a line each."""
    if family.source is None or family.about.endswith(".jinja"):
        return []
    system, thinking = family.default_system, family.thinking
    media = ", ".join(f"{kind} {token}" for kind, token in family.media.items())
    compared = f"compared with {', '.join(family.verified)}" if family.verified else "unverified"
    lines = [
        f"system prompt by default: {system}" if system else "",
        f"reasoning stands between {thinking[0]!r} and {thinking[1]!r}" if thinking else "",
        f"tools are written as: {family.tools}" if family.tools else "",
        f"media: {media}" if media else "",
        compared if family.verified else f"{compared}: no published template at hand to compare it with",
        f"differs: {family.differs}" if family.differs else "",
    ]
    return [line for line in lines if line]


def _sample(family: families.Family, name: str, tokenizer: str | None) -> str:
    from luthier.data.encode import EncodeOptions, sft_sample
    from luthier.data.template import load_template
    from luthier.recipe.schema import DataSpec

    loaded = _load(tokenizer)
    notes = _lend_end_token(loaded, family) if tokenizer is None else []
    template = load_template(loaded, DataSpec(template=name))
    options = EncodeOptions(_LONGEST, "error")

    def encoded(*messages: Message) -> Encoded:
        return sft_sample(Row("a conversation", 0, Conversation(messages)), template, options)

    result = encoded(SYSTEM, *TURNS)
    if result.lost.dropped is not None:
        notes.append(f"without a system message: {result.lost.dropped}")
        result = encoded(*TURNS)
    if result.lost.dropped is not None:
        notes.append(f"with one turn: {result.lost.dropped}")
        result = encoded(*TURNS[:2])
    if result.lost.dropped is not None:
        raise DataError(
            f"template {family.name!r} shows none of the sample conversations: {result.lost.dropped}"
        )
    if len(result.samples) > 1:
        notes.append("an answer that looks different once the conversation goes on is a sample of its own")
    texts = [example_text(sample, template.decode) for sample in result.samples]
    return "\n\n".join([*(escape(note) for note in notes), *texts])


def _load(tokenizer: str | None) -> PreTrainedTokenizerFast:
    from luthier.model.load import ModelSource, load_tokenizer, locate
    from luthier.recipe.schema import EMBEDDED_MODEL, ModelSpec

    spec = ModelSpec(path=tokenizer or EMBEDDED_MODEL)
    if spec.path == EMBEDDED_MODEL:
        return load_tokenizer(spec, locate(spec))
    folder = Path(spec.path).expanduser()
    if not folder.is_dir() and (spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1):
        raise DataError(f"--tokenizer {spec.path}: no such folder")
    local = folder.is_dir()
    return load_tokenizer(spec, ModelSource(str(folder) if local else spec.path, local=local))


def _lend_end_token(tokenizer: PreTrainedTokenizerFast, family: families.Family) -> list[str]:
    """Give the embedded tokenizer, for this sample, the tokens that end an answer in another model's template."""
    ends = (family.eos,) if family.eos is not None else family.stop
    lacking = [token for token in ends if token not in tokenizer.get_vocab()]
    if lacking:
        tokenizer.add_special_tokens({"additional_special_tokens": lacking})
    return [f"{token} is not in the embedded vocabulary and was added for this sample" for token in lacking]
