"""The parts of a run, built from a resolved recipe: its data, its model, its steps. It starts nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from luthier.data.batching import RowsRule, TokensRule, plan_epoch
from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, PreparedData, Progress, prepare
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate, load_template
from luthier.methods import build_method
from luthier.model.load import ModelSource, load_model
from luthier.model.logprobs import install_target_forward
from luthier.model.selftest import require_isolation
from luthier.recipe.resolve import TOKENS_PER_BATCH, Hardware
from luthier.recipe.schema import Recipe
from luthier.show import Say
from luthier.stages import build_stage
from luthier.trainer.steps import Plan, StepDataset
from luthier.trainer.trainer import EvalSet
from luthier.types import Method, Stage


@dataclass(frozen=True, slots=True)
class Material:
    """Everything about the data: how it is rendered, what is learnt from it, and its tokens."""

    template: ChatTemplate
    stage: Stage
    data: PreparedData


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
    settings: Recipe, source: ModelSource, hardware: Hardware
) -> tuple[PreTrainedModel | PeftModel, Method]:
    """The model ready to train: adapters attached, target forward installed, isolation proven."""
    # What an adapter draws depends on the seed alone, not on the data before it.
    set_seed(settings.train.seed)
    method = build_method(settings.method)
    base = load_model(settings.model, source, torch.device(hardware.device))
    model = method.apply(base)
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
    require_isolation(model, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision))
    return model, method


def training_steps(settings: Recipe, material: Material, world_size: int, rank: int) -> StepDataset | None:
    train_spec, table = settings.train, material.data.train
    if train_spec.eval_only:
        return None
    seed = train_spec.seed if train_spec.data_seed is None else train_spec.data_seed
    shuffle = settings.data.shuffle
    plan = partial(_epoch, table, batch_rule(settings), seed, shuffle, world_size, train_spec.tokens_per_pass)
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
    epoch: int,
) -> Plan:
    return plan_epoch(
        table.lengths,
        rule=rule,
        epoch=epoch,
        seed=seed,
        shuffle=shuffle,
        world_size=world_size,
        tokens_per_pass=tokens_per_pass,
        groups=table.groups if isinstance(rule, RowsRule) else None,
    )


def eval_sets(settings: Recipe, material: Material, world_size: int) -> dict[str, EvalSet]:
    """Every evaluation set in its own order, in passes of the training size, shared out among processes."""
    sets = {}
    for name, table in material.data.eval.items():
        rule = TokensRule(settings.train.tokens_per_pass or TOKENS_PER_BATCH)
        plan = plan_epoch(table.lengths, rule=rule, epoch=0, seed=0, shuffle=False)
        passes = [indices for step in plan for indices in step[0]]
        sets[name] = EvalSet(table, [passes[rank::world_size] for rank in range(world_size)])
    return sets
