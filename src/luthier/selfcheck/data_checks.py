"""Claims about tokens: what is trained is what is asked, and the answers are what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.data.template import ChatTemplate, load_template
from luthier.selfcheck.bench import Bench
from luthier.selfcheck.outcome import Outcome
from luthier.types import IGNORE_INDEX, Conversation, Row, RowError


def prompts(bench: Bench) -> Outcome:
    """The prompt that serving makes with the saved tokenizer is a prefix of the tokens that are trained.

    The tokenizer is saved and loaded again first, so a template that is not saved whole is found too.
    """
    claim = "train prompt = generation prompt"
    if bench.settings.stage.type == "pt":
        return Outcome("prompts", claim, 0.0, 0.0, "rows", "stage pt has no prompts")
    served = _reloaded(bench)
    checked, wrong = 0, []
    for row in bench.rows:
        try:
            apart = _where_they_part(bench.material.template, served, row)
        except RowError:
            continue  # the data report counts it as dropped
        checked += 1
        if apart:
            wrong.append(apart)
    return _counted("prompts", claim, checked, wrong)


def _reloaded(bench: Bench) -> ChatTemplate:
    folder = bench.folder / "tokenizer"
    trained = bench.material.template
    trained.tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    if trained.pieces:  # where the pieces are cut is the named template's, and not saved
        return load_template(tokenizer, bench.settings.data, pieces=True)
    return ChatTemplate(tokenizer, parse_special_tokens=trained.parse_special_tokens)


def _where_they_part(trained: ChatTemplate, served: ChatTemplate, row: Row) -> str:
    """Where training and serving part for this row; "" where they do not."""
    assert row.conversation is not None
    messages, tools = row.conversation.messages, row.conversation.tools
    encoded = trained.encode(row.conversation)
    for span in encoded.answers:
        asked = served.prompt(Conversation(messages[: span.message], tools))
        shown = encoded.input_ids[: span.start]
        if asked != shown:
            return (
                f"message {span.message}: serving asks {served.decode(asked)[-40:]!r}, "
                f"training shows {trained.decode(shown)[-40:]!r}"
            )
    return ""


def learnt(bench: Bench) -> Outcome:
    """The targets of a batch are the answers as the model is to generate them, each with its stop token.

    For pt they are all tokens of the document. Rows that were cut, or that become several samples, are left
    out.
    """
    claim = "learnt tokens = the answers"
    checked, wrong = 0, []
    for row in bench.rows:
        try:
            expected = _expected_targets(bench, row)
        except RowError:
            continue
        encoded = bench.material.stage.encode(row, bench.material.template)
        if len(encoded.samples) != 1 or encoded.lost.tokens:
            continue
        batch = bench.material.stage.collate(encoded.samples)
        found = [int(token) for token in batch.targets if token != IGNORE_INDEX]
        checked += 1
        if found != expected:
            wrong.append(f"row {row.index} of {row.source}: {_apart(bench, found, expected)}")
    return _counted("learnt", claim, checked, wrong)


def _expected_targets(bench: Bench, row: Row) -> list[int]:
    """What a row should teach, from generation prompts alone: what the template goes on with after each."""
    template, spec = bench.material.template, bench.settings.data
    if row.conversation is None:
        ids = template.document(row.text or "")
        ignored = template.tokenizer.pad_token_id if spec.rules == "llamafactory" else None
        return [token for token in ids[1:] if token != ignored]
    messages, tools = row.conversation.messages, row.conversation.tools
    if spec.train_on_prompt:
        return template.encode(row.conversation).input_ids[1:]
    asked = [k for k, message in enumerate(messages) if message.role == "assistant"]
    asked = asked[-1:] if spec.mask_history else asked
    expected: list[int] = []
    for k in asked:
        message = messages[k]
        weight = message.weight if message.weight is not None else 1.0
        if not weight or not (message.content.strip() or message.tool_calls or message.reasoning):
            continue
        prompt = template.prompt(Conversation(messages[:k], tools))
        whole = template.encode(Conversation(messages[: k + 1], tools)).input_ids
        answer = whole[len(prompt) :]
        until = list(takewhile(lambda token: token not in template.end_token_ids, answer))
        expected += answer if spec.train_after_stop else answer[: len(until) + 1]
    return expected


def _apart(bench: Bench, found: Sequence[int], expected: Sequence[int]) -> str:
    at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
    at = min(len(found), len(expected)) if at < 0 else at
    decode = bench.material.template.decode
    return (
        f"{len(found)} tokens are learnt and {len(expected)} should be; from the {at + 1}th on "
        f"{decode(found[at : at + 8])!r} instead of {decode(expected[at : at + 8])!r}"
    )


def _counted(check: str, claim: str, checked: int, wrong: Sequence[str]) -> Outcome:
    if not checked:
        return Outcome(check, claim, float("nan"), 0.0, "rows", "no row could be checked")
    detail = f"{len(wrong)} of {checked} rows; {wrong[0]}" if wrong else f"{checked} rows"
    return Outcome(check, claim, float(len(wrong)), 0.0, "rows", detail)
