"""Special tokens inside user text stay text.

A chat template mixes its own control tokens with what users wrote, and once rendered nobody can tell
`<|im_end|>` of the template from `<|im_end|>` of a user. So the user's ones are *marked* before rendering,
and the rendered text is then tokenized by a *twin* of the tokenizer: the same vocabulary, merges, normalizer
and pre-tokenizer, but with its special tokens spelled in private-use characters that nobody can guess. The
template's control tokens are respelled, the user's are put back as they were, and the twin reads them as the
ordinary text they are. One call tokenizes the whole text, so nothing depends on cutting it into pieces.

Only tokens that the tokenizer marks as special are protected. Added tokens that are not special (`<think>`,
`<tool_call>`) are vocabulary that answers legitimately contain.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

from luthier.types import DataError

_MARK, _TWIN = chr(0xF0000), chr(0xF0001)
_NONCE_BASE, _INDEX_BASE = 0xF0100, 0xF1000


class SpecialText:
    """Marks special tokens in user text and tokenizes rendered text so that marked ones stay text.

    `backend` is used as it is and must not be changed by anybody else.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._ids = {
            token.content: index for index, token in added.items() if token.special and token.content
        }
        self._spellings = list(self._ids)
        nonce = "".join(chr(_NONCE_BASE + secrets.randbelow(0xE00)) for _ in range(8))
        self._marks = {text: _MARK + nonce + chr(_INDEX_BASE + i) for i, text in enumerate(self._spellings)}
        self._twins = {text: _TWIN + nonce + chr(_INDEX_BASE + i) for i, text in enumerate(self._spellings)}
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        back = {mark: text for text, mark in self._marks.items()}
        self._replacement = {**self._twins, **back}
        shared = set.intersection(*map(set, self._spellings)) if self._spellings else set()
        self._shared = min(shared, default="")  # most texts lack it, which is found out at once
        self._either = re.compile("|".join(map(re.escape, [*back, *longest_first])) or r"(?!)")

    def found_in(self, value: Any) -> bool:
        """Whether any text inside a message or tool list holds a special token."""
        if isinstance(value, str):
            return self._shared in value and self._pattern.search(value) is not None
        if type(value) is dict or isinstance(value, Mapping):  # the first is quicker, and most are
            value = list(value.values())
        return isinstance(value, list | tuple) and any(map(self.found_in, value))

    def mark(self, value: Any) -> Any:
        """The same value with every special token in its texts replaced by a mark (keys are left alone)."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._marks[match.group()], value)
        if isinstance(value, Mapping):
            return {key: self.mark(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(v) for v in value]
        return value

    def unmark(self, text: str) -> str:
        """Marked text as its author wrote it."""
        return self._either.sub(self._original, text)

    def respell(self, marked: str) -> str:
        """Marked text as the twin reads it: control tokens respelled, user text as it was written."""
        return self._either.sub(lambda match: self._replacement[match.group()], marked)

    def encode_respelled(self, text: str) -> Encoding:
        """Tokens of a text from `respell`."""
        return self._twin.encode(text, add_special_tokens=False)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text all of which a user wrote."""
        if not self.found_in(text):
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._twin.encode(text, add_special_tokens=False).ids)

    def _original(self, match: re.Match[str]) -> str:
        found = match.group()
        return found if found in self._twins else self._replacement[found]

    @cached_property
    def _twin(self) -> Tokenizer:
        """Built on first use: a large vocabulary takes a second or two."""
        tree = json.loads(self._backend.to_str())
        model = tree["model"]
        products = {_joined(merge) for merge in model.get("merges", ())}
        if clash := products & self._twins.keys():
            raise DataError(
                f"the tokenizer builds {sorted(clash)[0]!r} from ordinary text, so it cannot be kept "
                "as text; set data.parse_special_tokens: true"
            )
        for token in tree["added_tokens"]:
            token["content"] = (
                self._twins.get(token["content"], token["content"]) if token["special"] else token["content"]
            )
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self._twins.get(piece, piece): index for piece, index in vocab.items()}
        else:
            model["vocab"] = [[self._twins.get(piece, piece), score] for piece, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._twins.get(model["unk_token"], model["unk_token"])
        twin = Tokenizer.from_str(
            json.dumps(tree | {"post_processor": None, "padding": None, "truncation": None})
        )
        wrong = [text for text, index in self._ids.items() if twin.token_to_id(self._twins[text]) != index]
        if wrong:
            raise DataError(
                f"cannot keep {wrong[0]!r} in user text as text with this tokenizer; "
                "set data.parse_special_tokens: true"
            )
        return twin


def _joined(merge: Any) -> str:
    return "".join(merge) if isinstance(merge, list) else str(merge).replace(" ", "", 1)
