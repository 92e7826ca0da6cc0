"""The parts of a run, built from a resolved recipe: its data, its model, its steps. It starts nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, set_seed

from luthier.data.batching import EpochPlan, RowsRule, TokensRule, plan_epoch
from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, PreparedData, Progress, prepare
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate, load_template
from luthier.environment import require
from luthier.methods import build_method
from luthier.model.faults import require_token_rows
from luthier.model.load import ModelSource, load_config, load_model, load_tokenizer
from luthier.model.neftune import EmbeddingNoise
from luthier.model.positions import (
    PositionsChange,
    positions_change,
    recorded_positions,
    require_positions,
)
from luthier.model.selftest import build_with_rows
from luthier.model.vocabulary import (
    VocabularyChange,
    extend_tokenizer,
    recorded_change,
    replay_tokenizer,
    resize_embeddings,
)
from luthier.publish import require_hub
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.resolve import TOKENS_PER_BATCH, Hardware
from luthier.recipe.schema import LoraSpec, Recipe
from luthier.show import Say
from luthier.stages import build_stage
from luthier.trainer.compilation import compile_layers
from luthier.trainer.evaluation import EvalSet
from luthier.trainer.metrics import Metric, load_metrics
from luthier.trainer.plugins import load_callbacks
from luthier.trainer.same_run import identity
from luthier.trainer.steps import StepDataset
from luthier.trainer.stopping import EarlyStopping
from luthier.trainer.trackers import check_trackers
from luthier.types import Method, RecipeError, Stage


@dataclass(frozen=True, slots=True)
class Material:
    """Everything about the data: how it is rendered, what is learnt from it, and its tokens."""

    template: ChatTemplate
    stage: Stage
    data: PreparedData


@dataclass(frozen=True, slots=True)
class Attachments:
    """What a recipe attaches to the loop: callbacks, early stopping among them, and metrics of evaluations."""

    callbacks: list[TrainerCallback]
    metrics: tuple[Metric, ...]


def attachments(loaded: LoadedRecipe) -> Attachments:
    """The attachments; whatever else would fail only after the training is asked for here: trackers, the hub.

    Raises RecipeError for what is missing or refused.
    """
    train_spec, beside = loaded.recipe.train, loaded.path.parent if loaded.path is not None else None
    check_trackers(train_spec.report_to)
    for name in train_spec.report_to:
        require(name, f"train.report_to: {name}")
    if train_spec.report_to and loaded.origins.get("model.token") == "command line":
        raise RecipeError(
            "model.token: trackers keep the command line, and the token with it; set HF_TOKEN instead"
        )
    callbacks = load_callbacks(train_spec.callbacks, beside)
    if (early := train_spec.early_stopping) is not None:
        callbacks.append(EarlyStopping(early.patience, early.threshold))
    metrics = load_metrics(train_spec.metrics, beside)
    require_hub(loaded.recipe)
    return Attachments(callbacks, metrics)


def require_one_process(hardware: Hardware) -> None:
    """Raise RecipeError where torchrun or the like started several."""
    if hardware.world_size > 1:
        raise RecipeError(
            f"this version trains with one process, and {hardware.world_size} were started; run it without torchrun"
        )


def run_identity(settings: Recipe, base: str, material: Material) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to tell whether it is still that one; `base` as `fingerprint` says."""
    trained = [report.dataset for report in material.data.reports[: len(settings.data.train)]]
    return identity(settings, base, [material.data.fingerprints[name] for name in trained])


def load_tokens(
    settings: Recipe, source: ModelSource, say: Say
) -> tuple[PreTrainedTokenizerFast, VocabularyChange]:
    """The tokenizer with the recipe's new tokens, or those that its adapters were trained with, and which they are.

    Raises ModelError where the recipe and its adapters do not agree on them.
    """
    tokenizer = load_tokenizer(settings.model, source)
    spec, seed = settings.model.vocabulary, settings.train.seed
    record = recorded_change(settings.method.adapters if isinstance(settings.method, LoraSpec) else ())
    if record is not None:
        change = replay_tokenizer(tokenizer, record, spec)
    else:
        change = extend_tokenizer(tokenizer, spec, seed=seed)
    for note in change.notes:
        say(f"note: {note}")
    if change.ids:
        say(f"new tokens: {change.listed()}")
    return tokenizer, change


def read_material(settings: Recipe, tokenizer: PreTrainedTokenizerFast, say: Say) -> Material:
    """Read, check and tokenize the data, saying how far it is. Raises DataError for data that cannot be used."""
    compatible = settings.data.rules == "llamafactory"
    template = load_template(tokenizer, settings.data, pieces=compatible)
    options = EncodeOptions.of(
        settings.data, settings.stage.type, llamafactory=compatible, pad_id=tokenizer.pad_token_id
    )
    stage = build_stage(settings.stage, options)
    how = Preparation(
        encode=stage.encode,
        template=template,
        kind="text" if settings.stage.type == "pt" else "conversation",
        identity={"stage": settings.stage.type, **asdict(options)},
        seed=settings.train.seed,
        llamafactory=compatible,
        hub_cache=settings.model.cache_dir,
        hub_token=settings.model.token,
    )
    data = prepare(settings.data, how, _row_progress(say))
    return Material(template, stage, data)


