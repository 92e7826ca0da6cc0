"""A reward model under its name: conversations in, one number for each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.api.faults import ApiError, invalid
from luthier.api.fields import ScoreRequest
from luthier.api.served import conversation_of, unknown_model
from luthier.data.encode import media_of
from luthier.rewards.scorer import Scorer
from luthier.types import DataError, Row, Sample


@dataclass(frozen=True)
class ScoredModel:
    """A reward model. `name`: what it is called in requests."""

    name: str
    scorer: Scorer
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> dict[str, None]:
        """The names that it is served by."""
        return {self.name: None}

    def unknown(self, name: str) -> ApiError:
        """The error for a name that nothing is served by."""
        return unknown_model(name, [self.name])

    def samples(self, body: ScoreRequest) -> tuple[list[Sample], int]:
        """The samples of a request's conversations, and how many tokens they have.

        Raises ApiError for a conversation that does not end with an answer, or cannot be scored.
        """
        if body.model != self.name:
            raise self.unknown(body.model)
        samples: list[Sample] = []
        for index, turns in enumerate(body.input):
            if turns[-1].role != "assistant":
                raise invalid(f"input.{index}: a conversation ends with the assistant's answer", "input")
            try:
                if media_of(conversation := conversation_of(turns)):
                    raise DataError("scores are of text alone, and it has images, films or sounds")
                row = Row("request", index, conversation, desirable=True)
                encoded = self.scorer.encoded(row)
            except DataError as error:
                raise invalid(f"input.{index}: {error}", "input") from error
            if not encoded.samples:
                raise invalid(f"input.{index} cannot be scored: {encoded.lost.dropped}", "input")
            samples += encoded.samples
        return samples, sum(len(sample.input_ids) for sample in samples)

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """The score of each sample, in their order."""
        numbers = self.scorer.numbers(list(samples))
        return [numbers[sample.index][0] for sample in samples]

    def answer(self, model: str, scores: Sequence[float], tokens: int) -> dict[str, Any]:
        """The object of an answer."""
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
        return {"object": "list", "model": model, "data": data, "usage": usage}
