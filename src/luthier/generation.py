"""What is asked of a model that generates, and what it answers: values, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.conversations import Media
    from luthier.samples import MediaOpener

Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended: a stop token or string, a limit of tokens, its asker, or scores that were no numbers."""


class GenerationError(LuthierError):
    """A request that a model cannot answer."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How an answer is drawn. Temperature 0 is greedy; the defaults change nothing."""

    max_new_tokens: int = 128
    max_length: int | None = None
    """Tokens of prompt and answer together; the tighter of the two limits holds."""
    temperature: float = 0.0
    top_p: float = 1.0
    """The smallest set of tokens whose probabilities sum to this."""
    top_k: int = 0
    """The likeliest tokens alone; 0: all."""
    min_p: float = 0.0
    """Tokens with at least this share of the likeliest one's probability."""
    num_beams: int = 1
    length_penalty: float = 1.0
    """Of beams: their scores are divided by length to this power."""
    repetition_penalty: float = 1.0
    """Of tokens in prompt or answer (Keskar et al., 2019, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off as often as the answer has it."""
    seed: int | None = None
    """Of a request: what it draws depends on nothing else in its batch."""
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends."""
    logprobs: int | None = None
    """Log-probabilities of the chosen tokens, and of this many of the likeliest; absent: none."""
    logprobs_of: Literal["model", "sampling"] = "model"
    """Whose they are: softmax(logits), or softmax(logits / temperature); both before penalties and cuts. Greedy answers
    have no temperature, and the model's."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (self.max_length is None or self.max_length >= 1, "max_length", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (all) or more"),
            (0 <= self.min_p <= 1, "min_p", "from 0 to 1"),
            (self.num_beams >= 1, "num_beams", "at least 1"),
            (0 < self.repetition_penalty < float("inf"), "repetition_penalty", "above 0"),
            (self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more"),
            (self.logprobs_of in ("model", "sampling"), "logprobs_of", "model or sampling"),
            (all(self.stop), "stop", "texts that are not empty"),
        )
        for holds, name, expected in checks:
            if not holds:
                raise GenerationError(f"{name}={getattr(self, name)!r} should be {expected}")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued. `adapter`: the name of one of the engine's; None: its first, or no adapter.

    `media`: images, films and sounds in the order of their tokens in the prompt; `opener` opens them when the prompt
    is read.
    """

    prompt: tuple[int, ...]
    settings: GenerationSettings
    adapter: str | None = None
    media: tuple[Media, ...] = ()
    opener: MediaOpener | None = field(default=None, compare=False, repr=False)

    @property
    def shown(self) -> tuple[tuple[int, ...], tuple[Media, ...]]:
        """What the model reads: where it is equal, so are the keys and values of two requests."""
        return self.prompt, self.media


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token of an answer. Where they are asked for, with log-probabilities before penalties and cuts, of what
    `GenerationSettings.logprobs_of` says: `logprob` in nats, and `top`, the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer: `choices` without the stop token, why it ended, and what stopped it.

    `bad_scores` counts its steps at which the model's scores had NaN or infinity among them. `stop` is the stop token
    that ended it, chosen like those before it; None where something else did.
    """

    choices: tuple[TokenChoice, ...]
    finish: Finish
    stopped_by: int | str | None = None
    bad_scores: int = 0
    stop: TokenChoice | None = None

    @property
    def ids(self) -> list[int]:
        return [choice.token for choice in self.choices]


@dataclass(frozen=True, slots=True)
class Event:
    """A step of one request: the token that it got, unless that was a stop token; at the last one also its end."""

    ticket: int
    choice: TokenChoice | None
    end: Generation | None = None
