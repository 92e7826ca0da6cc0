"""A template whose tokens can be read."""

from __future__ import annotations

import numpy as np

from luthier.types import Conversation, EncodedConversation, RowError, Span

END, NEWLINE, EOS, BOS = 900, 901, 902, 903


class Words:
    """A template whose tokens can be read: each message is its role's number, its words, and END NEWLINE.

    An answer's role number is the prompt's; END is its stop token and NEWLINE follows it. A word w becomes len(w).
    With `forgets`, every answer but the last one shows only its first word.
    """

    name = "words"
    stop_ids = (END,)
    ROLES = {"system": 100, "user": 101, "assistant": 102, "tool": 103}

    def __init__(self, forgets: bool = False) -> None:
        self.forgets = forgets

    def encode(self, conversation: Conversation) -> EncodedConversation:
        ids: list[int] = []
        answers, rewritten = [], []
        messages = conversation.messages
        last = max((k for k, m in enumerate(messages) if m.role == "assistant"), default=-1)
        for k, message in enumerate(messages):
            if message.role not in self.ROLES:
                raise RowError("unknown role", message.role)
            ids.append(self.ROLES[message.role])
            start = len(ids)
            words = self.text(message.content)
            hidden = self.forgets and message.role == "assistant" and k != last and len(words) > 1
            ids += [*(words[:1] if hidden else words), END, NEWLINE]
            if hidden:
                rewritten.append(k)
            elif message.role == "assistant":
                answers.append(Span(start, len(ids) - 1, k, len(ids)))
        return EncodedConversation(np.asarray(ids, np.int32), tuple(answers), tuple(rewritten))

    def prompt(self, conversation: Conversation) -> list[int]:
        return [*self.encode(conversation).input_ids, self.ROLES["assistant"]]

    def text(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def document(self, text: str, *, begin: bool = True) -> list[int]:
        return [*([BOS] if begin else []), *self.text(text), EOS]
