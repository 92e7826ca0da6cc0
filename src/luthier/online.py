"""The parts of ppo and grpo: prompts from data, answers from the model in training, rewards, evaluation by rewards.

online_supply(recipe, ...)  ->  what `run` hands to the trainer

Answers are drawn as the recipe's `generation` says over neutral settings (temperature 1, nothing cut), whatever the
model's own generation_config.json says: what is learnt from has to be what the policy would say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from luthier.arrange import Material
from luthier.data.prompt_rows import PromptTable, RawRows, read_raw_rows
from luthier.data.registry import resolve_datasets
from luthier.data.table import SampleTable
from luthier.engine.hf import HfEngine
from luthier.engine.precedence import model_settings, rollout_settings
from luthier.engine.text import answer_text
from luthier.experience import Completion, Floats, Prompt
from luthier.generation import Generation, GenerationError, GenerationSettings, Request
from luthier.model.load import ModelSource
from luthier.model.logprobs import chosen_rows
from luthier.recipe.online import OnlineSpec
from luthier.recipe.resolve import TOKENS_PER_BATCH
from luthier.recipe.schema import Recipe
from luthier.rewards.build import Rewards, build_rewards
from luthier.trainer.bad_numbers import BadNumbersError
from luthier.trainer.before_update import Layout
from luthier.trainer.evaluation import Answers, EvalSet
from luthier.trainer.memory import FitMemory
from luthier.trainer.processes import ALONE, Processes
from luthier.trainer.rollout_steps import RolloutSteps, answer_seed
from luthier.trainer.rollouts import Ask, Rollouts, SamplingInterrupted
from luthier.trainer.sample_record import SampleRecord
from luthier.trainer.steps import StepDataset
from luthier.types import DataError, RecipeError

Told = Callable[[int, int], None]
"""Is told how many of how many answers are there."""


# --------------------------------------------------------------------------------------------------
# Answers


class LiveSampler:
    """Answers prompts with the model as it is. `told`, `interrupted` and `settle` are those of `Supply.watch`."""

    def __init__(
        self,
        engine: HfEngine,
        settings: GenerationSettings,
        text: Callable[[Generation], str],
    ) -> None:
        self._engine, self._settings, self._text = engine, settings, text
        self.told: Told = lambda done, total: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.settle: Callable[[], None] = lambda: None

    def has_room(self, length: int) -> bool:
        """Whether a prompt of so many tokens leaves room for an answer."""
        try:
            self._engine.limit(Request((0,) * length, self._settings))
        except GenerationError:
            return False
        return True

    def __call__(self, asked: Sequence[Ask], *, interruptible: bool) -> list[Completion]:
        requests = [Request(prompt.ids, replace(self._settings, seed=seed)) for prompt, seed in asked]
        found: dict[int, Completion] = {}
        self.settle()  # the engine puts packed weights in the place of layers
        self.told(0, len(asked))
        answers: Any = self._engine.answers(requests)
        with closing(answers):  # which frees the engine, however this ends
            for number, generation in answers:
                if interruptible and self.interrupted():
                    raise SamplingInterrupted("stopped while answers were sampled")
                found[number] = self._completion(asked[number][0], generation)
                self.told(len(found), len(asked))
        return [found[number] for number in range(len(asked))]

    def _completion(self, prompt: Prompt, generation: Generation) -> Completion:
        choices = [*generation.choices, *([generation.stop] if generation.stop is not None else [])]
        logprobs = np.array([choice.logprob for choice in choices], np.float32)
        if generation.finish == "error" or not np.isfinite(logprobs).all():
            raise BadNumbersError(
                f"{prompt.place}: the model's scores of the next token were no numbers, so it cannot be answered; the "
                "checkpoints are whole. A lower optim.lr or train.precision=bf16 in place of fp16 often helps"
            )
        ids = np.array([choice.token for choice in choices], np.int32)
        text = self._text(generation)
        return Completion(prompt, ids, logprobs, text, generation.finish, generation.bad_scores)


# --------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is counted of an answer: (K,) rewards, its tokens, and whether it was cut."""

    rewards: Floats
    length: int
    truncated: bool


