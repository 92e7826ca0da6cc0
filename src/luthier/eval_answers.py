"""Answers at evaluations: the model in training answers the evaluation sets, and the numbers are those of `predict`.

answers_at_eval(recipe, ...)  ->  what the trainer calls at every evaluation, or None

The prompts are the tokens that training has before a row's last answer. Nothing of the training changes: the model
answers without gradients and without dropout, and draws from seeds of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import nn

from luthier.arrange import Material
from luthier.data.template import ChatTemplate
from luthier.engine.hf import HfEngine
from luthier.engine.precedence import model_settings, settings_of
from luthier.engine.text import answer_text
from luthier.generation import GenerationError, Request
from luthier.measures.text import ComputeMetrics
from luthier.model.load import ModelSource
from luthier.predicting.questions import label_of
from luthier.recipe.schema import Recipe
from luthier.trainer.processes import ALONE, Processes
from luthier.types import Generation, GenerationSettings, RecipeError, Sample


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    """A prompt of an evaluation set, and the answer that the data has."""

    dataset: str
    request: Request
    label: str


class EvalAnswers:
    """Answers questions with the model as it is, and measures the answers."""

    def __init__(
        self,
        engine: HfEngine,
        questions: Sequence[EvalQuestion],
        text: Callable[[Generation], str],
        processes: Processes = ALONE,
    ) -> None:
        self._engine, self._questions, self._text = engine, list(questions), text
        self._processes = processes
        self._metrics = ComputeMetrics()
        self.predictions: list[str] = []
        """Of the last evaluation, in the order of the questions."""

    def __call__(self, prefix: str) -> dict[str, float]:
        """Every number as `<prefix>_<name>`; of several sets also as `<prefix>_<set>_<name>`.

        Of several processes each answers its share, and the first one measures all answers.
        """
        self.predictions = self._processes.joined(self._processes.together(self._answered))
        return self._processes.first(partial(self._measured, prefix))

    def _answered(self) -> list[str]:
        """This process's share of the predictions."""
        questions = self._processes.share(self._questions)
        with torch.random.fork_rng():
            answers = dict(self._engine.answers([question.request for question in questions]))
        return [self._text(answers[number]) for number in range(len(questions))]

    def _measured(self, prefix: str) -> dict[str, float]:
        scores = self._metrics.scores(self.predictions, [question.label for question in self._questions])
        places: dict[str, list[int]] = {}
        for place, question in enumerate(self._questions):
            places.setdefault(question.dataset, []).append(place)
        report: dict[str, float] = {}
        if len(places) > 1:
            for dataset, rows in places.items():
                numbers = scores.take(rows).numbers()
                report |= {f"{prefix}_{dataset}_{name}": value for name, value in numbers.items()}
        return report | {f"{prefix}_{name}": value for name, value in scores.numbers().items()}


def answers_at_eval(
    recipe: Recipe,
    source: ModelSource,
    model: nn.Module,
    material: Material,
    say: Callable[[str], object],
    processes: Processes = ALONE,
) -> EvalAnswers | None:
    """What answers at evaluations, where the recipe asks for it (`train.generate_at_eval`).

    Raises RecipeError where no row leaves room for an answer, GenerationError for a wrong setting.
    """
    wanted, spec, template = recipe.train.generate_at_eval, recipe.generation, material.template
    if wanted is None:
        return None
    if spec.engine != "hf":
        say(
            f"note: generation.engine: {spec.engine}: evaluations are answered by the model in training, by engine: hf"
        )
    engine = HfEngine(
        model,
        rows=spec.rows,
        memory=spec.memory,
        decode=template.decode,
    )
    settings = settings_of(
        {},
        spec.model_dump(),
        model_settings(source.path),
        stop_ids=template.stop_ids,
    )
    seed = recipe.train.seed if settings.seed is None else settings.seed
    questions, crowded = list[EvalQuestion](), 0
    for name, table in material.data.eval.items():
        for sample in last_of_rows(table)[: wanted.max_samples]:
            number = len(questions) + crowded
            own = replace(settings, seed=seed + number) if settings.temperature > 0 else settings
            question = question_of(name, sample, own, template, skip_special_tokens=spec.skip_special_tokens)
            try:
                engine.limit(question.request)
            except GenerationError:
                crowded += 1
            else:
                questions.append(question)
    if not questions:
        raise RecipeError(
            "train.generate_at_eval: no prompt of the evaluation sets leaves room for an answer; raise "
            "generation.max_length"
        )
    if crowded:
        say(f"note: {crowded} evaluation rows leave no room for an answer, and get none")

    decode = partial(template.decode, skip_special_tokens=spec.skip_special_tokens)
    return EvalAnswers(engine, questions, partial(answer_text, decode=decode), processes)


def last_of_rows(samples: Sequence[Sample]) -> list[Sample]:
    """Of each row its last sample: the whole conversation, where earlier answers became samples of their own."""
    rows = groupby(samples, key=lambda sample: (sample.source, sample.index))
    return [list(row)[-1] for _, row in rows]


def question_of(
    name: str,
    sample: Sample,
    settings: GenerationSettings,
    template: ChatTemplate,
    *,
    skip_special_tokens: bool,
) -> EvalQuestion:
    """What comes before the last run of supervised tokens, and that run as the label."""
    learnt = np.flatnonzero(sample.weights[1:] > 0) + 1
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    start = int(learnt[breaks[-1] + 1] if len(breaks) else learnt[0]) if len(learnt) else len(sample)
    stop = int(learnt[-1]) + 1 if len(learnt) else len(sample)
    label = label_of(sample.input_ids[start:stop].tolist(), template, skip_special_tokens)
    prompt = tuple(sample.input_ids[:start].tolist())
    return EvalQuestion(name, Request(prompt, settings, media=sample.media, opener=sample.opener), label)
