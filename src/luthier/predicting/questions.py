"""Rows of data sets -> questions: everything before a conversation's last answer, and that answer as the label.

read_questions(attrs, ...)      every row of some data sets, in order
held_out_questions(attrs, ...)  the rows that `data.dev_split` held out of a run's training
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.formats import to_row
from luthier.data.media_files import stamp
from luthier.data.prepare import DEV, split_rows
from luthier.data.read import RawRow, data_fingerprint, read_rows
from luthier.data.registry import DatasetAttr
from luthier.data.template import ChatTemplate
from luthier.types import Conversation, Request, RowError


@dataclass(frozen=True, slots=True)
class Question:
    """One row that is asked about. `index` counts all rows of a prediction, `row` those of its data set."""

    index: int
    dataset: str
    row: int
    conversation: Conversation
    """With the answer; see `prompt` and `label_text`."""

    @property
    def prompt(self) -> Conversation:
        """Everything before the last answer."""
        return Conversation(self.conversation.messages[:-1], self.conversation.tools)


@dataclass(frozen=True, slots=True)
class Unusable:
    """One row that cannot be asked about, and why."""

    index: int
    dataset: str
    row: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"index": self.index, "dataset": self.dataset, "row": self.row, "reason": self.reason}


Asked = Question | Unusable


@dataclass(frozen=True, slots=True)
class Source:
    """How rows are read: the first `max_samples` of each data set, `num_samples` drawn with the seed."""

    seed: int
    max_samples: int | None = None
    cache_dir: str | None = None
    token: str | None = None

    def raw(self, attr: DatasetAttr, max_samples: int | None) -> Iterator[RawRow]:
        return read_rows(
            attr,
            max_samples=max_samples,
            rng=np.random.RandomState(self.seed),
            cache_dir=self.cache_dir,
            token=self.token,
        )

    def fingerprint(self, attr: DatasetAttr) -> dict[str, Any]:
        """What identifies the rows of a data set, as JSON values: its bytes and what is read of them."""
        return {
            "name": attr.name,
            "data": data_fingerprint(attr, self.cache_dir, self.token),
            "format": [attr.formatting, attr.ranking, attr.columns.model_dump(), attr.tags.model_dump()],
            "rows": [self.max_samples, attr.num_samples, self.seed if attr.num_samples is not None else None],
        }


def read_questions(attrs: Sequence[DatasetAttr], source: Source) -> list[Asked]:
    """One entry for each row, usable or not. Raises DataError for files that cannot be read."""
    rows = [(attr, raw) for attr in attrs for raw in source.raw(attr, source.max_samples)]
    return [_asked(index, attr, raw, attr.name) for index, (attr, raw) in enumerate(rows)]


def held_out_questions(
    attrs: Sequence[DatasetAttr], dev_split: float, source: Source, max_samples: int | None
) -> list[Asked]:
    """The evaluation rows that `data.dev_split` takes out of these data sets, in the order of the run's evaluation.

    `source` reads them as the training did; `max_samples` keeps the first of what was held out.
    """
    rows = [(attr, raw) for attr in attrs for raw in source.raw(attr, source.max_samples)]
    _, positions = split_rows(len(rows), dev_split, source.seed)
    chosen = [rows[position] for position in positions[:max_samples]]
    return [_asked(index, attr, raw, DEV) for index, (attr, raw) in enumerate(chosen)]


def _asked(index: int, attr: DatasetAttr, raw: RawRow, name: str) -> Asked:
    try:
        conversation = to_row(raw, attr, "pair" if attr.ranking else "conversation").conversation
        assert conversation is not None
        roles = [message.role for message in conversation.messages]
        if "assistant" not in roles:
            raise RowError("no answer to compare with", raw.place)
        last = len(roles) - 1 - roles[::-1].index("assistant")
        if not last:
            raise RowError("nothing before the answer", raw.place)
    except RowError as error:
        return Unusable(index, name, raw.index, str(error))
    return Question(
        index, name, raw.index, Conversation(conversation.messages[: last + 1], conversation.tools)
    )


def media_identity(requests: Iterable[Request]) -> dict[str, str]:
    """A hash of the paths, sizes and times of change of all media of some requests; nothing where there are none."""
    stamps = [[medium.source, stamp(medium.source)] for request in requests for medium in request.media]
    return {"media": hashlib.sha256(json.dumps(stamps).encode()).hexdigest()} if stamps else {}


def label_text(question: Question, template: ChatTemplate, *, skip_special_tokens: bool) -> str:
    """The answer as a model that knows it by heart would generate it: its tokens in training, without the stop token.

    Raises RowError where the template does not render it.
    """
    encoded = template.encode(question.conversation)
    spans = [span for span in encoded.answers if span.message == len(question.conversation.messages) - 1]
    if not spans:
        raise RowError("the template does not render the answer")
    return label_of(encoded.input_ids[spans[-1].start : spans[-1].stop], template, skip_special_tokens)


def label_of(ids: Sequence[int], template: ChatTemplate, skip_special_tokens: bool) -> str:
    """The text of the tokens of an answer in the data, up to its first stop token."""
    stops = set(template.stop_ids)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return template.decode(ids[:end], skip_special_tokens=skip_special_tokens)