def _row_progress(say: Say) -> Progress:
    """Says every 10,000 rows how far a data set is."""

    def report(name: str, done: int) -> None:
        if done % 10_000 == 0:
            say(f"{name}: {done:,} rows tokenized")

    return report


def build_model(
    settings: Recipe,
    source: ModelSource,
    hardware: Hardware,
    vocabulary: VocabularyChange,
    *,
    longest: int = 0,
) -> tuple[PreTrainedModel | PeftModel, Method]:
    """The model ready to train: new tokens given rows, adapters attached, target forward installed, isolation
    proven. `vocabulary` is what `load_tokens` said, `longest` the tokens of the longest sample.

    Raises ModelError for what cannot be loaded, does not fit together, or would not be trained exactly.
    """
    device = torch.device(hardware.device)
    positions = _positions(settings, source)
    methods: list[Method] = []

    def build(own_attention: bool) -> PreTrainedModel | PeftModel:
        # What an adapter draws depends on the seed alone, not on the data before it.
        set_seed(settings.train.seed)
        base = load_model(settings.model, source, device, own_attention=own_attention, positions=positions)
        require_positions(base.config, longest, alone=settings.train.tokens_per_pass == 1)
        resized = resize_embeddings(base, vocabulary)
        require_token_rows(resized.num_tokens, resized.rows or 0, f"model.path={settings.model.path}")
        methods.append(build_method(settings.method, resized))
        return methods[-1].apply(base)  # type: ignore[no-any-return]

    arithmetic = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision)
    model = build_with_rows(build, settings.model.rows, settings.model.padding_side, arithmetic)
    assert isinstance(model, PreTrainedModel | PeftModel)
    if settings.train.neftune_alpha:
        EmbeddingNoise(model, settings.train.neftune_alpha)
    if settings.train.compile is not None:
        compile_layers(model, settings.train.compile)
    return model, methods[-1]


def longest_sample(material: Material) -> int:
    """Tokens of the longest sample of any set."""
    tables = [material.data.train, *material.data.eval.values()]
    return max((int(table.lengths.max()) for table in tables if len(table)), default=0)


def _positions(settings: Recipe, source: ModelSource) -> PositionsChange | None:
    """The stretch of positions that the recipe asks for, or its adapters were trained with."""
    spec = settings.model.rope_scaling
    wanted = None
    if spec is not None:
        wanted = positions_change(load_config(settings.model, source), spec, settings.data.max_length)
    adapters = settings.method.adapters if isinstance(settings.method, LoraSpec) else ()
    return recorded_positions(adapters, wanted, decided=spec is not None)


def training_steps(
    settings: Recipe, material: Material, world_size: int, rank: int, *, padded: bool = False
) -> StepDataset | None:
    """The steps of training; `padded` where the model's rows are (`model.logprobs.chosen_rows`)."""
    train_spec, table = settings.train, material.data.train
    if train_spec.eval_only:
        return None
    seed = train_spec.seed if train_spec.data_seed is None else train_spec.data_seed
    shuffle = settings.data.shuffle
    limit = train_spec.tokens_per_pass
    plan = partial(_epoch, table, batch_rule(settings), seed, shuffle, world_size, limit, padded)
    return StepDataset(table, plan, material.stage.collate, rank)


def batch_rule(settings: Recipe) -> RowsRule | TokensRule:
    train_spec = settings.train
    if train_spec.rows_per_device is not None:
        return RowsRule(train_spec.rows_per_device, train_spec.accumulation)
    return TokensRule(train_spec.tokens_per_batch or TOKENS_PER_BATCH)


def _epoch(
    table: SampleTable,
    rule: RowsRule | TokensRule,
    seed: int,
    shuffle: bool,
    world_size: int,
    tokens_per_pass: int | None,
    padded: bool,
    epoch: int,
) -> EpochPlan:
    return plan_epoch(
        table.lengths,
        rule=rule,
        epoch=epoch,
        seed=seed,
        shuffle=shuffle,
        world_size=world_size,
        tokens_per_pass=tokens_per_pass,
        groups=table.groups if isinstance(rule, RowsRule) else None,
        padded=padded,
    )


def padding_share(settings: Recipe, material: Material) -> float:
    """The part of the positions of the first epoch that is padding, where rows are padded."""
    limit = settings.train.tokens_per_pass
    plan = _epoch(
        material.data.train,
        batch_rule(settings),
        settings.train.seed if settings.train.data_seed is None else settings.train.data_seed,
        settings.data.shuffle,
        1,
        limit,
        True,
        0,
    )
    return plan.padding_share()


def eval_sets(
    settings: Recipe, material: Material, world_size: int, *, padded: bool = False
) -> dict[str, EvalSet]:
    """Every evaluation set in passes of the training size, shared out among processes.

    Its rows keep their order, except where `padded` rows of like length go together.
    """
    sets = {}
    for name, table in material.data.eval.items():
        limit = settings.train.tokens_per_pass or TOKENS_PER_BATCH
        rule = TokensRule(max(1, int(table.lengths.sum())) if padded else limit)
        plan = plan_epoch(
            table.lengths,
            rule=rule,
            epoch=0,
            seed=0,
            shuffle=False,
            tokens_per_pass=limit if padded else None,
            padded=padded,
        )
        passes = [indices for step in plan for indices in step[0]]
        sets[name] = EvalSet(table, [passes[rank::world_size] for rank in range(world_size)])
    return sets
