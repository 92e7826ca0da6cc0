"""Rows with answers that are compared -> samples with branches: a prompt, and the answers that continue it.

    pair_sample(row, template, options)      -> Encoded     the better answer and the worse one
    feedback_sample(row, template, options)  -> Encoded     one answer and its label

Answers are targets as wholes, the stop token included; what comes before them is context only, earlier answers too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from luthier.data.encode import (
    CUT_MEDIA,
    EncodeOptions,
    Ids,
    check_alternation,
    has_content,
    media_of,
    refuse_long,
    share_room,
)
from luthier.types import Conversation, DataError, Encoded, Lost, Media, Row, RowError, Sample, Template


@dataclass(frozen=True, slots=True)
class _Answered:
    """A prompt and one answer to it; `weight` is that of the answer's tokens."""

    prompt: Ids
    answer: Ids
    weight: float
    media: tuple[Media, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    """Tokens of each of the prompt's media."""


def pair_sample(row: Row, template: Template, options: EncodeOptions) -> Encoded:
    """A sample of two branches, the better answer first (Ziegler et al., 2019, arXiv:1909.08593, section 2.2).

    Its label is the row's margin, NaN where the data has none. `max_length` is for the prompt with the longer answer.
    With `overflow="truncate"` the oldest tokens of the prompt go first; an answer that leaves no room for a prompt is
    cut at its end. LLaMA-Factory's rule keeps the first tokens of each and divides the room as `share_room` does.

    A row that cannot be used comes back without samples, `lost.dropped` saying why: prompts that differ, an empty
    answer, equal ones (LLaMA-Factory learns from the latter two). Raises DataError for `overflow="error"` and for
    templates that cannot be trained.
    """
    if row.conversation is None or row.rejected is None:
        raise DataError(f"{row.source}, row {row.index}: a pair of answers was expected")
    try:
        chosen, rejected = _answers(row, template, options)
        if not np.array_equal(chosen.prompt, rejected.prompt) or chosen.media != rejected.media:
            raise RowError("prompts of chosen and rejected differ")
        _refuse_equal(chosen, rejected, options)
        label = math.nan if row.margin is None else row.margin
        sample, lost = _fitted(row, (chosen, rejected), label, options)
        if not options.llamafactory and lost.tokens and _are_equal(sample):
            raise RowError("chosen and rejected are the same within max_length")
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))
    return Encoded((sample,), lost)


def feedback_sample(row: Row, template: Template, options: EncodeOptions) -> Encoded:
    """A sample of one branch, its label 1.0 for a desirable answer and 0.0 for another.

    A pair gives two samples, the better answer being desirable. What is too long and what cannot be used: as in
    `pair_sample`, for each answer on its own; one that cannot be used takes the other one with it.
    """
    pair = row.rejected is not None
    if row.conversation is None or (row.desirable is None and not pair):
        raise DataError(f"{row.source}, row {row.index}: an answer with a label was expected")
    try:
        answers = _answers(row, template, options)
        if pair:
            _refuse_equal(answers[0], answers[1], options)
        labels = [True, False] if pair else [_is_desirable(row, options)]
        made = [
            _fitted(row, (answer,), float(label), options)
            for answer, label in zip(answers, labels, strict=True)
        ]
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))
    lost = Lost(tokens=sum(lost.tokens for _, lost in made), answers=sum(lost.answers for _, lost in made))
    return Encoded(tuple(sample for sample, _ in made), lost)


def _is_desirable(row: Row, options: EncodeOptions) -> bool:
    """The label; LLaMA-Factory takes every answer without text for an undesirable one."""
    if options.llamafactory and row.conversation is not None:
        answer = row.conversation.messages[-1]
        return bool(row.desirable) and bool(answer.content or answer.tool_calls)
    return bool(row.desirable)


