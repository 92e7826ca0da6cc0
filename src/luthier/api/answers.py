"""Tokens of one answer -> its text and parts, as they come or at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier.api.faults import server_error
from luthier.data.answer_form import AnswerForm, Spoken, SpokenStream
from luthier.data.calls.form import Offered
from luthier.engine.text import TextStream, up_to
from luthier.types import Event, Generation, TokenChoice


@dataclass(slots=True)
class Answer:
    """One of the answers to a request. `tools`: that it may call, with schemas. `live`: shown as it grows."""

    index: int
    decode: Callable[[Sequence[int]], str]
    form: AnswerForm
    stop: tuple[str, ...] = ()
    tools: Offered = ()
    live: bool = False
    end: Generation | None = None
    _stream: TextStream = field(init=False)
    _parts: SpokenStream = field(init=False)

    def __post_init__(self) -> None:
        self._stream = TextStream(self.decode, self.stop)
        self._parts = SpokenStream(self.form, self.tools)

    @property
    def spoken(self) -> Spoken:
        """The parts that were taken so far."""
        return self._parts.spoken

    def take(self, event: Event) -> Spoken:
        """What the next token adds to the parts; calls are complete and come with the end.

        Raises ApiError where the model's scores were no numbers.
        """
        if event.end is not None:
            self.end = event.end
            if event.end.finish == "error":
                raise server_error("the model's scores are no numbers (NaN or infinity) for this request")
        if self.live:
            piece = self._piece(event.choice)
        elif self.end is not None:
            piece = up_to(self.decode(self.end.ids), self.stop)
        else:
            return Spoken("")
        return self._parts.push(piece, ended=self.end is not None)

    @property
    def finish_reason(self) -> str:
        """Why it ended, in the API's words."""
        assert self.end is not None
        return "tool_calls" if self.spoken.calls and self.end.finish == "stop" else self.end.finish

    def _piece(self, choice: TokenChoice | None) -> str:
        piece = "" if choice is None else self._stream.push(choice.token)
        return piece + (self._stream.finish() if self.end is not None else "")
