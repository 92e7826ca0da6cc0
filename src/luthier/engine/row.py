"""An answer that grows token by token, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from luthier.engine.protocol import Decode
from luthier.generation import Event, Finish, Generation, Request, TokenChoice


@dataclass(slots=True)
class GrowingAnswer:
    """A request under way. `limit`: the most tokens that its answer may have."""

    ticket: int
    request: Request
    limit: int
    choices: list[TokenChoice] = field(init=False, default_factory=list)

    @property
    def bad_scores(self) -> int:
        """As `Generation` says; none where an engine does not show its scores."""
        return 0

    def take(self, choice: TokenChoice | None, decode: Decode | None) -> Event:
        """What the next token means for the answer; None is one that could not be chosen."""
        settings = self.request.settings
        if choice is None:
            return self._end(None, "error")
        if choice.token in settings.stop_ids:
            return self._end(None, "stop", choice.token, choice)
        self.choices.append(choice)
        if settings.stop:
            assert decode is not None
            # A stop string may begin in an earlier token, and may be the whole answer.
            text = decode([other.token for other in self.choices])
            found = [(text.index(stop), stop) for stop in settings.stop if stop in text]
            if found:
                return self._end(choice, "stop", min(found)[1])
        if len(self.choices) == self.limit:
            return self._end(choice, "length")
        return Event(self.ticket, choice)

    def ended(self, finish: Finish) -> Generation:
        return Generation(tuple(self.choices), finish, bad_scores=self.bad_scores)

    def _end(
        self,
        choice: TokenChoice | None,
        finish: Finish,
        by: int | str | None = None,
        stop: TokenChoice | None = None,
    ) -> Event:
        end = Generation(tuple(self.choices), finish, by, self.bad_scores, stop)
        return Event(self.ticket, choice, end)