class EvalRewards:
    """Answers the prompts of the evaluation sets, and tells the rewards.

    One answer to each, drawn as in rollouts, with seeds that are the same at every evaluation. Each process answers
    its share, and all know the numbers.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        sample: LiveSampler,
        score: Rewards,
        seed: int,
        processes: Processes = ALONE,
    ) -> None:
        self._prompts, self._sample, self._score, self._seed = dict(prompts), sample, score, seed
        self._processes = processes

    def __call__(self, prefix: str) -> dict[str, float]:
        """Means over all answers as `<prefix>_<name>`; of several sets also as `<prefix>_<set>_<name>`."""
        asked = [(name, prompt) for name, prompts in self._prompts.items() for prompt in prompts]
        seeds = [answer_seed(self._seed, "evaluation", number) for number in range(len(asked))]
        pairs = [(prompt, seed) for (_, prompt), seed in zip(asked, seeds, strict=True)]
        with torch.random.fork_rng():
            own = self._processes.together(lambda: self._judged(self._processes.share(pairs)))
        answers = self._processes.joined(own)
        report: dict[str, float] = {}
        if len(self._prompts) > 1:
            for name in self._prompts:
                rows = [number for number, (of, _) in enumerate(asked) if of == name]
                if rows:
                    report |= self._means(f"{prefix}_{name}", [answers[row] for row in rows])
        return report | self._means(prefix, answers)

    def _judged(self, asked: Sequence[Ask]) -> list[_Judged]:
        if not asked:
            return []
        completions = self._sample(asked, interruptible=False)
        rewards = self._score(completions)
        return [
            _Judged(one, len(completion), completion.truncated)
            for one, completion in zip(rewards, completions, strict=True)
        ]

    def _means(self, prefix: str, answers: Sequence[_Judged]) -> dict[str, float]:
        rewards = np.stack([answer.rewards for answer in answers])
        totals = self._score.totals(rewards).astype(np.float64)
        by_name = zip(self._score.names, rewards.astype(np.float64).mean(axis=0), strict=True)
        numbers = {
            "reward": float(totals.mean()),
            "reward_std": float(totals.std()),
            **{f"reward/{name}": float(mean) for name, mean in by_name},
            "completion/length": float(np.mean([answer.length for answer in answers])),
            "completion/truncated": float(np.mean([answer.truncated for answer in answers])),
        }
        return {f"{prefix}_{name}": value for name, value in numbers.items()}


# --------------------------------------------------------------------------------------------------
# Assembly


@dataclass(frozen=True, slots=True)
class Supply:
    """What a trainer learns from and evaluates on; `rollouts` of a stage that learns from answers of its own.

    `steps` is None in a run that only evaluates.
    """

    steps: StepDataset | RolloutSteps | None
    eval_sets: Mapping[str, EvalSet]
    answers: Answers | None
    rollouts: Rollouts | None = None
    sampler: LiveSampler | None = None

    def watch(self, told: Told, interrupted: Callable[[], bool], settle: Callable[[], None]) -> None:
        """Tell of the answers that are sampled, let rollouts be interrupted, and `settle` before any sampling what
        looks at the model's modules meanwhile: a checkpoint that is written in the background."""
        if self.sampler is not None:
            self.sampler.told, self.sampler.interrupted, self.sampler.settle = told, interrupted, settle

    def fit_memory(self, say: Callable[[str], None]) -> FitMemory | None:
        """What finds passes that fit into memory, where there is something to train."""
        cut = self.rollouts if self.rollouts is not None else self.steps
        return None if self.steps is None or isinstance(cut, RolloutSteps | None) else FitMemory(cut, say)


