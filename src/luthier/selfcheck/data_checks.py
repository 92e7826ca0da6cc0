"""Claims about tokens: what is trained is what is asked, and the answers are what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from luthier.data.collate import rows_of
from luthier.data.partners import Mismatched
from luthier.data.prompts import posed_part
from luthier.data.template import ChatTemplate, load_template
from luthier.selfcheck.bench import Bench
from luthier.selfcheck.outcome import Outcome, left_out
from luthier.selfcheck.rollout_checks import chosen_tokens
from luthier.types import IGNORE_INDEX, Conversation, Encoded, Row, RowError, Sample


def prompts(bench: Bench) -> Outcome:
    """The prompt that serving makes with the saved tokenizer is a prefix of the tokens that are trained.

    The tokenizer is saved and loaded again first, so a template that is not saved whole is found too.
    """
    claim = "train prompt = generation prompt"
    if bench.settings.stage.type == "pt":
        return left_out("prompts", claim, "stage pt has no prompts")
    served = _reloaded(bench)
    checked, wrong = 0, []
    for row in bench.rows:
        try:
            if bench.material.stage.kind == "prompt":
                parts = [_where_prompts_part(bench, served, row)]
            else:
                parts = [
                    _where_they_part(bench.material.template, served, conversation)
                    for conversation in (row.conversation, row.rejected)
                    if conversation is not None
                ]
            apart = next(filter(None, parts), "")
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
    parse, thinking = trained.parse_special_tokens, trained.reasoning.spec
    return ChatTemplate(tokenizer, parse_special_tokens=parse, thinking=thinking)


def _where_they_part(trained: ChatTemplate, served: ChatTemplate, conversation: Conversation) -> str:
    """Where training and serving part for this conversation; "" where they do not."""
    messages, tools = conversation.messages, conversation.tools
    encoded = trained.encode(conversation)
    for span in encoded.answers:
        mode = served.reasoning.mode(messages[span.message])
        asked = served.prompt(Conversation(messages[: span.message], tools), mode)
        shown = encoded.input_ids[: span.start]
        if asked != shown:
            return (
                f"message {span.message}: serving asks {served.decode(asked)[-40:]!r}, "
                f"training shows {trained.decode(shown)[-40:]!r}"
            )
    return ""


def _where_prompts_part(bench: Bench, served: ChatTemplate, row: Row) -> str:
    """Where the prompt that is answered in training and the one that serving makes part; "" where they do not."""
    encoded = bench.material.stage.encode(row, bench.material.template)
    if not encoded.samples or encoded.lost.tokens or row.conversation is None:
        raise RowError("not used whole")
    asked, shown = served.prompt(posed_part(row.conversation)[0]), encoded.samples[0].input_ids.tolist()
    if asked == shown:
        return ""
    return f"serving asks {served.decode(asked)[-40:]!r}, training answers {served.decode(shown)[-40:]!r}"


def learnt(bench: Bench) -> Outcome:
    """The targets of a batch are the answers as the model is to generate them, each with its stop token.

    For pt they are all tokens of the document. Of answers that are compared, each is learnt as a whole after its
    prompt, and the rows themselves must be that prompt and that answer. Rows that were cut, or of which several
    samples come, are left out.
    """
    claim = "learnt tokens = the answers"
    if bench.material.stage.kind == "prompt":
        return _learnt_of_drawn(bench, claim)
    compares = bench.material.stage.kind in ("pair", "feedback")
    checked, wrong = 0, []
    for row in bench.rows:
        try:
            expected = _expected_answers(bench, row) if compares else [_expected_targets(bench, row)]
        except RowError:
            continue
        encoded = bench.material.stage.encode(row, bench.material.template)
        if encoded.lost.tokens or not encoded.samples or (len(encoded.samples) != 1 and not compares):
            continue
        found = _compared_tokens(bench, encoded) if compares else [_targets(bench, encoded.samples)]
        checked += 1
        if found != expected:
            apart = next(
                (_apart(bench, *pair) for pair in zip(found, expected, strict=False) if pair[0] != pair[1]),
                f"{len(found)} token lists instead of {len(expected)}",
            )
            wrong.append(f"row {row.index} of {row.source}: {apart}")
    return _counted("learnt", claim, checked, wrong)


def _learnt_of_drawn(bench: Bench, claim: str) -> Outcome:
    """The same of answers that the model drew: every token that it chose is learnt, and nothing else."""
    wrong, each = [], len(bench.answers) // len(bench.samples)
    for number, sample in enumerate(bench.samples):
        answers = bench.answers[number * each : (number + 1) * each]
        expected = [token for answer in answers for token in chosen_tokens(answer)]
        found = _targets(bench, [sample])
        if found != expected:
            wrong.append(f"row {sample.index} of {sample.source}: {_apart(bench, found, expected)}")
    return _counted("learnt", claim, len(bench.samples), wrong)


def _targets(bench: Bench, samples: Sequence[Sample]) -> list[int]:
    """The targets of a batch of these samples, in their order."""
    stage = bench.material.stage
    batch = stage.collate(Mismatched(samples)[:] if stage.needs_mismatched else samples)
    return [int(token) for token in batch.targets if token != IGNORE_INDEX]


def _compared_tokens(bench: Bench, encoded: Encoded) -> list[list[int]]:
    """All tokens of every answer's row, and then all targets."""
    rows = [row.input_ids.tolist() for sample in encoded.samples for row in rows_of(sample)]
    return [*rows, _targets(bench, encoded.samples)]


def _expected_answers(bench: Bench, row: Row) -> list[list[int]]:
    """The same from generation prompts alone: each prompt with what the template goes on with."""
    rows, targets = [], []
    for conversation in (row.conversation, row.rejected):
        if conversation is not None:
            *before, last = conversation.messages
            template = bench.material.template
            prompt = template.prompt(
                Conversation(tuple(before), conversation.tools), template.reasoning.mode(last)
            )
            answer = _answer(bench, prompt, conversation)
            rows.append(prompt + answer)
            targets += answer
    return [*rows, targets]


def _answer(bench: Bench, prompt: Sequence[int], conversation: Conversation) -> list[int]:
    """What the template goes on with after this prompt: up to the token that ends an answer, or, where a reward model
    reads the whole turn, up to the next one."""
    template = bench.material.template
    answer = template.encode(conversation).input_ids[len(prompt) :]
    until = list(takewhile(lambda token: token not in template.end_token_ids, answer))
    whole = bench.settings.data.train_after_stop or bench.scores
    return answer if whole else answer[: len(until) + 1]


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
        prompt = template.prompt(Conversation(messages[:k], tools), template.reasoning.mode(message))
        expected += _answer(bench, prompt, Conversation(messages[: k + 1], tools))
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
