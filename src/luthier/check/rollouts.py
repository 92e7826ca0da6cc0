"""Steps and memory of a stage that learns from answers of its own, each taken to be as long as it may be.

How long answers become is known only once they are drawn, so everything here is an upper bound: the longest prompts of
the data, each with all its answers, in one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from luthier.arrange import Material
from luthier.check.memory import PassShape, shape_of
from luthier.check.schedule import Schedule
from luthier.engine.hf import HfEngine
from luthier.engine.key_values import bytes_per_token
from luthier.engine.precedence import rollout_settings
from luthier.generation import GenerationError, Request
from luthier.model.logprobs import chosen_rows
from luthier.recipe.online import OnlineSpec
from luthier.recipe.resolve import TOKENS_PER_BATCH
from luthier.recipe.schema import Recipe
from luthier.trainer.experience_passes import Piece, part_of
from luthier.trainer.rollouts import Layout
from luthier.types import Sample


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What a rollout is at most: the schedule of the run, its longest pass, the longest answer in tokens, and the bytes
    of keys and values while answers are drawn."""

    schedule: Schedule
    shape: PassShape
    longest_answer: int
    sampling: int


def plan_rollouts(
    settings: Recipe, material: Material, model: nn.Module, num_steps: int
) -> RolloutPlan | None:
    """The plan of a run with `num_steps` optimizer steps in an epoch; None where no prompt has room for an answer."""
    spec, stage = settings.stage, material.stage
    assert isinstance(spec, OnlineSpec)
    answers = int(getattr(stage, "group_size"))  # noqa: B009 - of `experience.OnlineStage`
    lengths = np.sort(material.data.train.lengths)[::-1]
    rooms = {int(length): _room(settings, model, int(length)) for length in np.unique(lengths)}
    roomy = [int(length) for length in lengths if rooms[int(length)]]
    if not roomy:
        return None
    prompts = min(len(roomy), math.ceil(spec.prompts_per_rollout / spec.minibatches))
    samples = [_answered(length, answers, rooms[length]) for length in roomy[:prompts]]
    padded = chosen_rows(model).padded
    layout = Layout(settings.train.tokens_per_pass or TOKENS_PER_BATCH, stage.share_prompts, padded)
    cut = layout.cut(samples, [Piece(k, 0, answers) for k in range(len(samples))])
    shapes = [_shape(stage, samples, group, padded=padded) for group in cut]
    longest = max(range(len(shapes)), key=lambda number: shapes[number].positions)
    mean_prompt = sum(roomy) / len(roomy)
    most = max(rooms.values())
    per_step = prompts * (mean_prompt + answers * most)
    train = settings.train
    wanted = train.max_steps if train.max_steps is not None else math.ceil(train.epochs * num_steps)
    positions = sum(shape.positions for shape in shapes)
    real = sum(len(sample) for sample in samples)
    schedule = Schedule(
        steps_per_epoch=num_steps,
        steps=wanted,
        epochs=wanted / num_steps,
        tokens_per_epoch=round(num_steps * per_step),
        tokens_per_step=per_step,
        least_tokens=min(roomy) + answers,
        most_tokens=real,
        passes_per_step=len(shapes),
        longest_pass=shapes[longest].positions,
        padding_share=max(0.0, 1 - real / positions) if padded else 0.0,
        longest_at=(0, longest),
        several_passes=len(shapes) > 1,
    )
    return RolloutPlan(
        schedule, shapes[longest], most, _sampling_bytes(settings, model, rooms, len(roomy) * answers)
    )


def _room(settings: Recipe, model: nn.Module, length: int) -> int:
    """Tokens that an answer to a prompt of so many may have; 0 where there is no room."""
    drawn = rollout_settings(settings.generation.model_dump())
    try:
        return HfEngine(model).limit(Request((0,) * length, drawn))
    except GenerationError:
        return 0


def _answered(prompt: int, answers: int, longest: int) -> Sample:
    """A prompt of so many tokens with its answers, each as long as it may be."""
    length = prompt + answers * longest
    weights = np.repeat(np.array([0, 1], np.float32), [prompt, length - prompt])
    branches = tuple(prompt + k * longest for k in range(answers))
    return Sample(np.zeros(length, np.int32), weights, branches=branches)


def _shape(stage: Any, samples: Sequence[Sample], group: Sequence[Piece], *, padded: bool) -> PassShape:
    batch = stage.collate([part_of(samples[piece.sample], piece) for piece in group])
    return shape_of(batch, padded=padded)


def _sampling_bytes(settings: Recipe, model: nn.Module, rooms: dict[int, int], answers: int) -> int:
    """Keys and values of all answers under way at once, no more than the recipe lets them take."""
    config: Any = model.config
    longest = max(length + room for length, room in rooms.items() if room)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
    size = min(settings.generation.rows, answers) * longest * bytes_per_token(config, dtype)
    limit = settings.generation.memory
    return size if limit is None else min(size, limit)