def online_supply(
    settings: Recipe,
    source: ModelSource,
    model: nn.Module,
    material: Material,
    beside: Path | None,
    say: Callable[[str], None],
    processes: Processes = ALONE,
) -> Supply:
    """Of a stage that learns from answers of its own; `beside` is the recipe's folder.

    Raises DataError where no prompt of the training data leaves room for an answer, RewardError for a prompt whose
    answers cannot be rewarded, and what `build_rewards` raises.
    """
    spec: Any = settings.stage
    stage: Any = material.stage
    sampler = _sampler(settings, source, model, material)
    rows, seed = _raw_rows(settings, material), settings.train.seed
    score = build_rewards(
        spec.rewards,
        decode=material.template.decode,
        beside=beside,
        policy=model,
        policy_base=settings.model.path,
        say=say,
    )
    fits = partial(_with_room, sampler=sampler, rows=rows, say=say)
    prompts = fits(material.data.train, "data.train")
    if not settings.train.eval_only and not len(prompts):
        raise DataError(
            "data.train: no prompt leaves room for an answer; raise generation.max_length, or use a model with a "
            "longer context"
        )
    held_out = {name: fits(table, name) for name, table in material.data.eval.items()}
    held_out = {name: table for name, table in held_out.items() if len(table)}
    for table in (() if settings.train.eval_only else (prompts,)) + tuple(held_out.values()):
        score.require(table)
    limit = settings.train.tokens_per_pass or TOKENS_PER_BATCH
    layout = Layout(limit, stage.share_prompts, chosen_rows(model).padded)
    record = None
    if spec.samples_every is not None and processes.is_first:
        folder, decode = Path(settings.train.output), material.template.decode
        record = SampleRecord(folder, spec.samples_every, spec.max_samples, decode)
    return Supply(
        steps=None if settings.train.eval_only else _steps(settings, len(prompts), spec),
        eval_sets={},
        answers=EvalRewards(held_out, sampler, score, seed, processes) if held_out else None,
        rollouts=Rollouts(stage, spec, prompts, sampler, score, layout, seed, record, processes),
        sampler=sampler,
    )


def _sampler(settings: Recipe, source: ModelSource, model: nn.Module, material: Material) -> LiveSampler:
    """The model in training as what answers. Raises RecipeError for another engine, whose weights are its own."""
    generation, template = settings.generation, material.template
    if generation.engine != "hf":
        raise RecipeError(
            f"generation.engine: {generation.engine}: it would answer with weights of its own, which do not learn; "
            f"stage: {settings.stage.type} draws its answers by engine: hf, so leave it out"
        )
    engine = HfEngine(
        model, rows=generation.rows, memory=generation.memory, decode=template.decode, pack=True
    )
    drawn = rollout_settings(
        generation.model_dump(),
        stop_ids=template.stop_ids,
        ends=model_settings(source.path).get("eos_token_id"),
    )
    decode = partial(template.decode, skip_special_tokens=generation.skip_special_tokens)
    return LiveSampler(engine, drawn, partial(answer_text, decode=decode))


def _steps(settings: Recipe, num_prompts: int, spec: OnlineSpec) -> RolloutSteps:
    train = settings.train
    return RolloutSteps(
        num_prompts,
        prompts_per_rollout=spec.prompts_per_rollout,
        updates=spec.updates,
        seed=train.seed if train.data_seed is None else train.data_seed,
        shuffle=settings.data.shuffle,
    )


def _raw_rows(settings: Recipe, material: Material) -> RawRows:
    """The rows behind all samples, as their files have them."""
    data = settings.data
    attrs = [*resolve_datasets(data.train, data), *resolve_datasets(data.eval, data)]
    tables = [material.data.train, *material.data.eval.values()]
    wanted = {(sample.source, sample.index) for table in tables for sample in table}
    return read_raw_rows(
        attrs,
        wanted,
        seed=settings.train.seed,
        max_samples=data.max_samples,
        cache_dir=settings.model.cache_dir,
        token=settings.model.token,
    )


def _with_room(
    table: SampleTable, name: str, *, sampler: LiveSampler, rows: RawRows, say: Callable[[str], object]
) -> PromptTable:
    """The prompts that leave room for an answer; says how many do not."""
    roomy = {length: sampler.has_room(length) for length in set(table.lengths.tolist())}
    kept = [sample for sample in table if roomy[len(sample)]]
    if len(kept) < len(table):
        say(f"note: {name}: {len(table) - len(kept)} prompts leave no room for an answer, and are left out")
    return PromptTable(kept, rows)
