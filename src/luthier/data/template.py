"""`ChatTemplate`: conversation -> token ids and the spans that the assistant generates.

How ids come about. The conversation is rendered to text (`rendering`), the text is cut where a generation
prompt ends, and each piece is tokenized in one call. So

* the prompt is a true token prefix of the training sequence by construction, even where the tokenizer would
  merge the prompt's last characters with the answer's first;
* for everything else the ids equal `tokenizer.apply_chat_template(..., tokenize=True)`;
* earlier answers are cut in `prompt` exactly as in `encode`, so serving sees the tokens that were trained.

A tokenizer that writes a space before every piece (SentencePiece's dummy prefix) cannot be given pieces. For
such a one the text is tokenized whole and each prompt is compared with the beginning of the result.

Special tokens in user text stay text (`specials`) unless `parse_special_tokens`.

With `pieces`, the text is cut wherever LLaMA-Factory joins separately tokenized pieces, and special tokens
are wherever they stand: the ids of that tool, for recipes translated from it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from luthier.data import families
from luthier.data.rendering import ChatMessage, Layout, Renderer, chat_messages, with_default_system
from luthier.data.specials import SpecialText
from luthier.recipe.schema import DataSpec, TemplateSpec
from luthier.types import Conversation, DataError, EncodedConversation, RowError, Span

_FIELDS = {"tool_calls": "tool calls", "reasoning_content": "reasoning"}


def load_template(
    tokenizer: PreTrainedTokenizerBase, spec: DataSpec, *, pieces: bool = False
) -> ChatTemplate:
    """The template that a recipe asks for, installed on the tokenizer so that it is saved with the model.

    A named template (or a .jinja file, or four strings) replaces `tokenizer.chat_template` and, where the
    family has its own end token, `tokenizer.eos_token`; `spec.default_system` becomes part of the template.
    A tokenizer without a pad token gets its end token. `pieces`: see the module. Raises DataError for an
    unknown name, a tokenizer without chat template, an end token that the vocabulary lacks, and tokenizers
    without a fast backend.
    """
    family, marked = install_template(tokenizer, spec)
    return ChatTemplate(
        tokenizer,
        family=family,
        parse_special_tokens=spec.parse_special_tokens,
        marked=marked if pieces else None,
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
    marked: str | dict[str, str] | None
    if family is not None:
        marked = family.marked_source
        if family.eos is not None:
            _use_as_eos(tokenizer, family.eos, family.name)
    else:
        marked = tokenizer.chat_template
    if not marked:
        raise DataError(
            "the tokenizer has no chat template; name one with data.template: " + ", ".join(families.names())
        )
    if spec.default_system is not None:
        marked = _each(marked, lambda source: with_default_system(source, spec.default_system or ""))
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


class ChatTemplate:
    """A chat template on a fast tokenizer; implements `luthier.types.Template`.

    The template's text is the tokenizer's `chat_template` at the time of construction. `marked`, if given, is
    the same with the marks of `families.CUT`, and switches to LLaMA-Factory's pieces.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        family: families.Family | None = None,
        parse_special_tokens: bool = False,
        marked: str | Mapping[str, str] | None = None,
    ) -> None:
        self.name = family.name if family else "tokenizer"
        self.tokenizer = tokenizer
        self.parse_special_tokens = parse_special_tokens
        self.pieces = marked is not None
        # a copy: others may switch padding, truncation or special tokens on the shared one
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._specials = SpecialText(self._backend)
        self._mark = chr(0xF0002) + "".join(chr(0xF0100 + secrets.randbelow(0xE00)) for _ in range(8))
        variables = dict(tokenizer.special_tokens_map) | ({"cut": self._mark} if self.pieces else {})
        sources: Any = marked if marked is not None else tokenizer.chat_template
        sources = sources if isinstance(sources, Mapping) else {"default": sources}
        self._renderers = {key: Renderer(source, variables) for key, source in sources.items()}
        self._splits_freely = self._can_be_split()
        self._end_texts, self.end_token_ids = self._find_ends()
        stops = (tokenizer.eos_token_id, *self.end_token_ids, *self._ids_of(family.stop if family else ()))
        self._stop_ids = tuple(dict.fromkeys(stops))
        self._document_end = family.document_end if family else None

    @property
    def has_reasoning(self) -> bool:
        """Whether reasoning has a place of its own in it, apart from the content."""
        return "reasoning_content" in self._renderers["default"].source

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the tokens: template, special tokens, tokenizer, cuts."""
        sources = {key: renderer.source for key, renderer in self._renderers.items()}
        special = {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()}
        rules = [self.pieces, self.parse_special_tokens, self._end_texts, self.begin_ids, self._document_end]
        text = json.dumps([sources, special, rules, self._backend.to_str()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, conversation: Conversation) -> EncodedConversation:
        messages, tools, renderer, marked = self._prepared(conversation)
        layout = self._unmark(renderer.layout(messages, tools, self._end_texts, turn_ends=self.pieces))
        self._check_content(messages, layout.text)
        if self._splits_freely or self.pieces:
            ids, at = self._encode_pieces(layout, marked)
        else:
            ids, at = self._encode_whole(layout, marked)
        answers = tuple(Span(at[a.start], at[a.stop], a.message, at[a.end]) for a in layout.answers)
        return EncodedConversation(ids, answers, layout.rewritten)

    def prompt(self, conversation: Conversation) -> list[int]:
        messages, tools, renderer, marked = self._prepared(conversation)
        layout = self._unmark(renderer.prompt_layout(messages, tools, turn_ends=self.pieces))
        if self._splits_freely or self.pieces:
            return self._encode_pieces(layout, marked)[0]
        text, _ = self._piece(layout.text, 0, len(layout.text), (), marked)
        return list(self._encode(text, marked).ids)

    def text(self, text: str) -> list[int]:
        if self.parse_special_tokens:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return self._specials.encode_text(text)

    @property
    def begin_ids(self) -> list[int]:
        """What the tokenizer itself writes before every text (Llama's begin-of-text token), if anything."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        adds = self.tokenizer("a")["input_ids"][0] == bos
        return [bos] if (adds and not self.pieces) or getattr(self.tokenizer, "add_bos_token", False) else []

    @cached_property
    def _document_end_id(self) -> int:
        if self._document_end is None:
            return int(self.tokenizer.eos_token_id)
        if not (found := self._ids_of((self._document_end,))):
            raise DataError(
                f"template {self.name!r} ends documents with {self._document_end!r}, which the tokenizer's "
                "vocabulary lacks; choose another template"
            )
        return found[0]

    def document(self, text: str, *, begin: bool = True) -> list[int]:
        return [*(self.begin_ids if begin else ()), *self.text(text), self._document_end_id]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of some tokens, special tokens included unless they are to be skipped."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def whole(self, conversation: Conversation) -> list[int]:
        """Token ids of the rendered text in one piece, as other software tokenizes it."""
        messages, tools, renderer, marked = self._prepared(conversation)
        text = renderer.render(messages, tools).replace(self._mark, "")
        return list(self._encode(self._specials.respell(text) if marked else text, marked).ids)

    def rendering(self, conversation: Conversation) -> str:
        """The text of a conversation: what the installed chat template renders."""
        messages, tools, renderer, marked = self._prepared(conversation)
        text = renderer.render(messages, tools).replace(self._mark, "")
        return self._specials.unmark(text) if marked else text

    def messages(self, conversation: Conversation) -> list[ChatMessage]:
        """The conversation in the form that the chat template takes; DataError for media: see `media_template`."""
        if any(message.media for message in conversation.messages):
            raise DataError(
                "the data has images, films or sounds, and this model has no processor for them: train one that sees "
                "or hears, or leave columns.images, videos and audios out of the data set's description"
            )
        return chat_messages(conversation)

    def _prepared(
        self, conversation: Conversation
    ) -> tuple[list[ChatMessage], Sequence[Any], Renderer, bool]:
        """Messages and tools for the template; marked (and True) if a user's text holds special tokens."""
        messages = self.messages(conversation)
        tools: Sequence[Any] = list(conversation.tools)
        if not messages:
            raise RowError("no messages")
        renderer = self._renderers.get("tool_use") if tools else None
        renderer = renderer or self._renderers["default"]
        if tools and "tools" not in renderer.source:
            raise RowError(f"template {self.name!r} has no place for tools")
        for field, what in _FIELDS.items():
            if field not in renderer.source and any(message.get(field) for message in messages):
                raise RowError(f"template {self.name!r} has no place for {what}")
        if self.parse_special_tokens or not (
            self._specials.found_in(messages) or self._specials.found_in(tools)
        ):
            return messages, tools, renderer, False
        return self._specials.mark(messages), self._specials.mark(tools), renderer, True

    def _check_content(self, messages: Sequence[ChatMessage], text: str) -> None:
        """A template may move or trim content, but must not lose it (earlier reasoning excepted)."""
        for message in messages:
            content = message["content"].strip()
            if content not in text and "</think>" not in content:
                raise RowError(
                    f"template {self.name!r} leaves out a {message['role']} message", repr(content[:60])
                )

    def _encode(self, text: str, marked: bool) -> Any:
        if marked:
            return self._specials.encode_respelled(text)
        return self._backend.encode(text, add_special_tokens=False)

    def _encode_pieces(self, layout: Layout, marked: bool) -> tuple[list[int], dict[int, int]]:
        """Ids, and the token index of every boundary of the layout (character -> token)."""
        inner = {position for a in layout.answers for position in (a.start, a.stop, a.end)}
        cuts = sorted({*layout.cuts, 0, len(layout.text)})
        ids: list[int] = []
        at = {0: 0}
        for left, right in pairwise(cuts):
            wanted = sorted(position for position in inner if left < position < right)
            text, places = self._piece(layout.text, left, right, wanted, marked)
            encoding = self._encode(text, marked)
            if places:
                offsets = encoding.offsets
                for position, place in zip(wanted, places, strict=True):
                    at[position] = len(ids) + bisect_left(offsets, (place,))
            ids += encoding.ids
            at[right] = len(ids)
        return ids, at

    def _piece(
        self, text: str, left: int, right: int, wanted: Sequence[int], marked: bool
    ) -> tuple[str, list[int]]:
        """A piece of the text as it is tokenized, and the wanted positions inside it."""
        if not marked:
            return text[left:right], [position - left for position in wanted]
        bounds = [left, *wanted, right]
        parts = [self._specials.respell(text[a:b]) for a, b in pairwise(bounds)]
        places, length = [], 0
        for part in parts[:-1]:
            length += len(part)
            places.append(length)
        return "".join(parts), places

    def _encode_whole(self, layout: Layout, marked: bool) -> tuple[list[int], dict[int, int]]:
        """The same for tokenizers that cannot be given pieces."""
        whole = Layout(layout.text, (), layout.answers, layout.rewritten)
        ids, at = self._encode_pieces(whole, marked)
        for answer in layout.answers:
            prompt, _ = self._piece(layout.text, 0, answer.start, (), marked)
            if list(self._encode(prompt, marked).ids) != ids[: at[answer.start]]:
                raise RowError(
                    "the tokenizer merges the prompt's end with the answer's beginning",
                    f"at {layout.text[max(0, answer.start - 15) : answer.start + 15]!r}",
                )
        return ids, at

    def _unmark(self, layout: Layout) -> Layout:
        """With `pieces`, take the marks out of the text and cut there."""
        if not self.pieces:
            return layout
        parts = layout.text.split(self._mark)
        ends, length = [], 0
        for part in parts[:-1]:
            length += len(part) + len(self._mark)
            ends.append(length)

        def moved(position: int) -> int:
            return position - len(self._mark) * bisect_left(ends, position + 1)

        cuts = {*map(moved, ends), *map(moved, layout.cuts)}
        answers = tuple(
            type(a)(a.message, moved(a.start), moved(a.stop), moved(a.end)) for a in layout.answers
        )
        return Layout("".join(parts), tuple(sorted(cuts)), answers, layout.rewritten)

    def _can_be_split(self) -> bool:
        """Whether tokens of two texts, one after the other, are the tokens of one text."""
        for left, right in (("ab:", "cd"), ("a\n", "b"), ("a", " b")):
            ids = [*self._ids(left), *self._ids(right)]
            if self._backend.decode(ids, skip_special_tokens=False) != left + right:
                return False
        return True

    def _find_ends(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Spellings and ids of the tokens that end an answer: what the template writes after a short one."""
        added = {token.content: index for index, token in self._backend.get_added_tokens_decoder().items()}
        asked, said = "How?", "Thus."
        eos = str(self.tokenizer.eos_token)
        try:
            text = self._renderers["default"].render(
                [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            )
        except RowError:
            return (eos,), self._ids_of((eos,))
        tail = text.rpartition(said)[2].replace(self._mark, "")
        found = [
            (tail.find(token), -len(token), token) for token in added if token in tail and not token.isspace()
        ]
        ends = tuple(dict.fromkeys([min(found)[2]] if found else [eos]))
        return ends, self._ids_of(ends)

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _ids_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        ids = (self._backend.token_to_id(token) for token in tokens)
        return tuple(index for index in ids if index is not None)
