"""Rows and a template -> samples: what is learnt, what is too long, and what was lost.

    sft_sample(row, template, options)   -> Encoded     one conversation
    pt_samples(row, template, options)   -> Encoded     one document
    windows(sample, length)              -> samples     the `split` policy
    blocks(samples, length)              -> samples     concatenated documents, cut into equal blocks

Weights are those of tokens as targets. The first token of a sample can never be one, whatever its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from luthier.recipe.schema import DataSpec
from luthier.types import (
    Conversation,
    DataError,
    Encoded,
    EncodedConversation,
    Lost,
    Media,
    Message,
    Part,
    Row,
    RowError,
    Sample,
    Span,
    Template,
)

CUT_MEDIA = "longer than max_length, and the cut would fall inside or before an image, film or sound"

Overflow = Literal["drop", "truncate", "split", "error"]
Ids = np.ndarray[Any, np.dtype[np.int32]]
Weights = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How a row becomes samples; part of the cache's key.

    `train_after_stop` learns what the template writes after the stop token, too. `llamafactory` takes the
    same rows and targets as that tool, for recipes translated from it: rows whose roles do not alternate are
    left out, empty answers and unsupervised rows are kept. `ignore_id` is a token that is never a target
    (there: padding, which may be the end token). `whole_documents` neither cuts documents nor begins them
    with a marker, for `blocks`. `reasoning` "last": the reasoning of answers before the last question is not learnt.
    `train_roles`: whose messages are learnt.
    """

    max_length: int
    overflow: Overflow
    train_on_prompt: bool = False
    mask_history: bool = False
    train_after_stop: bool = False
    llamafactory: bool = False
    ignore_id: int | None = None
    whole_documents: bool = False
    reasoning: Literal["all", "last", "none"] = "all"
    train_roles: tuple[str, ...] = ("assistant",)

    @classmethod
    def of(
        cls, spec: DataSpec, stage: str, *, llamafactory: bool = False, pad_id: int | None = None
    ) -> EncodeOptions:
        """The options of a recipe; without `data.overflow`, pt splits and every other stage drops."""
        pretraining = stage == "pt"
        return cls(
            max_length=spec.max_length,
            overflow=spec.overflow or ("split" if pretraining else "drop"),
            train_on_prompt=spec.train_on_prompt,
            mask_history=spec.mask_history,
            train_after_stop=spec.train_after_stop,
            llamafactory=llamafactory,
            ignore_id=pad_id if llamafactory and pretraining else None,
            whole_documents=llamafactory and pretraining and spec.packing,
            reasoning=spec.thinking.answers,
            train_roles=spec.train_roles,
        )


# --------------------------------------------------------------------------------------------------
# Conversations


def sft_sample(row: Row, template: Template, options: EncodeOptions) -> Encoded:
    """The answers of a conversation as targets (Ouyang et al., 2022, arXiv:2203.02155, section 3.5).

    An answer's tokens have its message's weight, 1 by default, up to and including the stop token; other messages
    that have a weight are learnt too, their text and the end token right behind it; a message's spans have their own
    weights. An answer without any content is not learnt. Answers that the template rewrites once the conversation goes
    on become samples of their own, each ending with its answer, as the model will see them.

    A row that cannot be used comes back without samples, `lost.dropped` saying why. Raises DataError for
    `overflow="error"` and for templates that cannot be trained (see `rendering`).
    """
    if row.conversation is None:
        raise DataError(f"{row.source}, row {row.index}: a conversation was expected, found plain text")
    try:
        if options.llamafactory:
            check_alternation(row.conversation)
        parts = _encode_parts(row.conversation, template, options)
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))
    except DataError as error:
        raise DataError(f"{row.source}, row {row.index}: {error}") from error
    if not options.llamafactory and not any(_learns(weights) for _, weights, _ in parts):
        return Encoded(lost=Lost(dropped="no answer to learn"))
    try:
        return _fit(row, parts, options)
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason))


