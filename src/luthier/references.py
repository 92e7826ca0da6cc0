"""The model that answers are compared with: built beside the policy, or asked once before training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from luthier.arrange import Material
from luthier.data.reference_cache import ReferenceCache
from luthier.methods.adapter_files import attach_adapter
from luthier.model.load import ModelSource, fingerprint, load_model, locate
from luthier.model.logprobs import chosen_rows
from luthier.model.reference import AdaptersOff, AsItIs, OtherModel, Reference, StartingPoint
from luthier.model.selftest import build_with_rows
from luthier.parallel.strategy import Strategy
from luthier.recipe.deepspeed_json import zero_stage
from luthier.recipe.parallel import DeepSpeedSpec
from luthier.recipe.resolve import TOKENS_PER_BATCH, Hardware
from luthier.recipe.schema import AdapterSpec, Recipe, ReferenceSpec
from luthier.show import Say
from luthier.trainer.checkpoint import hash_file
from luthier.trainer.precision import AUTOCAST, autocast_type
from luthier.trainer.precompute import Precomputation
from luthier.trainer.processes import ALONE, Processes
from luthier.types import ModelError


def live_reference(
    settings: Recipe,
    hardware: Hardware,
    model: PreTrainedModel | PeftModel,
    material: Material,
    strategy: Strategy | None = None,
) -> Reference | None:
    """The reference that stays beside the policy; None where the stage has none, or it was asked before."""
    if not material.stage.needs_reference or reference_spec(settings).precompute:
        return None
    return build_reference(settings, hardware, model, strategy=strategy)


def build_reference(
    settings: Recipe,
    hardware: Hardware,
    model: PreTrainedModel | PeftModel,
    *,
    before: bool = False,
    strategy: Strategy | None = None,
) -> Reference:
    """The model that the stage compares with, as the recipe's `stage.reference` says; `before` the first step the
    policy itself is what it starts from. Where `strategy` has divided the policy, another model is divided too.

    Raises ModelError for another model that cannot be loaded or has another vocabulary, and where a copy of divided
    weights would be needed.
    """
    spec = reference_spec(settings)
    if spec.path is not None:
        on_host = strategy is not None and strategy.loads_on_host
        other = OtherModel(_other_model(settings, spec, hardware, model, on_host=on_host))
        if strategy is not None:
            strategy.divide(other.model)
        return other
    fresh = (
        isinstance(settings.method, AdapterSpec) and not settings.method.continues and not _nearer(settings)
    )
    base = getattr(settings.stage, "reference", "start") == "base"
    if isinstance(model, PeftModel) and (fresh or base):
        if getattr(model.peft_config["default"], "bias", "none") == "none":
            return AdaptersOff(model)
        if not fresh:
            raise ModelError(
                "stage.reference: base: the adapter changes biases of the base, which switching it off does not undo; "
                "name the base in stage.reference.path"
            )
    if before:
        return AsItIs()
    if isinstance(settings.parallel, DeepSpeedSpec) and zero_stage(settings) == 3:
        raise ModelError(
            "stage.reference: start: a copy of the weights cannot take the place of weights that DeepSpeed divides "
            "(zero: 3); give stage.reference: precompute, which asks it once before they are divided"
        )
    return StartingPoint(model)


def _nearer(settings: Recipe) -> bool:
    """Whether a fresh adapter already changes the base: it makes up for its rounding."""
    return getattr(settings.method, "init", None) == "loftq" and not getattr(settings.method, "adapters", ())


def reference_spec(settings: Recipe) -> ReferenceSpec:
    """The recipe's `stage.reference` in its long form."""
    short: ReferenceSpec | str = getattr(settings.stage, "reference", "start")
    return short if isinstance(short, ReferenceSpec) else ReferenceSpec(precompute=short == "precompute")


def _other_model(
    settings: Recipe,
    spec: ReferenceSpec,
    hardware: Hardware,
    policy: PreTrainedModel | PeftModel,
    *,
    on_host: bool,
) -> nn.Module:
    """Another model in the policy's layout of rows, its adapters added into its weights."""
    label, rows = f"stage.reference.path={spec.path}", chosen_rows(policy)
    described = settings.model.model_copy(
        update={"path": spec.path, "revision": None, "gguf_file": None, "gradient_checkpointing": False}
        | {"quantization": spec.quantization, "activation_offload": False}
    )
    source = locate(described)

    def build(own_attention: bool) -> nn.Module:
        other: PreTrainedModel | PeftModel
        device = torch.device(hardware.device)
        other = load_model(described, source, device, own_attention=own_attention, on_host=on_host)
        if spec.adapters and spec.quantization is not None:
            return attach_adapter(other, spec.adapters[0], trainable=False)  # beside weights that are rounded
        for folder in spec.adapters:
            merged = attach_adapter(other, folder, trainable=False).merge_and_unload()
            assert isinstance(merged, PreTrainedModel)
            other = merged
        return other

    other = build_with_rows(
        build,
        "padded" if rows.padded else "flat",
        rows.side,
        autocast_type(settings.train.precision),
        share_prompts=rows.shares_prompts,
    )
    sizes = [one.config.get_text_config().vocab_size for one in (other, policy)]  # type: ignore[union-attr, operator]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{label} has a vocabulary of {sizes[0]} tokens, and the model of {sizes[1]}; they need the same tokenizer"
        )
    if rows.shares_prompts and not chosen_rows(other).shares_prompts:
        raise ModelError(
            f"{label} cannot share prompts, which the model does; give stage.share_prompts=false"
        )
    return other


def precomputation(
    settings: Recipe,
    source: ModelSource,
    hardware: Hardware,
    model: PreTrainedModel | PeftModel,
    material: Material,
    say: Say,
    strategy: Strategy | None = None,
    processes: Processes = ALONE,
) -> Precomputation | None:
    """How the reference's log-probabilities get to the samples before training; None where they are not asked for."""
    spec = reference_spec(settings)
    if not (material.stage.needs_reference and spec.precompute):
        return None
    rows, adapters = chosen_rows(model), getattr(settings.method, "adapters", ())
    base = source if spec.path is None else locate(settings.model.model_copy(update={"path": spec.path}))
    identity = {
        "base": fingerprint(base),
        "adapters": [_adapter_hash(folder) for folder in (spec.adapters if spec.path else adapters)],
        "model": settings.model.model_dump(
            mode="json", include={"dtype", "quantization", "rope_scaling", "vocabulary", "upcast_layernorm"}
        ),
        "quantization": None if spec.quantization is None else spec.quantization.model_dump(mode="json"),
        "max_length": settings.data.max_length if settings.model.rope_scaling is not None else None,
        "seed": settings.train.seed if settings.model.vocabulary is not None else None,
        **({"start": settings.method.model_dump(mode="json")} if _nearer(settings) else {}),
        "precision": settings.train.precision,
        "device": hardware.device,
    }
    return Precomputation(
        cache=ReferenceCache(settings.data.cache, identity),
        reference=partial(build_reference, settings, hardware, model, before=True, strategy=strategy),
        model=model,
        device=torch.device(hardware.device),
        arithmetic=AUTOCAST[settings.train.precision],
        tokens_per_pass=settings.train.tokens_per_pass or TOKENS_PER_BATCH,
        share_prompts=material.stage.share_prompts,
        padded=rows.padded,
        say=say,
        # Divided weights are gathered by all processes for each pass: there everyone asks about every sample.
        processes=ALONE if strategy is not None and strategy.shards else processes,
    )


def _adapter_hash(folder: str) -> str:
    files = sorted(Path(folder).glob("adapter_*"))
    return " ".join(hash_file(path) for path in files) if files else folder
