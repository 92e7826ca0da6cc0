"""Tokens of one answer -> its text and parts, as they come or at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier.api.faults import server_error
from luthier.data.answer_form import AnswerForm, Spoken
from luthier.engine.text import TextStream
from luthier.types import Event, Generation, TokenChoice


@dataclass(slots=True)
class Answer:
    """One of the answers to a request. `tools`: names of those that it may call. `live`: shown while it grows."""

    index: int
    decode: Callable[[Sequence[int]], str]
    form: AnswerForm
    stop: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    live: bool = False
    spoken: Spoken = field(default_factory=lambda: Spoken(""))
    end: Generation | None = None
    _stream: TextStream | None = None
    _text: str = ""

    def take(self, event: Event) -> Spoken:
        """What the next token adds to the parts; calls are complete and come with the end.

        Raises ApiError where the model's scores were no numbers.
        """
        if event.end is not None:
            self.end = event.end
            if event.end.finish == "error":
                raise server_error("the model's scores are no numbers (NaN or infinity) for this request")
        if self.live:
            self._text += self._piece(event.choice)
        elif self.end is not None:
            self._text = self._whole(self.end)
        else:
            return Spoken("")
        now = self.form.read(self._text, tools=self.tools, ended=self.end is not None)
        before, self.spoken = self.spoken, now
        return Spoken(now.content[len(before.content) :], now.reasoning[len(before.reasoning) :], now.calls)

    @property
    def finish_reason(self) -> str:
        """Why it ended, in the API's words."""
        assert self.end is not None
        return "tool_calls" if self.spoken.calls and self.end.finish == "stop" else self.end.finish

    def _piece(self, choice: TokenChoice | None) -> str:
        self._stream = self._stream or TextStream(self.decode, self.stop)
        piece = "" if choice is None else self._stream.push(choice.token)
        return piece + (self._stream.finish() if self.end is not None else "")

    def _whole(self, end: Generation) -> str:
        text = self.decode(end.ids)
        return text[: min((text.index(stop) for stop in self.stop if stop in text), default=len(text))]
