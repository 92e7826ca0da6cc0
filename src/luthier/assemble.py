"""The parts of a run, built from a resolved recipe: its data, its model, its steps. It starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from luthier.arrange import Material, first_batches
from luthier.data.media_template import MediaTemplate
from luthier.environment import require
from luthier.material import fitted
from luthier.measures.libraries import require_libraries
from luthier.methods import build_method
from luthier.methods.critic import attach_critic
from luthier.methods.lora import Lora
from luthier.model.calibration import Calibration
from luthier.model.dropout import drop_nothing
from luthier.model.faults import require_token_rows
from luthier.model.load import ModelSource, load_config, load_model
from luthier.model.logprobs import chosen_rows
from luthier.model.multimodal import is_multimodal
from luthier.model.neftune import EmbeddingNoise
from luthier.model.norms import upcast_trained
from luthier.model.original_weights import OriginalWeights
from luthier.model.positions import (
    PositionsChange,
    positions_change,
    recorded_positions,
    require_positions,
)
from luthier.model.probes import LANGUAGE
from luthier.model.processor import set_processor
from luthier.model.quantize import require_adapter_method
from luthier.model.selftest import build_with_rows
from luthier.model.value_head import ScoreProbe
from luthier.model.vocabulary import (
    VocabularyChange,
    resize_embeddings,
)
from luthier.optim.groups import cut_groups
from luthier.optim.schedule import Factor
from luthier.publish import require_hub
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.online import OnlineSpec, PpoSpec
from luthier.recipe.parallel import DeepSpeedSpec
from luthier.recipe.resolve import Hardware
from luthier.recipe.schema import AdapterSpec, Recipe, RmSpec
from luthier.show import Say
from luthier.trainer.compilation import compile_layers
from luthier.trainer.metrics import Metric, load_metrics
from luthier.trainer.plugins import load_callbacks, load_schedule
from luthier.trainer.precision import AUTOCAST, autocast_type
from luthier.trainer.same_run import identity
from luthier.trainer.stopping import EarlyStopping
from luthier.trainer.trackers import check_trackers
from luthier.types import (
    Method,
    ModelError,
    ModelKind,
    RecipeError,
)


@dataclass(frozen=True, slots=True)
class Attachments:
    """What a recipe attaches to the loop: callbacks, early stopping among them, metrics of evaluations, and a schedule
    of the user's own."""

    callbacks: list[TrainerCallback]
    metrics: tuple[Metric, ...]
    schedule: Factor | None


def attachments(loaded: LoadedRecipe) -> Attachments:
    """The attachments; whatever else would fail only later is asked for here: the method, trackers, the hub.

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
    build_method(loaded.recipe.method)
    if train_spec.generate_at_eval is not None:
        require_libraries("train.generate_at_eval")
    callbacks = load_callbacks(train_spec.callbacks, beside)
    if (early := train_spec.early_stopping) is not None:
        callbacks.append(EarlyStopping(early.patience, early.threshold))
    metrics = load_metrics(train_spec.metrics, beside)
    require_hub(loaded.recipe)
    return Attachments(callbacks, metrics, load_schedule(loaded.recipe.optim.schedule_function, beside))


def run_identity(settings: Recipe, base: str, material: Material, processes: int = 1) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to tell whether it is still that one; `base` as `fingerprint` says,
    `processes` how many train it."""
    trained = [report.dataset for report in material.data.reports[: len(settings.data.train)]]
    return identity(settings, base, [material.data.fingerprints[name] for name in trained], processes)


def build_model(
    settings: Recipe,
    source: ModelSource,
    hardware: Hardware,
    vocabulary: VocabularyChange,
    *,
    longest: int = 0,
    material: Material | None = None,
    resumed: Path | None = None,
    say: Say = lambda text: None,
    on_host: bool = False,
) -> tuple[PreTrainedModel | PeftModel, Method]:
    """The model ready to train: new tokens given rows, adapters attached, target forward installed, isolation
    proven. `vocabulary` is what `load_tokens` said, `longest` the tokens of the longest sample; `on_host` has it in the
    host's memory, whatever the device.

    A method that starts from the run's data sees rows of `material`, or takes the shapes of the checkpoint `resumed`,
    which holds what the rows led to. Raises ModelError for what cannot be loaded, does not fit together, or would not
    be trained exactly.
    """
    _require_libraries(settings)
    device = torch.device(hardware.device)
    load = partial(load_model, positions=_positions(settings, source), on_host=on_host)
    kind: ModelKind = "reward" if isinstance(settings.stage, RmSpec) else "language"
    methods: list[Method] = []

    def build(own_attention: bool) -> PreTrainedModel | PeftModel:
        # What an adapter draws depends on the seed alone, not on the data before it.
        set_seed(settings.train.seed)
        base = load(settings.model, source, device, own_attention=own_attention, kind=kind)
        require_adapter_method(base, settings.method, f"model.path={settings.model.path}")
        require_positions(base.config, longest, alone=settings.train.tokens_per_pass == 1)
        resized = resize_embeddings(base, vocabulary)
        require_token_rows(resized.num_tokens, resized.rows or 0, f"model.path={settings.model.path}")
        methods.append(build_method(settings.method, resized))
        model: PreTrainedModel | PeftModel = methods[-1].apply(base)
        if settings.model.upcast_trained:
            upcast_trained(model)
        return model

    model = build_with_rows(
        build,
        settings.model.rows,
        settings.model.padding_side,
        autocast_type(settings.train.precision),
        ScoreProbe() if kind == "reward" else LANGUAGE,
        share_prompts=getattr(settings.stage, "share_prompts", False),
        media=is_multimodal(load_config(settings.model, source)) and _has_media(material),
    )
    assert isinstance(model, PreTrainedModel | PeftModel)
    if material is not None and isinstance(material.template, MediaTemplate):
        set_processor(model, material.template.reader.settings)
    if isinstance(methods[-1], Lora) and isinstance(model, PeftModel):
        held = torch.device("cpu") if on_host else device
        begin_adapter(settings, source, held, model, methods[-1], material, resumed, say)
    return model, _finish(settings, model, methods[-1], say)


