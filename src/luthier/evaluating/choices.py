"""Which letter a model answers multiple-choice questions with: the likeliest of A to D as the next token.

answer_benchmark(judge, benchmark, asking)  ->  Answered

The prompts are those of the benchmarks (Hendrycks et al., 2021, arXiv:2009.03300; Huang et al., 2023,
arXiv:2305.08322): a line that names the subject, examples with their answers, the question, and "Answer:". They are
turns of a conversation in the model's own template, or, for base models, one text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from luthier.data.template import ChatTemplate
from luthier.evaluating.benchmark import LETTERS, Benchmark, Question, Subject
from luthier.evaluating.judge import Judge
from luthier.measures.intervals import ends, share_difference, wilson
from luthier.types import Conversation, DataError, Message, ModelError

Layout = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class Wording:
    """The words around a question. between: what separates them from the letter in plain text."""

    opening: str
    answer: str
    between: str


WORDINGS = {
    "en": Wording(
        "The following are multiple choice questions (with answers) about {subject}.\n\n", "\nAnswer:", " "
    ),
    "zh": Wording("以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n", "\n答案：", ""),
}


@dataclass(frozen=True, slots=True)
class Asking:
    """How questions are put: words, turns of a conversation or one text, and at most this many examples before."""

    lang: str = "en"
    layout: Layout = "chat"
    num_shots: int = 5


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to the letter, the tokens that A to D are there, and the examples that did not fit."""

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class SubjectAnswers:
    """answers: a letter for each question; logprobs (n, 4) of the letters."""

    subject: Subject
    answers: str
    logprobs: np.ndarray[Any, np.dtype[np.float32]]
    shots_left_out: int = 0

    @property
    def right(self) -> list[bool]:
        return [a == q.answer for a, q in zip(self.answers, self.subject.questions, strict=True)]


@dataclass(frozen=True, slots=True)
class Answered:
    """A benchmark as a model answered it."""

    benchmark: Benchmark
    asking: Asking
    subjects: Sequence[SubjectAnswers]

    @property
    def right(self) -> list[bool]:
        return [one for subject in self.subjects for one in subject.right]

    def categories(self) -> dict[str, list[bool]]:
        """Right or wrong by category, in the order of the subjects."""
        found: dict[str, list[bool]] = defaultdict(list)
        for answers in self.subjects:
            found[answers.subject.category] += answers.right
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.benchmark.task,
            "lang": self.asking.lang,
            "layout": self.asking.layout,
            "n_shot": self.asking.num_shots,
            "shots_left_out": sum(one.shots_left_out for one in self.subjects),
            "average": accuracy(self.right),
            "categories": {name: accuracy(right) for name, right in self.categories().items()},
            "subjects": {
                one.subject.name: {
                    "title": one.subject.title,
                    "category": one.subject.category,
                    **accuracy(one.right),
                    "answers": one.answers,
                }
                for one in self.subjects
            },
        }


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """The share that is right and its interval."""
    share = sum(right) / len(right) if right else None
    return {
        "questions": len(right),
        "right": sum(right),
        "accuracy": share,
        "interval": ends(wilson(sum(right), len(right))),
    }