_Part = tuple[EncodedConversation, Weights, tuple[Span, ...]]


def _encode_parts(conversation: Conversation, template: Template, options: EncodeOptions) -> list[_Part]:
    """The conversation, and before it a shorter one for each answer that it shows rewritten."""
    messages = conversation.messages
    whole, own = _encoded(conversation, template, options)
    last = max((k for k, message in enumerate(messages) if message.role == "assistant"), default=-1)
    parts = []
    for k in whole.rewritten:
        hidden = options.reasoning == "last" and messages[k].reasoning and k < _last_question(messages)
        if options.mask_history or hidden or not _is_learnt(messages[k], options):
            continue
        short = Conversation(messages[: k + 1], conversation.tools)
        encoded, its_own = _encoded(short, template, options)
        parts.append((encoded, _weights(encoded, its_own, messages, options, only=k), encoded.answers))
    only = last if options.mask_history else None
    return [*parts, (whole, _weights(whole, own, messages, options, only=only), whole.answers)]


_Own = tuple[tuple[Part, float | None], ...]
"""Parts of messages with weights of their own; None: what an answer has before its content, or up to the end of its
reasoning, is not learnt."""


def _encoded(
    conversation: Conversation, template: Template, options: EncodeOptions
) -> tuple[EncodedConversation, _Own]:
    own = tuple(_own_weights(conversation.messages, options))
    if not own:
        return template.encode(conversation), own
    encoded = template.encode(conversation, [part for part, _ in own])
    for (part, _), (_, stop) in zip(own, encoded.parts, strict=True):
        if part.of == "content" and not stop and part.message not in encoded.rewritten:
            raise RowError("the template does not show a message that has a weight of its own")
    return encoded, own


def _own_weights(messages: Sequence[Message], options: EncodeOptions) -> Iterator[tuple[Part, float | None]]:
    """In the order in which they hold, the last of a token's."""
    question = _last_question(messages) if options.reasoning == "last" else 0
    for k, message in enumerate(messages):
        answer = message.role == "assistant"
        if answer and k < question and message.reasoning and _weight_of(message, options):
            has_text = bool(message.content.strip())
            shown = (
                Part(k, 0, len(message.content))
                if has_text
                else Part(k, 0, len(message.reasoning), "reasoning")
            )
            yield shown, None
        if not answer and message.content.strip() and (weight := _weight_of(message, options)):
            yield Part(k, 0, len(message.content), ends=True), weight
        for start, stop, weight in message.spans:
            yield Part(k, start, stop), weight


def _last_question(messages: Sequence[Message]) -> int:
    return max((k for k, message in enumerate(messages) if message.role == "user"), default=-1)


def _weights(
    encoded: EncodedConversation,
    own: _Own,
    messages: Sequence[Message],
    options: EncodeOptions,
    *,
    only: int | None,
) -> Weights:
    base = 1.0 if options.train_on_prompt else 0.0
    weights = np.full(len(encoded.ids), base, np.float32)
    for span in encoded.answers:
        weight = _weight_of(messages[span.message], options) if only in (None, span.message) else 0.0
        weights[span.start : span.stop] = weight
        if options.train_after_stop:
            weights[span.stop : span.end] = weight
    begins = {span.message: span.start for span in encoded.answers}
    for (part, value), (start, stop) in zip(own, encoded.parts, strict=True):
        answer = messages[part.message].role == "assistant"
        if only not in (None, part.message) or (answer and part.message not in begins):
            continue
        if value is None:
            weights[begins[part.message] : start if part.of == "content" else stop] = 0
        else:
            weights[start:stop] = value
    for start, stop in encoded.media:
        weights[start:stop] = 0
    return weights


def _weight_of(message: Message, options: EncodeOptions) -> float:
    if message.weight is not None:
        return message.weight
    if message.role not in options.train_roles:
        return 0.0
    return 1.0 if has_content(message) or options.llamafactory else 0.0


