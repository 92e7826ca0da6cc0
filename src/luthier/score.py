"""The verb `score`: what a reward model says of answers, one number each, as its run's evaluation computed them.

score_file(model, file, ...)          rows of a data file: answers, or pairs of them
score_text(model, prompt, text, ...)  one answer
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.formats import to_row
from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr
from luthier.files import write_whole
from luthier.rewards.scorer import Scorer
from luthier.types import Conversation, DataError, Message, Row, RowError, Sample


@dataclass(frozen=True, slots=True)
class Scored:
    """One row: a score, those of a better and a worse answer, or the reason why there is none."""

    index: int
    scores: tuple[float, ...] = ()
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.reason is not None:
            return {"index": self.index, "score": None, "reason": self.reason}
        if len(self.scores) == 1:
            return {"index": self.index, "score": self.scores[0]}
        return {"index": self.index, "score_chosen": self.scores[0], "score_rejected": self.scores[1]}


@dataclass(frozen=True, slots=True)
class Scores:
    """All rows in the order of their file."""

    rows: list[Scored] = field(default_factory=list)

    def lines(self) -> str:
        """One JSON object for each row."""
        return "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in self.rows)

    def summary(self) -> dict[str, float]:
        """How many rows have scores and how many have none, the mean score, and of pairs the accuracy (a tie is half
        right) and the mean margin."""
        scored = [row.scores for row in self.rows if row.reason is None]
        numbers: dict[str, float] = {"rows": len(scored), "not_scored": len(self.rows) - len(scored)}
        if not scored:
            return numbers
        every = [score for scores in scored for score in scores]
        numbers["mean_score"] = sum(every) / len(every)
        apart = [scores[0] - scores[1] for scores in scored if len(scores) == 2]
        if apart:
            numbers["accuracy"] = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in apart) / len(apart)
            numbers["mean_margin"] = sum(apart) / len(apart)
        return numbers


def score_file(
    model: str | Path,
    file: str | Path,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    max_length: int | None = None,
) -> Scores:
    """Score the rows of a JSON, JSONL, CSV or Parquet file; written to `output`, where given, as JSON lines.

    model: the folder of a reward model or of a reward adapter, or a name on the hub. base: the model below the adapter,
    where it is not what the adapter's run says. max_length: of a row in tokens; that of its run where absent.
    Raises ModelError for what is no reward model, DataError for a file that cannot be read or is in the way.
    """
    if output is not None and output.exists() and not overwrite:
        raise DataError(f"{output} exists already; choose another file or give --overwrite")
    scorer = Scorer(model, base, max_length)
    attr = scorer.described(Path(file))
    scores = _scores(scorer, _rows(attr))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, scores.lines())
    return scores


def score_text(
    model: str | Path, prompt: str, text: str, *, base: str | None = None, max_length: int | None = None
) -> Scores:
    """The score of `text` as the answer to `prompt`. Raises ModelError, and DataError where it cannot be scored."""
    scorer = Scorer(model, base, max_length)
    row = Row("text", 0, Conversation((Message("user", prompt), Message("assistant", text))), desirable=True)
    scores = _scores(scorer, iter([(0, row)]))
    if scores.rows[0].reason is not None:
        raise DataError(f"the answer cannot be scored: {scores.rows[0].reason}")
    return scores


def _scores(scorer: Scorer, rows: Iterator[tuple[int, Row | RowError]]) -> Scores:
    found: dict[int, Scored] = {}
    samples: list[Sample] = []
    for index, row in rows:
        encoded = scorer.encoded(row)
        if encoded.samples:
            samples += encoded.samples
        else:
            found[index] = Scored(index, reason=encoded.lost.dropped)
    for index, numbers in scorer.numbers(samples).items():
        found[index] = Scored(index, numbers)
    return Scores([found[index] for index in sorted(found)])


def _rows(attr: DatasetAttr) -> Iterator[tuple[int, Row | RowError]]:
    """The rows of a file, answers as if they were wanted; a row that cannot be used as what is wrong with it."""
    for raw in read_rows(attr):
        try:
            if attr.ranking:
                yield raw.index, to_row(raw, attr, "pair")
            else:
                row = to_row(raw, attr, "conversation")
                yield raw.index, Row(row.source, row.index, row.conversation, desirable=True)
        except RowError as error:
            yield raw.index, error