def difference(tuned: Answered, other: Answered) -> dict[str, Any]:
    """The accuracy of the first less that of the second, on all questions and by category, each with its interval."""

    def one(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
        value = (sum(first) - sum(second)) / len(first) if first else None
        return {"value": value, "interval": ends(share_difference(first, second)), "questions": len(first)}

    theirs = other.categories()
    return {
        "average": one(tuned.right, other.right),
        "categories": {name: one(right, theirs[name]) for name, right in tuned.categories().items()},
    }


def answer_benchmark(
    judge: Judge, prompts: Mapping[str, Sequence[Prompt]], benchmark: Benchmark, asking: Asking
) -> Answered:
    """The letters that the model gives, with prompts as `benchmark_prompts` made them."""
    subjects = []
    for subject in benchmark.subjects:
        mine = prompts[subject.name]
        logprobs = np.zeros((len(mine), len(LETTERS)), np.float32)
        by_tokens: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, prompt in enumerate(mine):
            by_tokens[prompt.tokens].append(number)
        for tokens, numbers in by_tokens.items():
            logprobs[numbers] = judge.next_logprobs([mine[number].ids for number in numbers], tokens)
        answers = "".join(LETTERS[best] for best in logprobs.argmax(-1).tolist())
        left_out = sum(prompt.left_out for prompt in mine)
        subjects.append(SubjectAnswers(subject, answers, logprobs, left_out))
    return Answered(benchmark, asking, subjects)


def benchmark_prompts(
    benchmark: Benchmark, asking: Asking, template: ChatTemplate, most: int | None
) -> dict[str, list[Prompt]]:
    """The prompts of every subject, at most `most` tokens each: where examples do not fit, the last ones are left out.

    Raises DataError for a question that does not fit alone, ModelError where one token does not tell the letters apart.
    """
    return {subject.name: list(_prompts(subject, asking, template, most)) for subject in benchmark.subjects}


def _prompts(subject: Subject, asking: Asking, template: ChatTemplate, most: int | None) -> Iterator[Prompt]:
    ask = _Chat(template) if asking.layout == "chat" else _Text(template)
    for question in subject.questions:
        shots = list(subject.shots[: asking.num_shots])
        prompt = ask(subject.title, shots, question, WORDINGS[asking.lang])
        while most is not None and len(prompt.ids) + 1 > most:
            if not shots:
                raise DataError(
                    f"{question.place}: the question has {len(prompt.ids)} tokens, more than the "
                    f"model's context of {most}"
                )
            shots.pop()
            prompt = ask(subject.title, shots, question, WORDINGS[asking.lang])
        yield Prompt(prompt.ids, prompt.tokens, min(asking.num_shots, len(subject.shots)) - len(shots))


def _asked(question: Question, words: Wording) -> str:
    choices = (f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))
    return question.text + "".join(choices) + words.answer


@dataclass(slots=True)
class _Chat:
    """Each example is a turn. What the template writes between prompt and letter is found once for a subject."""

    template: ChatTemplate
    _found: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __call__(self, title: str, shots: Sequence[Question], question: Question, words: Wording) -> Prompt:
        messages: list[Message] = []
        opening = words.opening.format(subject=title)
        for shot in shots:
            messages += [Message("user", opening + _asked(shot, words)), Message("assistant", shot.answer)]
            opening = ""
        messages.append(Message("user", opening + _asked(question, words)))
        prompt = self.template.prompt(Conversation(tuple(messages)))
        if self._found is None:
            wholes = [
                self.template.encode(Conversation((*messages, Message("assistant", letter)))).input_ids
                for letter in LETTERS
            ]
            shared = _shared(wholes)
            if wholes[0][: len(prompt)] != prompt or shared < len(prompt):
                raise ModelError(
                    f"{question.place}: the template does not write its prompt before an answer; use --layout text"
                )
            self._found = tuple(wholes[0][len(prompt) : shared]), _told_apart(wholes, shared)
        between, tokens = self._found
        return Prompt((*prompt, *between), tokens)


@dataclass(frozen=True, slots=True)
class _Text:
    """Everything is one text, the examples apart by an empty line."""

    template: ChatTemplate

    def __call__(self, title: str, shots: Sequence[Question], question: Question, words: Wording) -> Prompt:
        parts = [_asked(shot, words) + words.between + shot.answer + "\n\n" for shot in shots]
        text = words.opening.format(subject=title) + "".join(parts) + _asked(question, words)
        begin = self.template.begin_ids
        wholes = [[*begin, *self.template.text(text + words.between + letter)] for letter in LETTERS]
        shared = _shared(wholes)
        return Prompt(tuple(wholes[0][:shared]), _told_apart(wholes, shared))


def _shared(wholes: Sequence[Sequence[int]]) -> int:
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*wholes, strict=False)))


def _told_apart(wholes: Sequence[Sequence[int]], at: int) -> tuple[int, ...]:
    tokens = tuple(whole[at] if at < len(whole) else -1 for whole in wholes)
    if len(set(tokens)) < len(LETTERS) or -1 in tokens:
        raise ModelError(
            "the tokenizer writes the letters A to D with tokens that do not differ at one position"
        )
    return tokens