def _learns(weights: Weights) -> bool:
    """Whether a sample has any target."""
    return bool(np.count_nonzero(weights[1:]))


def _is_learnt(message: Message, options: EncodeOptions) -> bool:
    return bool(_weight_of(message, options)) or any(weight for _, _, weight in message.spans)


def media_of(conversation: Conversation | None) -> tuple[Media, ...]:
    """All media of a conversation in the order of its messages."""
    return () if conversation is None else tuple(one for m in conversation.messages for one in m.media)


def has_content(message: Message) -> bool:
    """Whether an answer says anything."""
    return bool(message.content.strip() or message.tool_calls or message.reasoning)


def check_alternation(conversation: Conversation) -> None:
    """Raise RowError for roles that LLaMA-Factory leaves out."""
    turns = [message.role for message in conversation.messages if message.role != "system"]
    asks, answers = turns[0::2], turns[1::2]
    if len(turns) % 2 or set(asks) - {"user", "tool"} or set(answers) - {"assistant"}:
        raise RowError("roles do not alternate")
    if any(message.role == "system" for message in conversation.messages[1:]):
        raise RowError("system message inside the conversation")


def _fit(row: Row, parts: Sequence[_Part], options: EncodeOptions) -> Encoded:
    """Samples of at most `max_length` tokens."""
    samples: list[Sample] = []
    tokens = answers = 0
    for encoded, weights, spans in parts:
        ids = np.asarray(encoded.ids, np.int32)
        media = media_of(row.conversation)[: len(encoded.media)]
        sample = Sample(ids, weights, row.source, row.index, media=media)
        if len(ids) <= options.max_length:
            samples.append(sample)
            continue
        refuse_long(row, len(ids), options)
        if options.overflow == "drop":
            return Encoded(lost=Lost("longer than max_length"))
        if options.overflow == "split":
            pieces = windows(sample, options.max_length, encoded.media)
            samples += [piece for piece in pieces if _learns(piece.weights)]
            continue
        kept, gone = _truncated(spans, len(ids), options)
        tokens += len(ids) - len(kept)
        answers += gone
        if not all(np.isin(np.arange(*place), kept).all() for place in encoded.media):
            raise RowError(CUT_MEDIA)
        samples.append(Sample(ids[kept], weights[kept], row.source, row.index, media=media))
    if not options.llamafactory:
        samples = [sample for sample in samples if _learns(sample.weights)]
    dropped = None if samples else "nothing left to learn in max_length"
    return Encoded(tuple(samples), Lost(dropped, tokens, answers))


def refuse_long(
    row: Row, length: int, options: EncodeOptions, others: str = "drop, truncate or split"
) -> None:
    """Raise DataError where the recipe wants longer rows to be errors; `others` are the policies to choose from."""
    if options.overflow == "error":
        raise DataError(
            f"{row.source}, row {row.index}: {length} tokens, more than data.max_length "
            f"({options.max_length}); raise it, or choose data.overflow: {others}"
        )


def _truncated(spans: Sequence[Span], length: int, options: EncodeOptions) -> tuple[Ids, int]:
    """Indices of the tokens that are kept, and how many answers lost all of theirs.

    Turn by turn (the last first with `mask_history`), a turn being all that leads to an answer and the
    answer. What leads there and the answer share the room that is left: the longer one is cut, or both in
    proportion, always at its end. When no room is left, the other turns go.
    """
    starts = [0, *(span.end for span in spans)]
    turns = [(start, span.start, span.end) for start, span in zip(starts, spans, strict=False)]
    if starts[-1] < length:
        turns.append((starts[-1], length, length))
    room, kept, gone = options.max_length, [], 0
    for start, middle, end in reversed(turns) if options.mask_history else turns:
        source, target = share_room(middle - start, end - middle, room) if room > 0 else (0, 0)
        gone += int(end > middle and target == 0)
        room -= source + target
        kept.append(np.concatenate((np.arange(start, start + source), np.arange(middle, middle + target))))
    kept = kept[::-1] if options.mask_history else kept
    return np.concatenate(kept).astype(np.int32), gone


