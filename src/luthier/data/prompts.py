"""Rows -> prompts alone: what a policy is asked, without what the data answers.

posed_part(conversation)               -> what comes before the last answer, and that answer
prompt_sample(row, template, options)  -> Encoded, a sample without targets
"""

from __future__ import annotations

import numpy as np

from luthier.data.encode import EncodeOptions, media_of, refuse_long, share_room
from luthier.types import Conversation, DataError, Encoded, Lost, Message, Row, RowError, Sample, Template


def posed_part(conversation: Conversation) -> tuple[Conversation, Message | None]:
    """Everything before the last answer, and that answer where the conversation ends with one, else None.

    Raises RowError where nothing comes before it.
    """
    messages = conversation.messages
    answer = messages[-1] if messages and messages[-1].role == "assistant" else None
    before = messages[:-1] if answer is not None else messages
    if not any(message.role != "system" for message in before):
        raise RowError("no prompt")
    return Conversation(before, conversation.tools), answer


def prompt_sample(row: Row, template: Template, options: EncodeOptions) -> Encoded:
    """The tokens up to where the assistant begins to speak, all of weight 0.

    One longer than `max_length` is dropped; with `overflow="truncate"` its oldest tokens go. LLaMA-Factory's rule
    keeps its first tokens, and leaves the row's own answer the room that it would have in training. A row that cannot
    be used comes back without samples, `lost.dropped` saying why. Raises DataError for `overflow="error"`.
    """
    if row.conversation is None:
        raise DataError(f"{row.source}, row {row.index}: a conversation was expected, found plain text")
    if media_of(row.conversation):
        raise DataError(
            f"{row.source}, row {row.index}: it holds images, films or sounds, and stages ppo and grpo answer text "
            "alone; leave such rows out, or train on them with stage sft, dpo or kto"
        )
    try:
        before, answer = posed_part(row.conversation)
        ids = np.asarray(template.prompt(before), np.int32)
        answer_length = _answer_length(row.conversation, template) if answer and options.llamafactory else 0
    except RowError as error:
        return Encoded(lost=Lost(dropped=error.reason), prompts=True)
    except DataError as error:
        raise DataError(f"{row.source}, row {row.index}: {error}") from error
    kept = ids
    if options.llamafactory:
        kept = ids[: share_room(len(ids), answer_length, options.max_length)[0]]
    elif len(ids) > options.max_length:
        refuse_long(row, len(ids), options, "drop or truncate")
        if options.overflow != "truncate":
            return Encoded(lost=Lost(dropped="prompt longer than max_length"), prompts=True)
        kept = ids[-options.max_length :]
    if not len(kept):
        return Encoded(lost=Lost(dropped="no prompt"), prompts=True)
    sample = Sample(kept, np.zeros(len(kept), np.float32), row.source, row.index)
    return Encoded((sample,), Lost(tokens=len(ids) - len(kept)), prompts=True)


def _answer_length(conversation: Conversation, template: Template) -> int:
    answers = template.encode(conversation).answers
    return answers[-1].stop - answers[-1].start if answers else 0
