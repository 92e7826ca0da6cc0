"""`MediaTemplate`: a chat template whose conversations hold images, films and sounds.

The model's own template writes one placeholder for each medium, and the model's own processor says what takes its
place (`media_tokens`). Both happen before the text is cut and tokenized, so everything that holds of a `ChatTemplate`
holds here: the prompt is a true token prefix, special tokens in a user's words stay words.

A template that knows no media (a named one, say) is given the placeholders of the model's own template, and is saved
with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from luthier.data import families
from luthier.data.encode import media_of
from luthier.data.media_tokens import MediaReader
from luthier.data.rendering import ChatMessage, Renderer, Variables
from luthier.data.template import ChatTemplate, install_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, EncodedConversation, Part, RowError

_BEFORE, _AFTER = "Before.", "After."


def load_media_template(
    tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin, spec: DataSpec, *, pieces: bool = False
) -> MediaTemplate:
    """The recipe's template for a model with a processor, installed on the tokenizer and the processor.

    Without `data.template` it is the processor's own. Raises DataError as `load_template` does, and ModelError for a
    processor that cannot be asked.
    """
    own: Any = processor.chat_template or tokenizer.chat_template
    reader = MediaReader(processor, spec.media, llamafactory=spec.rules == "llamafactory")
    tokenizer.chat_template = own
    family, marked = install_template(tokenizer, spec)
    variables = dict(tokenizer.special_tokens_map)
    if isinstance(marked, str) and not _shows_text(Renderer(marked, variables)):
        marked = _LISTS + marked
        tokenizer.chat_template = marked.replace(families.CUT, "")
    if isinstance(marked, str) and not _shows_media(Renderer(marked, variables), reader):
        marked = with_media_parts(marked, _placeholders(own, variables, reader))
        tokenizer.chat_template = marked.replace(families.CUT, "")
    processor.chat_template = tokenizer.chat_template
    reader.processor.tokenizer = tokenizer
    return MediaTemplate(
        tokenizer,
        reader,
        family=family,
        parse_special_tokens=spec.parse_special_tokens,
        marked=marked if pieces else None,
        thinking=spec.thinking,
    )


_LISTS = (
    "{%- set listed = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set listed.messages = listed.messages + "
    "[dict(message, content=[{'type': 'text', 'text': message['content']}])] -%}"
    "{%- else -%}{%- set listed.messages = listed.messages + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = listed.messages -%}"
)
"""Put before a template that takes nothing but lists of parts, so that it takes plain texts too."""


MEDIA_PARTS = "{%- set messages = plain.messages -%}"
"""What `with_media_parts` writes right before the template."""


def with_media_parts(source: str, placeholders: dict[str, str]) -> str:
    """The same template, for which a list of parts is its text with a placeholder for each medium."""
    cases = "".join(
        f"{{%- if part['type'] == '{kind}' -%}}"
        f"{{%- set joined.text = joined.text + {json.dumps(text)} -%}}{{%- endif -%}}"
        for kind, text in placeholders.items()
    )
    return (
        "{%- set plain = namespace(messages=[]) -%}{%- for message in messages -%}"
        "{%- if message['content'] is string or message['content'] is not iterable -%}"
        "{%- set plain.messages = plain.messages + [message] -%}{%- else -%}"
        "{%- set joined = namespace(text='') -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{%- set joined.text = joined.text + part['text'] -%}{%- endif -%}"
        + cases
        + "{%- endfor -%}{%- set plain.messages = plain.messages + [dict(message, content=joined.text)] -%}"
        "{%- endif -%}{%- endfor -%}" + MEDIA_PARTS + source
    )


def _probe(kind: str) -> list[ChatMessage]:
    parts = [{"type": "text", "text": _BEFORE}, {"type": kind}, {"type": "text", "text": _AFTER}]
    return [{"role": "user", "content": parts}]


def _between(renderer: Renderer, kind: str) -> str | None:
    """What a template writes for a medium between two texts; None where it does not show all three."""
    try:
        text = renderer.render(_probe(kind))
    except RowError:
        return None
    _, found, rest = text.partition(_BEFORE)
    between, ended, _ = rest.partition(_AFTER)
    return between if found and ended else None


def _shows_media(renderer: Renderer, reader: MediaReader) -> bool:
    """Whether a template writes the placeholder of every kind that the processor has."""
    kinds = [kind for kind in reader.placeholders if reader.takes(kind)]
    return all((_rendered(renderer, kind)).count(reader.placeholders[kind]) == 1 for kind in kinds)


def _shows_text(renderer: Renderer) -> bool:
    try:
        return _BEFORE in renderer.render([{"role": "user", "content": _BEFORE}])
    except RowError:
        return False


def _rendered(renderer: Renderer, kind: str) -> str:
    try:
        return renderer.render(_probe(kind))
    except RowError:
        return ""


def _placeholders(own: Any, variables: dict[str, Any], reader: MediaReader) -> dict[str, str]:
    """What the model's own template writes for a medium; where it has none, the placeholder alone."""
    renderer = Renderer(own, variables) if isinstance(own, str) else None
    found: dict[str, str] = {}
    for kind, token in reader.placeholders.items():
        between = _between(renderer, kind) if renderer is not None else None
        found[kind] = between if between is not None and token in between else token
    return found