def _answers(row: Row, template: Template, options: EncodeOptions) -> list[_Answered]:
    """The row's answers, the better one first."""
    conversations = [c for c in (row.conversation, row.rejected) if c is not None]
    try:
        return [_answered(conversation, template, options) for conversation in conversations]
    except RowError:
        raise
    except DataError as error:
        raise DataError(f"{row.source}, row {row.index}: {error}") from error


def _answered(conversation: Conversation, template: Template, options: EncodeOptions) -> _Answered:
    if options.llamafactory:
        check_alternation(conversation)
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        raise RowError("does not end with an answer")
    last = conversation.messages[-1]
    if not options.llamafactory and not has_content(last):
        raise RowError("empty answer")
    if any(message.spans for message in conversation.messages):
        raise DataError(
            "spans with weights of their own are learnt by stage: sft alone; take them out of the row"
        )
    if any(message.weight and message.role != "assistant" for message in conversation.messages):
        raise DataError("a question is learnt by stage: sft alone; take the weight out of that message")
    weight = 1.0 if last.weight is None else last.weight
    if not weight:
        raise RowError("answer has weight 0")
    encoded = template.encode(conversation)
    span = encoded.answers[-1]
    if not span.start:
        raise RowError("no prompt")
    ids = np.asarray(encoded.ids, np.int32)
    if any(stop > span.start for _, stop in encoded.media):
        raise RowError("an answer that is compared holds an image, film or sound")
    answer = ids[span.start : span.end if options.train_after_stop else span.stop]
    return _Answered(ids[: span.start], answer, weight, media_of(conversation), encoded.media)


def _refuse_equal(chosen: _Answered, rejected: _Answered, options: EncodeOptions) -> None:
    if not options.llamafactory and np.array_equal(chosen.answer, rejected.answer):
        raise RowError("chosen and rejected are the same")


def _are_equal(sample: Sample) -> bool:
    first, second = sample.branches
    return np.array_equal(sample.input_ids[first:second], sample.input_ids[second:])


def _fitted(
    row: Row, answers: Sequence[_Answered], label: float, options: EncodeOptions
) -> tuple[Sample, Lost]:
    """The answers after their common prompt, cut where they are too long for `max_length`."""
    prompt, parts, lost = answers[0].prompt, [answer.answer for answer in answers], Lost()
    longest = max(len(part) for part in parts)
    if len(prompt) + longest > options.max_length:
        refuse_long(row, len(prompt) + longest, options, "drop or truncate")
        if options.overflow == "drop":
            raise RowError("longer than max_length")
        before = [prompt, *parts]
        prompt, *parts = after = _truncated(prompt, parts, options)
        first = 0 if options.llamafactory else len(before[0]) - len(prompt)
        if any(start < first or stop > first + len(prompt) for start, stop in answers[0].places):
            raise RowError(CUT_MEDIA)
        tokens = sum(map(len, before)) - sum(map(len, after))
        lost = Lost(None, tokens, sum(not len(part) for part in parts))
    sizes = [len(prompt), *map(len, parts)]
    weights = np.repeat(np.array([0.0, *(answer.weight for answer in answers)], np.float32), np.array(sizes))
    branches = tuple(accumulate(sizes[:-1]))
    ids = np.concatenate((prompt, *parts))
    sample = Sample(ids, weights, row.source, row.index, branches, label, media=answers[0].media)
    return sample, lost


def _truncated(prompt: Ids, answers: Sequence[Ids], options: EncodeOptions) -> list[Ids]:
    """The prompt and the answers, so that each answer fits behind the prompt."""
    longest = max(len(answer) for answer in answers)
    if options.llamafactory:
        source, target = share_room(len(prompt), longest, options.max_length)
        return [prompt[:source], *(answer[:target] for answer in answers)]
    # One token of the prompt stays: it predicts the answers' first.
    kept = max(options.max_length - longest, 1)
    return [prompt[-kept:], *(answer[: options.max_length - 1] for answer in answers)]
