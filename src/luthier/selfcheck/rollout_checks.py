"""What the checks need of a stage that learns from answers of its own: answers, and the claim that they are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier.data.table import SampleTable
from luthier.engine.hf import HfEngine
from luthier.engine.precedence import rollout_settings
from luthier.generation import Generation, Request
from luthier.model.logprobs import ModelPolicy
from luthier.recipe.schema import OnlineSpec
from luthier.selfcheck.outcome import Outcome, left_out
from luthier.types import DataError, Sample

if TYPE_CHECKING:
    from luthier.selfcheck.bench import Bench

PROMPTS, ANSWERS, LONGEST = 4, 2, 24
"""Prompts of a check, answers to each, and their most tokens: enough to see a wrong position, quick on a laptop."""

CLAIM = "probabilities of sampling = recomputed"


def drawn(bench: Bench, table: SampleTable) -> tuple[list[Sample], list[Generation]]:
    """Prompts from all over the table, each with answers that the model of the bench draws, and these answers.

    The samples are those of a stage whose answers continue a prompt: every token of an answer has weight 1.
    """
    if not len(table):
        raise DataError("selfcheck needs at least one prompt to answer")
    said = rollout_settings(bench.settings.generation.model_dump(), stop_ids=bench.material.template.stop_ids)
    said = replace(said, max_new_tokens=min(said.max_new_tokens, LONGEST))
    number = min(PROMPTS, len(table))
    prompts = [table[turn * len(table) // number] for turn in range(number)]
    requests = [
        Request(tuple(prompt.input_ids.tolist()), replace(said, seed=ANSWERS * row + k))
        for row, prompt in enumerate(prompts)
        for k in range(ANSWERS)
    ]
    with torch.no_grad(), bench.autocast():
        answers = dict(HfEngine(bench.model, rows=len(requests)).answers(requests))
    generations = [answers[place] for place in range(len(requests))]
    samples = [
        _continued(prompt, generations[row * ANSWERS : (row + 1) * ANSWERS])
        for row, prompt in enumerate(prompts)
    ]
    return samples, generations


def chosen_tokens(generation: Generation) -> list[int]:
    """The tokens that the model chose, the stop token among them."""
    stop = [] if generation.stop is None else [generation.stop]
    return [choice.token for choice in (*generation.choices, *stop)]


def _continued(prompt: Sample, generations: Sequence[Generation]) -> Sample:
    answers = [np.array(chosen_tokens(generation), np.int32) for generation in generations]
    starts = np.cumsum([len(prompt), *(len(answer) for answer in answers[:-1])])
    ids = np.concatenate((prompt.input_ids, *answers))
    weights = np.repeat(np.array([0, 1], np.float32), [len(prompt), len(ids) - len(prompt)])
    return Sample(ids, weights, prompt.source, prompt.index, branches=tuple(starts.tolist()))


def sampled(bench: Bench) -> Outcome:
    """The log-probabilities that the engine drew by are those that training computes of the same tokens, at the same
    temperature: so the first ratio of a rollout is 1."""
    if not isinstance(bench.settings.stage, OnlineSpec):
        return left_out("sampled", CLAIM, f"stage {bench.settings.stage.type} draws no answers")
    generations = bench.answers
    said = [
        float(choice.logprob)  # type: ignore[arg-type]
        for generation in generations
        for choice in (*generation.choices, *([] if generation.stop is None else [generation.stop]))
    ]
    batches = [bench.stage.collate([sample]) for sample in bench.samples]
    temperature = float(getattr(bench.stage, "temperature"))  # noqa: B009 - of `experience.OnlineStage`
    found = []
    with torch.no_grad(), bench.autocast():
        for batch in batches:
            moved = batch.to(bench.device)
            found.append(
                ModelPolicy(bench.model).logprobs(moved, temperature=temperature).logprobs.double().cpu()
            )
    recomputed = torch.cat(found)
    expected = torch.tensor(said, dtype=torch.float64)
    same = recomputed.shape == expected.shape
    measured = float((recomputed - expected).abs().max()) if same else float("inf")
    detail = f"{len(said)} tokens of {len(generations)} answers at temperature {temperature:g}"
    return Outcome("sampled", CLAIM, measured, bench.bound, "nats", detail)
