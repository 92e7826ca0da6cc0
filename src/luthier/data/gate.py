"""The check that stands between a data set and training: what is trained is what will be served."""

from __future__ import annotations

from collections.abc import Iterable

import jinja2

from luthier.data.template import ChatTemplate
from luthier.types import Conversation, DataError, Row, RowError


def gate(template: ChatTemplate, rows: Iterable[Row]) -> int:
    """Check conversations against the chat template that will be saved; returns how many rows were checked.

    For each row, of a pair for both answers: the installed template renders the text that is trained; the
    trained tokens read back as that text; the prompt of every answer, tokenized on its own as generation does,
    is a true prefix; each answer's last supervised tokens hold a stop token; the supervised tokens read back as
    the answer. Raises DataError naming data set and row. Rows that cannot be encoded at all are left to be
    counted as dropped.
    """
    checked = 0
    for row in rows:
        conversations = [c for c in (row.conversation, row.rejected) if c is not None]
        if not conversations:
            continue
        try:
            for conversation in conversations:
                _check(template, conversation)
        except RowError:
            continue
        except DataError as error:
            raise DataError(f"data set {row.source!r}, row {row.index}: {error}") from error
        checked += 1
    return checked


def _check(template: ChatTemplate, conversation: Conversation) -> None:
    encoded = template.encode(conversation)
    ids = encoded.input_ids
    if template.exactly(conversation) != ids:
        raise DataError("the tokenizer gives other tokens than remembered words; this is an error in Luthier")
    conversation = template.reasoning.split(conversation)
    saved = _saved(template, conversation)
    if template.rendering(conversation) != saved:
        raise DataError("the tokenizer's chat template was changed after it was loaded")
    read_back = template.decode(ids)
    # tokenizers that normalize text read back as the normalized text, however the text was cut; and where another
    # tool's pieces are wanted, so are the spaces that a tokenizer may put between them
    if (
        not template.pieces
        and read_back != saved
        and read_back != template.decode(template.whole(conversation))
    ):
        raise DataError(f"the tokens read back as {_difference(read_back, saved)} of the template's text")
    template.check_processor(conversation)
    for span in encoded.answers:
        before = Conversation(conversation.messages[: span.message], conversation.tools)
        prompt = template.prompt(before, template.reasoning.mode(conversation.messages[span.message]))
        if prompt != ids[: span.start]:
            raise DataError(
                f"message {span.message}: the prompt is not a token prefix of the training sequence; "
                f"they part at {_difference(template.decode(prompt), template.decode(ids[: span.start]))}"
            )
        if not set(template.end_token_ids) & set(ids[span.start : span.stop]):
            raise DataError(f"message {span.message}: the stop token is not supervised")


def _saved(template: ChatTemplate, conversation: Conversation) -> str:
    """The text of a conversation by the chat template that is saved with the tokenizer.

    Raises RowError where that refuses it: it may look for special tokens in words, which are encoded otherwise spelled.
    """
    try:
        text = template.tokenizer.apply_chat_template(
            template.reasoning.chat(conversation),
            tools=[dict(tool) for tool in conversation.tools] or None,
            tokenize=False,
            **template.reasoning.last_mode(conversation),
        )
    except jinja2.TemplateError as error:
        raise RowError("the chat template refuses it", str(error)) from error
    return str(text)


def _difference(found: str, expected: str) -> str:
    same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    start = max(0, same - 10)
    return f"{found[start : same + 20]!r} instead of {expected[start : same + 20]!r}"