class _Expanded(Renderer):
    """A template of one conversation, in whose text each placeholder is replaced by its medium's expansion."""

    def __init__(self, plain: Renderer, placeholders: Mapping[str, str], expansions: Sequence[str]) -> None:
        super().__init__(plain.source, plain._variables)
        self.use(plain.compiled)
        self._kinds = {token: kind for kind, token in placeholders.items()}
        self._pattern = re.compile("|".join(map(re.escape, self._kinds)))
        self._expansions = expansions

    def _render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Any],
        generation_prompt: bool,
        variables: Variables,
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = super()._render(messages, tools, generation_prompt, variables)
        contents = [message["content"] for message in messages if isinstance(message["content"], list)]
        wanted = [part["type"] for content in contents for part in content if part["type"] != "text"]
        found = list(self._pattern.finditer(text))
        if [self._kinds[match.group()] for match in found] != wanted:
            raise RowError(
                "the template does not show every image, film and sound once",
                f"{len(found)} placeholders for {len(wanted)}",
            )
        pieces, ends, last = [], [], 0
        for match, expansion in zip(found, self._expansions, strict=False):
            pieces += [text[last : match.start()], expansion]
            last = match.end()
            ends.append((last, len(expansion) - len(match.group())))
        text = "".join([*pieces, text[last:]])

        def moved(position: int) -> int:
            return position + sum(growth for end, growth in ends if end <= position)

        return text, [(moved(start), moved(stop)) for start, stop in spans]


class MediaTemplate(ChatTemplate):
    """See the module. `reader` opens the media of its samples: it belongs into `Sample.opener`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reader: MediaReader, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.reader: MediaReader = reader
        self._ids_of_media = reader.token_ids()
        self._counts: dict[str, int] = {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the tokens, the processor among it."""
        return sha256((super().fingerprint + self.reader.fingerprint).encode()).hexdigest()

    def messages(self, conversation: Conversation) -> list[ChatMessage]:
        return self.reasoning.chat(conversation)

    def rendering(self, conversation: Conversation) -> str:
        """The text of a conversation with a placeholder for each medium: what the installed template renders."""
        messages, tools, renderer, marked = super()._prepared(conversation)
        mode = self.reasoning.last_mode(conversation)
        text = renderer.render(messages, tools, variables=mode).replace(self._mark, "")
        return self._specials.unmark(text) if marked else text

    def encode(self, conversation: Conversation, parts: Sequence[Part] = ()) -> EncodedConversation:
        encoded = super().encode(conversation, parts)
        expansions = [self.reader.expansion(one) for one in media_of(conversation)]
        return replace(encoded, media=self._places(encoded.input_ids, expansions))

    def check_processor(self, conversation: Conversation) -> None:
        """Raise DataError where the processor, given the same text and the files, makes other tokens."""
        media, messages = media_of(conversation), self.messages(conversation)
        if not media or (not self.parse_special_tokens and self._specials.found_in(messages)):
            return  # a processor reads special tokens in a user's words as what they are not
        given = [
            int(index) for index in self.reader.process(self.rendering(conversation), media)["input_ids"][0]
        ]
        own = self.whole(conversation)
        if own != given:
            raise DataError(
                f"the model's processor makes {len(given)} tokens of a conversation with media, and training would "
                f"have {len(own)}; they part at {self.decode(own[_same(own, given) :][:8])!r}"
            )

    def _prepared(
        self, conversation: Conversation
    ) -> tuple[list[ChatMessage], Sequence[Any], Renderer, bool]:
        messages, tools, renderer, marked = super()._prepared(conversation)
        expansions = [self.reader.expansion(one) for one in media_of(conversation)]
        return messages, tools, _Expanded(renderer, self.reader.placeholders, expansions), marked

    def _places(self, ids: Sequence[int], expansions: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Where the tokens of each medium are: [its first, behind its last)."""
        at = [k for k, index in enumerate(ids) if index in self._ids_of_media]
        counts = [self._count(expansion) for expansion in expansions]
        if len(at) != sum(counts):
            raise RowError("text holds a token that stands for media", f"{len(at)} for {sum(counts)}")
        ends = [*accumulate(counts)]
        return tuple((at[end - n], at[end - 1] + 1) for n, end in zip(counts, ends, strict=True))

    def _count(self, expansion: str) -> int:
        if expansion not in self._counts:
            ids = self._backend.encode(expansion, add_special_tokens=False).ids
            self._counts[expansion] = sum(index in self._ids_of_media for index in ids)
        return self._counts[expansion]


def _same(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (k for k, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
