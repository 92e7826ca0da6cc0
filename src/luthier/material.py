"""The data of a recipe, ready to train on: tokenizer, template, stage and tokens."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.markup import escape
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from luthier.arrange import Material, data_seed
from luthier.data.encode import EncodeOptions
from luthier.data.media_template import load_media_template
from luthier.data.own_template import OwnTemplate
from luthier.data.prepare import Preparation, Progress, prepare
from luthier.data.processors import load_processor
from luthier.data.report import check_max_lost, format_reports
from luthier.data.stream_preview import prepare_stream
from luthier.data.template import ChatTemplate, load_template
from luthier.engine.precedence import rollout_settings
from luthier.model.load import ModelSource, hub_arguments, load_config, load_tokenizer, locate
from luthier.model.logprobs import chosen_rows
from luthier.model.value_head import choose_padding
from luthier.model.vocabulary import (
    VocabularyChange,
    extend_tokenizer,
    recorded_change,
    replay_tokenizer,
)
from luthier.recipe.schema import AdapterSpec, Recipe, RmSpec
from luthier.show import Say, example_text
from luthier.stages import build_stage
from luthier.types import (
    Conversation,
    DataError,
    Message,
    ModelError,
    Stage,
)


def load_tokens(
    settings: Recipe, source: ModelSource, say: Say
) -> tuple[PreTrainedTokenizerFast, VocabularyChange]:
    """The tokenizer with the recipe's new tokens, or those that its adapters were trained with, and which they are.

    Raises ModelError where the recipe and its adapters do not agree on them.
    """
    tokenizer = load_tokenizer(settings.model, source)
    spec, seed = settings.model.vocabulary, settings.train.seed
    record = recorded_change(settings.method.adapters if isinstance(settings.method, AdapterSpec) else ())
    if record is not None:
        change = replay_tokenizer(tokenizer, record, spec)
    else:
        change = extend_tokenizer(tokenizer, spec, seed=seed)
    for note in change.notes:
        say(f"note: {note}")
    if change.ids:
        say(f"new tokens: {change.listed()}")
    return tokenizer, change


def read_material(
    settings: Recipe, tokenizer: PreTrainedTokenizerFast, say: Say, *, progress: Say | None = None
) -> Material:
    """Read, check and tokenize the data. Raises DataError for data that cannot be used.

    progress: told how far it is, if not `say`.
    """
    rows = _row_progress(progress or say)
    own = OwnTemplate.of(tokenizer) if settings.data.template is not None else None
    template = _template(settings, tokenizer, say)
    if own is not None and (note := own.difference(template)) is not None:
        say(f"note: {escape(note)}")
    if isinstance(settings.stage, RmSpec):
        _choose_padding(settings, template, say)
    stage, how = preparation(settings, template)
    if settings.data.stream is not None:
        streamed = prepare_stream(
            settings.data,
            how,
            rows,
            seed=data_seed(settings),
            packed=settings.train.rows_per_device is not None,
            mismatched=stage.needs_mismatched,
        )
        return Material(template, stage, streamed.data, streamed.stream)
    data = prepare(settings.data, how, rows)
    return Material(template, stage, data)


def show_material(settings: Recipe, material: Material, say: Say) -> None:
    """The data report and one example. Raises DataError over `max_lost`."""
    data = material.data
    say(escape(format_reports(data.reports)))
    check_max_lost(data.reports, settings.data.max_lost)
    shown = data.train if len(data.train) else next(iter(data.eval.values()))
    say(example_text(shown[0], material.template.decode))


def _template(settings: Recipe, tokenizer: PreTrainedTokenizerFast, say: Say) -> ChatTemplate:
    """The template, with the model's processor where it has one."""
    pieces = settings.data.rules == "llamafactory"
    source = locate(settings.model)
    try:
        processor = load_processor(
            source.path, hub_arguments(settings.model), load_config(settings.model, source)
        )
    except ModelError as error:  # text can be trained without
        say(f"note: {error}; rows with images, films or sounds are refused")
        processor = None
    if processor is None:
        return load_template(tokenizer, settings.data, pieces=pieces)
    return load_media_template(tokenizer, processor, settings.data, pieces=pieces)


def preparation(settings: Recipe, template: ChatTemplate) -> tuple[Stage, Preparation]:
    """The stage of a recipe, and how its rows become samples."""
    options = _encode_options(settings, template.tokenizer)
    stage = _stage(settings, options)
    return stage, Preparation(
        encode=stage.encode,
        template=template,
        kind=stage.kind,
        identity={"stage": settings.stage.type, **asdict(options)},
        seed=settings.train.seed,
        llamafactory=settings.data.rules == "llamafactory",
        hub_cache=settings.model.cache_dir,
        hub_token=settings.model.token,
    )


def _choose_padding(settings: Recipe, template: ChatTemplate, say: Say) -> None:
    """Padding that does not end a row: see `value_head.choose_padding`."""
    spoken = Conversation((Message("user", "a"), Message("assistant", "b")))
    try:
        encoded = template.encode(spoken)
        last_id = encoded.input_ids[encoded.answers[-1].end - 1]
    except DataError:  # a template that wants more than two turns
        last_id = template.stop_ids[0]
    named = settings.model.vocabulary is not None and settings.model.vocabulary.pad_token is not None
    note = choose_padding(template.tokenizer, last_id, template.stop_ids, named=named)
    if note is not None:
        say(f"note: {note}")


def fitted(settings: Recipe, material: Material, model: nn.Module) -> Material:
    """The same material for this model: prompts of several answers are computed once where it allows that."""
    rows, wanted = chosen_rows(model), getattr(settings.stage, "share_prompts", False)
    if not (wanted and rows.shares_prompts):
        return material
    options = _encode_options(settings, material.template.tokenizer)
    return replace(material, stage=_stage(settings, options, share_prompts=True))


def _stage(settings: Recipe, options: EncodeOptions, *, share_prompts: bool = False) -> Stage:
    """The stage of a recipe, which knows how its own answers are drawn, where it has any."""
    drawn = rollout_settings(settings.generation.model_dump(exclude={"stop"}))
    return build_stage(
        settings.stage,
        options,
        share_prompts=share_prompts,
        temperature=drawn.temperature,
        max_new_tokens=drawn.max_new_tokens,
    )


def _encode_options(settings: Recipe, tokenizer: PreTrainedTokenizerBase) -> EncodeOptions:
    compatible = settings.data.rules == "llamafactory"
    pad_id: Any = tokenizer.pad_token_id
    return EncodeOptions.of(settings.data, settings.stage.type, llamafactory=compatible, pad_id=pad_id)


def _row_progress(say: Say) -> Progress:
    """Says every 10,000 rows how far a data set is."""

    def report(name: str, done: int) -> None:
        if done % 10_000 == 0:
            say(f"{name}: {done:,} rows tokenized")

    return report