def share_room(source: int, target: int, room: int) -> tuple[int, int]:
    """Tokens that a prompt of `source` and an answer of `target` tokens keep where `room` tokens are left.

    The rule is LLaMA-Factory's, so that translated recipes keep their tokens: an answer under half the room
    stays whole; else a prompt under half the room stays whole; else both shrink in proportion.
    """
    if 2 * target < room:
        most = room
    elif 2 * source < room:
        most = room - source
    else:
        most = int(room * (target / (source + target)))
    kept = min(most, target)
    return min(max(room - kept, 0), source), kept


# --------------------------------------------------------------------------------------------------
# Documents


def pt_samples(row: Row, template: Template, options: EncodeOptions) -> Encoded:
    """A document as tokens that are all targets, its end token included; no chat template is applied.

    Longer documents are split into windows by default. An empty text is dropped (LLaMA-Factory learns its end
    token).
    """
    if row.text is None:
        raise DataError(f"{row.source}, row {row.index}: text was expected, found a conversation")
    if not row.text.strip() and not options.llamafactory:
        return Encoded(lost=Lost("empty text"))
    ids = np.asarray(template.document(row.text, begin=not options.whole_documents), np.int32)
    weights = np.ones(len(ids), np.float32)
    if options.ignore_id is not None:
        weights[ids == options.ignore_id] = 0
    sample = Sample(ids, weights, row.source, row.index)
    if len(ids) <= options.max_length or options.whole_documents:
        return Encoded((sample,))
    refuse_long(row, len(ids), options)
    if options.overflow == "drop":
        return Encoded(lost=Lost("longer than max_length"))
    if options.overflow == "split":
        return Encoded(tuple(windows(sample, options.max_length)))
    cut = Sample(ids[: options.max_length], weights[: options.max_length], row.source, row.index)
    return Encoded((cut,), Lost(tokens=len(ids) - options.max_length))


def windows(sample: Sample, length: int, places: Sequence[tuple[int, int]] = ()) -> Iterator[Sample]:
    """A long sample as consecutive windows of at most `length` tokens.

    Each window starts with the last token of the one before, as context only: so every target is trained
    exactly once, which cutting without overlap would not give, as nothing predicts a first token.

    `places` are the tokens of the sample's media; each goes with the window that holds them. Raises RowError where a
    cut falls inside of them.
    """
    for start in range(0, max(len(sample) - 1, 1), length - 1):
        weights = sample.weights[start : start + length].copy()
        if start:
            weights[0] = 0
        stop = start + length
        media = tuple(one for one, (a, b) in zip(sample.media, places, strict=True) if a < stop and b > start)
        cut = any(a < stop < b or (start and a <= start < b) for a, b in places)
        if cut:
            raise RowError(CUT_MEDIA)
        yield Sample(sample.input_ids[start:stop], weights, sample.source, sample.index, media=media)


def blocks(samples: Iterable[Sample], length: int, *, first_id: int | None = None) -> list[Sample]:
    """The samples one after the other, cut into blocks of exactly `length` tokens; the rest is left out.

    This is how LLaMA-Factory builds pre-training rows: documents in a block see each other. `first_id`
    overwrites the first token of every block. A block's source and index are those of the document in which
    it starts.
    """
    samples = list(samples)
    if not samples:
        return []
    ids = np.concatenate([sample.input_ids for sample in samples])
    weights = np.concatenate([sample.weights for sample in samples])
    ends = np.cumsum([len(sample) for sample in samples])
    cut = []
    for start in range(0, len(ids) - length + 1, length):
        block = ids[start : start + length].copy()
        if first_id is not None:
            block[0] = first_id
        origin = samples[int(np.searchsorted(ends, start, side="right"))]
        cut.append(Sample(block, weights[start : start + length], origin.source, origin.index))
    return cut
