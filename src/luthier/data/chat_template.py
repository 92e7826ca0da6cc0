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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from luthier.conversations import MediaKind
from luthier.data import families
from luthier.data.ends import end_texts
from luthier.data.layout_tokens import LayoutTokens
from luthier.data.parts import Piece, Said, require_shown, tokens_of
from luthier.data.rendering import ChatMessage, Layout, Renderer, Variables
from luthier.data.shapes import Shapes
from luthier.data.thinking import FIELDS, Reasoning, require_known
from luthier.recipe.thinking import ThinkingSpec
from luthier.samples import MediaOpener
from luthier.types import Conversation, DataError, EncodedConversation, LuthierError, Part, RowError, Span


@dataclass(frozen=True, slots=True)
class _Ready:
    """A conversation that is tokenized already."""

    conversation: Conversation
    layout: Layout
    ids: np.ndarray[Any, np.dtype[np.int32]]
    at: dict[int, int]


class ChatTemplate:
    """A chat template on a fast tokenizer; implements `luthier.types.Template`.

    The template's text is the tokenizer's `chat_template` at the time of construction. `marked`, if given, is
    the same with the marks of `families.CUT`, and switches to LLaMA-Factory's pieces. `opener` opens the media of its
    prompts, where it takes any.
    """

    opener: MediaOpener | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        family: families.Family | None = None,
        parse_special_tokens: bool = False,
        marked: str | Mapping[str, str] | None = None,
        thinking: ThinkingSpec | None = None,
    ) -> None:
        self.name = family.name if family else "tokenizer"
        self.tokenizer = tokenizer
        self.parse_special_tokens = parse_special_tokens
        self.pieces = marked is not None
        # a copy: others may switch padding, truncation or special tokens on the shared one
        self._tokens = LayoutTokens(tokenizer.backend_tokenizer.to_str(), self.pieces)
        self._backend, self._specials = self._tokens.backend, self._tokens.specials
        self._mark = chr(0xF0002) + "".join(chr(0xF0100 + secrets.randbelow(0xE00)) for _ in range(8))
        variables = dict(tokenizer.special_tokens_map) | ({"cut": self._mark} if self.pieces else {})
        sources: Any = marked if marked is not None else tokenizer.chat_template
        sources = sources if isinstance(sources, Mapping) else {"default": sources}
        self._renderers = {key: Renderer(source, variables) for key, source in sources.items()}
        rules = thinking or ThinkingSpec()
        self.reasoning = Reasoning(self._renderers["default"].source, {**variables, "cut": ""}, rules)
        self._end_texts = end_texts(self._renderers, self._backend, str(tokenizer.eos_token), self._mark)
        self.end_token_ids = self._ids_of(self._end_texts)
        stops = (tokenizer.eos_token_id, *self.end_token_ids, *self._ids_of(family.stop if family else ()))
        self._stop_ids = tuple(dict.fromkeys(stops))
        self._document_end = family.document_end if family else None
        self._ready: dict[int, _Ready] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without `_shapes`, whose watched template cannot be sent to others, and what is tokenized already."""
        return {key: value for key, value in self.__dict__.items() if key != "_shapes"} | {"_ready": {}}

    def check_processor(self, conversation: Conversation) -> None:
        """Raise DataError where the model's processor makes other tokens of it; see `media_template`."""

    def require(self, kind: MediaKind) -> None:
        """Raise DataError where conversations cannot hold media of this kind."""
        raise DataError(f"this model takes no {kind}s: it has no processor for them")

    @property
    def has_reasoning(self) -> bool:
        """Whether reasoning has a place of its own in it, apart from the content."""
        return self.reasoning.field is not None

    def require_variables(self, variables: Variables) -> None:
        """Raise DataError for a variable of the template that it does not know, or that is not one."""
        source = "".join(renderer.source for renderer in self._renderers.values())
        require_known(source, variables, tuple(self.tokenizer.special_tokens_map))

    @property
    def source(self) -> str:
        """The Jinja template for conversations with tools."""
        return (self._renderers.get("tool_use") or self._renderers["default"]).source

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the tokens: template, special tokens, tokenizer, cuts."""
        sources = {key: renderer.source for key, renderer in self._renderers.items()}
        special = {key: str(token) for key, token in self.tokenizer.special_tokens_map.items()}
        rules = [self.pieces, self.parse_special_tokens, self._end_texts, self.begin_ids, self._document_end]
        rules.append(self.reasoning.spec.model_dump())
        text = json.dumps([sources, special, rules, self._backend.to_str()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, conversation: Conversation, parts: Sequence[Part] = ()) -> EncodedConversation:
        """See `luthier.types.Template`. Raises RowError for a part that the template does not show once and whole."""
        ready = self._ready.get(id(conversation))
        if ready is not None and ready.conversation is conversation:
            layout, ids, at = ready.layout, ready.ids, ready.at
        else:
            layout, marked = self._laid_out(conversation)
            found, at = self._tokens(layout, marked)
            ids = np.asarray(found, np.int32)
        answers = tuple(Span(at[a.start], at[a.stop], a.message, at[a.end]) for a in layout.answers)
        places = self._tokens_of(parts, conversation, layout) if parts else ()
        return EncodedConversation(ids, answers, layout.rewritten, places)

    def tokenize(self, conversations: Iterable[Conversation]) -> None:
        """Tokenize many at once, which is quicker: `encode` finds them, until others are tokenized. Raises nothing."""
        laid: list[tuple[Conversation, Layout]] = []
        for conversation in conversations:
            with suppress(LuthierError):  # `encode` raises it when its turn comes
                layout, marked = self._laid_out(conversation)
                if not marked:
                    laid.append((conversation, layout))
        found = self._tokens.of_many([layout for _, layout in laid])
        self._ready = {
            id(conversation): _Ready(conversation, layout, *tokens)
            for (conversation, layout), tokens in zip(laid, found, strict=True)
            if tokens is not None
        }

    def _laid_out(self, conversation: Conversation) -> tuple[Layout, bool]:
        """The layout, and whether special tokens in it are marked."""
        messages, tools, renderer, marked = self._prepared(conversation)
        modes = self.reasoning.modes(conversation)
        shaped = None if tools or marked or modes else self._shapes.layout(messages)
        layout = shaped or self._layout(renderer, messages, tools, modes)
        if shaped is None:
            require_shown(messages, layout, self.reasoning, self.name)
        return layout, marked

    def _layout(
        self, renderer: Renderer, messages: Sequence[ChatMessage], tools: Sequence[Any], modes: Any = None
    ) -> Layout:
        how: Any = {"turn_ends": self.pieces} | ({"modes": modes} if modes else {})
        return self._unmark(renderer.layout(messages, tools, self._end_texts, **how))

    @cached_property
    def _shapes(self) -> Shapes:
        """What is known of conversations without tools."""
        return Shapes(self._renderers["default"], self._layout, self._end_texts)

    def _tokens_of(
        self, parts: Sequence[Part], conversation: Conversation, layout: Layout
    ) -> tuple[tuple[int, int], ...]:
        messages, tools, renderer, marked = self._prepared(conversation)
        mode = self.reasoning.last_mode(conversation)

        def rendered(turns: Sequence[ChatMessage]) -> str:
            return renderer.render(turns, tools, variables=mode).replace(self._mark, "")

        def pieces(bounds: Sequence[int]) -> Iterator[Piece]:
            cuts = layout.cuts if self._tokens.cuts else ()
            for left, right in pairwise(sorted({0, len(layout.text), *cuts})):
                wanted = [bound for bound in bounds if left <= bound < right]
                text, inside = self._tokens.piece(layout.text, left, right, wanted, marked)
                yield Piece(wanted, inside, self._tokens.encode(text, marked).offsets)

        spelled = self._specials.mark if marked else str
        said = Said(self.reasoning.split(conversation).messages, messages, self.reasoning.field, spelled)
        places = [said.characters(part, layout.text, rendered, self._end_texts) for part in parts]
        return tokens_of(places, len(layout.text), pieces)

    def prompt(self, conversation: Conversation, variables: Variables = MappingProxyType({})) -> list[int]:
        """See `luthier.types.Template`; `variables` of the template: see `require_variables`."""
        messages, tools, renderer, marked = self._prepared(conversation)
        how: Any = {"turn_ends": self.pieces, "modes": self.reasoning.modes(conversation)}
        layout = self._unmark(renderer.prompt_layout(messages, tools, variables=variables, **how))
        return self._tokens.ids_of(layout, marked)

    def text(self, text: str) -> list[int]:
        if not self.parse_special_tokens and self._specials.found_in(text):
            return self._specials.encode_text(text)
        return self._tokens.text(text)

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
        mode = self.reasoning.last_mode(conversation)
        text = renderer.render(messages, tools, variables=mode).replace(self._mark, "")
        return list(self._tokens.encode(self._specials.respell(text) if marked else text, marked).ids)

    def rendering(self, conversation: Conversation) -> str:
        """The text of a conversation: what the installed chat template renders."""
        messages, tools, renderer, marked = self._prepared(conversation)
        mode = self.reasoning.last_mode(conversation)
        text = renderer.render(messages, tools, variables=mode).replace(self._mark, "")
        return self._specials.unmark(text) if marked else text

    def messages(self, conversation: Conversation) -> list[ChatMessage]:
        """The conversation in the form that the chat template takes; DataError for media: see `media_template`."""
        if any(message.media for message in conversation.messages):
            raise DataError(
                "the data has images, films or sounds, and this model has no processor for them: train one that sees "
                "or hears, or leave columns.images, videos and audios out of the data set's description"
            )
        return self.reasoning.chat(conversation)

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
        if "tool_calls" not in renderer.source and any(message.get("tool_calls") for message in messages):
            raise RowError(f"template {self.name!r} has no place for tool calls")
        taken_out = self.reasoning.taken_out
        if not (self.has_reasoning or taken_out) and any(message.get(FIELDS[0]) for message in messages):
            raise RowError(f"template {self.name!r} has no place for reasoning")
        if self.parse_special_tokens or not (
            self._specials.found_in(messages) or self._specials.found_in(tools)
        ):
            return messages, tools, renderer, False
        return self._specials.mark(messages), self._specials.mark(tools), renderer, True

    def exactly(self, conversation: Conversation) -> list[int]:
        """The ids of `encode`, from the tokenizer alone: what remembered words are compared with."""
        messages, tools, renderer, marked = self._prepared(conversation)
        layout = self._layout(renderer, messages, tools, self.reasoning.modes(conversation))
        return self._tokens.ids_of(layout, marked)

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
        text, empty = "".join(parts), self.reasoning.marks.empty
        # that tool puts an empty thought between prompt and answer as a piece of its own
        cuts |= {cut + len(empty) for cut in cuts if text.startswith(empty, cut)}
        return Layout(text, tuple(sorted(cuts)), answers, layout.rewritten)

    def _ids_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        ids = (self._backend.token_to_id(token) for token in tokens)
        return tuple(index for index in ids if index is not None)
