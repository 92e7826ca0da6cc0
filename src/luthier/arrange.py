"""The order of a run: which samples make a step, how it is cut into passes, and what travels with each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from luthier.data.batching import EpochPlan, Lengths, RowsRule, TokensRule, Visits, branch_sizes, plan_epoch
from luthier.data.mixing import epoch_visits
from luthier.data.partners import Mismatched
from luthier.data.prepare import PreparedData
from luthier.data.streaming import Exchange, SampleStream, Shapes, Windows
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate
from luthier.recipe.resolve import TOKENS_PER_BATCH
from luthier.recipe.schema import Recipe
from luthier.trainer.evaluation import EvalSet
from luthier.trainer.steps import StepDataset
from luthier.trainer.stream_steps import StepRule, StreamSteps
from luthier.types import Batch, Sample, Stage

Attach = Callable[[Sequence[Sample]], Sequence[Sample]]
"""Gives samples what was computed of them before: the log-probabilities of a reference."""


@dataclass(frozen=True, slots=True)
class Material:
    """Everything about the data: how it is rendered, what is learnt from it, and its tokens."""

    template: ChatTemplate
    stage: Stage
    data: PreparedData
    stream: SampleStream | None = None
    """What is trained on where rows are read in training; `data.train` then has the first of them."""


def samples_of(stage: Stage, table: SampleTable, max_length: int) -> Sequence[Sample]:
    """The samples as the stage takes them: of feedback, each with an answer to another prompt."""
    return Mismatched.of(table, max_length) if stage.needs_mismatched else table


def pass_sizes(stage: Stage, table: SampleTable | Shapes, *, padded: bool) -> Lengths | None:
    """(n,) tokens that each sample takes of a pass, where that is not its length."""
    if not table.num_branches.any():
        return None
    return branch_sizes(
        table.lengths,
        table.prompt_lengths,
        table.row_lengths,
        table.num_branches,
        shared=stage.share_prompts,
        padded=padded,
    )


def training_steps(
    settings: Recipe,
    material: Material,
    world_size: int,
    rank: int,
    padded: bool = False,
    attach: Attach | None = None,
    exchange: Exchange | None = None,
) -> StepDataset | None:
    """The steps of training; `padded` where the model's rows are (`model.logprobs.chosen_rows`).

    Of a stream they are those of its first rows, unless `exchange` says how blocks get from process to process.
    """
    if settings.train.eval_only:
        return None
    if material.stream is not None and exchange is not None:
        return _stream_steps(settings, material, world_size, rank, padded, exchange)
    stage = material.stage
    samples = samples_of(stage, material.data.train, settings.data.max_length)
    plan = partial(_epoch, settings, material, world_size, padded)
    samples = samples if attach is None else attach(samples)
    return StepDataset(samples, plan, stage.collate, rank, training_sets(settings, material))


def training_sets(settings: Recipe, material: Material) -> list[str]:
    """The names of the training sets, in the order of the recipe."""
    return [report.dataset for report in material.data.reports[: len(settings.data.train)]]


def _stream_steps(
    settings: Recipe, material: Material, world_size: int, rank: int, padded: bool, exchange: Exchange
) -> StreamSteps:
    stage, stream, train_spec = material.stage, material.stream, settings.train
    assert stream is not None and train_spec.max_steps is not None
    rule = StepRule(
        batch_rule(settings),
        world_size,
        train_spec.tokens_per_pass,
        padded,
        partial(pass_sizes, stage, padded=padded),
        settings.data.max_lost,
    )
    windows = partial(Windows, rank=rank, num_processes=world_size, exchange=exchange)
    steps = train_spec.max_steps
    return StreamSteps(stream, rule, stage.collate, rank=rank, max_steps=steps, windows=windows)


def first_batches(
    settings: Recipe, material: Material, num_samples: int, *, least: int = 1, padded: bool = False
) -> list[Batch]:
    """The first samples of training in its order, collated by the stage into passes without a part in any step.

    A pass takes `train.tokens_per_pass`, and `least` real tokens where the samples suffice.
    """
    samples = samples_of(material.stage, material.data.train, settings.data.max_length)
    plan = _epoch(settings, material, 1, padded, 0)
    order = [index for step in plan.units for batch in step for index in batch][:num_samples]
    sizes = plan.lengths if plan.sizes is None else plan.sizes
    limit = settings.train.tokens_per_pass or TOKENS_PER_BATCH
    groups: list[list[int]] = [[]]
    for index in order:
        group = [*groups[-1], index]
        taken = len(group) * int(sizes[group].max()) if padded else int(sizes[group].sum())
        if taken > limit and groups[-1] and int(plan.lengths[groups[-1]].sum()) >= least:
            groups.append([index])
        else:
            groups[-1].append(index)
    if len(groups) > 1 and int(plan.lengths[groups[-1]].sum()) < least:
        last = groups.pop()
        groups[-1] += last
    return [material.stage.collate([samples[index] for index in group]) for group in groups if group]


def data_seed(settings: Recipe) -> int:
    """The seed of the order of rows."""
    train_spec = settings.train
    return train_spec.seed if train_spec.data_seed is None else train_spec.data_seed


def batch_rule(settings: Recipe) -> RowsRule | TokensRule:
    train_spec = settings.train
    if train_spec.rows_per_device is not None:
        return RowsRule(train_spec.rows_per_device, train_spec.accumulation)
    return TokensRule(train_spec.tokens_per_batch or TOKENS_PER_BATCH)


def _epoch(settings: Recipe, material: Material, world_size: int, padded: bool, epoch: int) -> EpochPlan:
    table, rule, train_spec = material.data.train, batch_rule(settings), settings.train
    visits = mixture(settings, material)
    return plan_epoch(
        table.lengths,
        rule=rule,
        epoch=epoch,
        seed=data_seed(settings),
        shuffle=settings.data.shuffle,
        world_size=world_size,
        tokens_per_pass=train_spec.tokens_per_pass,
        groups=table.groups if isinstance(rule, RowsRule) else None,
        padded=padded,
        sizes=pass_sizes(material.stage, table, padded=padded),
        visits=visits,
        row_tokens=settings.data.max_length if table.groups is not None else None,
    )


def mixture(settings: Recipe, material: Material) -> Visits | None:
    """The samples of each epoch where the recipe mixes its training sets; None where an epoch has all, each once."""
    data = settings.data
    if data.mix.is_plain or data.rules == "llamafactory":
        return None
    table = material.data.train
    names = training_sets(settings, material)
    seed = data_seed(settings)
    members = {name: table.members(name) for name in names}

    def visits(epoch: int) -> Lengths:
        return epoch_visits(data.mix, members, seed=seed, epoch=epoch, shuffle=data.shuffle)

    return visits


def padding_share(settings: Recipe, material: Material) -> float:
    """The part of the positions of the first epoch that is padding, where rows are padded."""
    return _epoch(settings, material, 1, True, 0).padding_share()


def eval_sets(
    settings: Recipe,
    material: Material,
    world_size: int,
    *,
    padded: bool = False,
    attach: Attach | None = None,
) -> dict[str, EvalSet]:
    """Every evaluation set in passes of the training size, shared out among processes.

    Its rows keep their order, except where `padded` rows of like length go together.
    """
    sets = {}
    for name, table in material.data.eval.items():
        limit = settings.train.tokens_per_pass or TOKENS_PER_BATCH
        sizes = pass_sizes(material.stage, table, padded=padded)
        lengths = table.lengths if sizes is None else sizes
        rule = TokensRule(max(1, int(lengths.sum())) if padded else limit)
        plan = plan_epoch(
            lengths,
            rule=rule,
            epoch=0,
            seed=0,
            shuffle=False,
            tokens_per_pass=limit if padded else None,
            padded=padded,
        )
        passes = [indices for step in plan for indices in step[0]]
        # Every process has as many passes: weights that are gathered for one have to be given by all.
        passes += [[]] * (-len(passes) % world_size)
        samples = samples_of(material.stage, table, settings.data.max_length)
        samples = samples if attach is None else attach(samples)
        sets[name] = EvalSet(samples, [passes[rank::world_size] for rank in range(world_size)])
    return sets