def _require_libraries(settings: Recipe) -> None:
    if getattr(settings.optim, "bits", 32) == 8 or getattr(settings.optim, "paged", False):
        require("bitsandbytes", "optim.bits=8 or optim.paged=true")
    if isinstance(settings.parallel, DeepSpeedSpec):
        require("deepspeed", "parallel: {type: deepspeed}")


def _has_media(material: Material | None) -> bool:
    """Whether rows may have images, films or sounds; of data that nobody has seen they may."""
    if material is None or material.stream is not None:  # of which the first rows alone are known
        return True
    return any(table.has_media for table in (material.data.train, *material.data.eval.values()))


def _finish(settings: Recipe, model: PreTrainedModel | PeftModel, method: Method, say: Say) -> Method:
    """What comes once it is known what trains: the critic, of a stage that has one; returns what saves all of it."""
    if isinstance(settings.stage, PpoSpec):
        _, method = attach_critic(settings.stage, model, method, say)
    if isinstance(settings.stage, OnlineSpec):
        drop_nothing(model)  # answers are drawn without; the probability ratio would not begin at 1
    # The trainer cuts them again; here nothing has been written yet.
    optim = settings.optim
    cut_groups(optim, method.parameter_groups(model, optim.weight_decay, optim.lr), model)
    if settings.train.neftune_alpha:
        EmbeddingNoise(model, settings.train.neftune_alpha)
    if settings.train.compile is not None:
        compile_layers(model, settings.train.compile)
    return method


def begin_adapter(
    settings: Recipe,
    source: ModelSource,
    device: torch.device,
    model: PeftModel,
    method: Lora,
    material: Material | None,
    resumed: Path | None,
    say: Say,
) -> None:
    """What a fresh adapter starts from, where that is more than its weights and the seed; see `build_model`."""
    label = f"method.init={method.spec.init}"
    if method.needs_original_weights:
        prefix: Any = model.get_base_model().base_model_prefix
        method.make_up_for_rounding(model, OriginalWeights(settings.model, source, prefix), say)
    wanted = method.num_calibration_samples
    if (
        not wanted or settings.train.eval_only
    ):  # an adapter that starts so changes nothing before its first step
        return
    if resumed is not None:
        method.take_shapes(model, resumed)
        return
    if material is None or not len(material.data.train):
        raise ModelError(f"{label} looks at the training data before the first step, and there is none")
    material, padded = fitted(settings, material, model), chosen_rows(model).padded
    batches = first_batches(settings, material, wanted, least=method.least_tokens(model), padded=padded)
    calibration = Calibration(
        batches=batches,
        device=device,
        scores=material.stage.model == "reward",
        arithmetic=AUTOCAST[settings.train.precision],
        label=label,
        say=say,
    )
    shown = min(wanted, len(material.data.train))
    say(f"{label}: looking at {shown:,} of the training samples, {calibration.num_tokens:,} tokens")
    method.calibrate(model, calibration)


def longest_sample(settings: Recipe, material: Material) -> int:
    """Tokens of the longest row of any set."""
    tables = [table for table in (material.data.train, *material.data.eval.values()) if len(table)]
    longest = max((int(table.row_lengths.max()) for table in tables), default=0)
    if material.stream is not None:  # of which only the first rows are known
        return max(longest, settings.data.max_length)
    if not material.stage.needs_mismatched:
        return longest
    # The longest answer may come behind the longest prompt, and is cut to the limit there.
    answers = [
        int(table.prompt_lengths.max() + (table.lengths - table.prompt_lengths).max()) for table in tables
    ]
    return max(longest, min(settings.data.max_length, max(answers, default=0)))


def _positions(settings: Recipe, source: ModelSource) -> PositionsChange | None:
    """The stretch of positions that the recipe asks for, or its adapters were trained with."""
    spec = settings.model.rope_scaling
    wanted = None
    if spec is not None:
        wanted = positions_change(load_config(settings.model, source), spec, settings.data.max_length)
    adapters = settings.method.adapters if isinstance(settings.method, AdapterSpec) else ()
    return recorded_positions(adapters, wanted, decided=spec is not None)
