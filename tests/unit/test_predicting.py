"""Which rows are asked, what their labels are, and how progress is told."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from luthier.data.described import describe
from luthier.data.template import load_template
from luthier.eval_answers import last_of_rows, question_of
from luthier.generation import GenerationSettings
from luthier.predicting.progress import PredictionProgress
from luthier.predicting.questions import (
    Question,
    Source,
    Unusable,
    held_out_questions,
    label_text,
    read_questions,
)
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Sample
from tests.tiny import chat_tokenizer, write_alpaca


def ask(*turns: tuple[str, str]) -> Question:
    return Question(0, "a", 0, Conversation(tuple(Message(role, text) for role, text in turns)))


def test_the_label_is_what_a_model_would_generate() -> None:
    template = load_template(chat_tokenizer(), DataSpec())
    question = ask(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d é 北 \n"))
    assert label_text(question, template, skip_special_tokens=True) == "d é 北 \n"
    assert [message.content for message in question.prompt.messages] == ["a", "b", "c"]


def test_turns_after_the_last_answer_are_left_out(tmp_path: Path) -> None:
    rows = [
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        [("user", "a")],
        [("assistant", "b")],
    ]
    file = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, second, third = read_questions([describe(file)], Source(0))
    assert isinstance(first, Question) and isinstance(second, Unusable) and isinstance(third, Unusable)
    assert [message.content for message in first.conversation.messages] == ["a", "b"]
    assert "no answer to compare with" in second.reason
    assert "nothing before the answer" in third.reason


def test_held_out_rows_are_the_first_of_the_seeds_permutation(tmp_path: Path) -> None:
    write_alpaca(tmp_path / "rows.json", 20)
    asked = held_out_questions([describe(tmp_path / "rows.json")], 0.25, Source(7), None)
    assert [one.row for one in asked] == np.random.default_rng(7).permutation(20)[:5].tolist()
    assert [one.index for one in asked] == [0, 1, 2, 3, 4]


def test_a_sample_is_cut_where_its_last_answer_begins() -> None:
    """The stop token ends the label, and what the template writes after it is no part of it."""
    template = load_template(chat_tokenizer(), DataSpec())
    turns = (
        Message("user", "a"),
        Message("assistant", "first"),
        Message("user", "c"),
        Message("assistant", "second"),
    )
    encoded = template.encode(Conversation(turns))
    weights = np.zeros(len(encoded.input_ids), np.float32)
    for after_stop in (False, True):
        for span in encoded.answers:
            weights[span.start : span.end if after_stop else span.stop] = 1
        sample = Sample(np.asarray(encoded.input_ids, np.int32), weights.copy(), "a", 3)
        question = question_of("a", sample, GenerationSettings(), template, skip_special_tokens=True)
        assert question.label == "second"
        assert list(question.request.prompt) == template.prompt(Conversation(turns[:-1]))


def test_of_a_row_with_several_samples_the_last_one_is_asked() -> None:
    samples = [
        Sample(np.zeros(k, np.int32), np.zeros(k, np.float32), "a", row)
        for k, row in ((2, 0), (3, 0), (4, 1))
    ]
    assert [len(sample) for sample in last_of_rows(samples)] == [3, 4]


def test_progress_without_a_terminal_is_a_line_for_each_tenth() -> None:
    times = iter(range(1000))
    file = io.StringIO()
    with PredictionProgress(40, done=20, file=file, clock=lambda: float(next(times))) as progress:
        for _ in range(20):
            progress.advance(5)
    told = file.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["24/40", "28/40", "32/40", "36/40", "40/40"]
    assert progress.tokens == 100 and told[-1].endswith("tokens/s")
    silent = io.StringIO()
    with PredictionProgress(2, quiet=True, file=silent) as progress:
        progress.advance(1)
    assert silent.getvalue() == ""


@pytest.mark.parametrize("total", [1, 3])
def test_few_rows_have_a_line_each(total: int) -> None:
    file = io.StringIO()
    with PredictionProgress(total, file=file) as progress:
        for _ in range(total):
            progress.advance(1)
    assert len(file.getvalue().splitlines()) == total
