"""The last step before a run: every `auto` of a recipe becomes a value that fits the machine.

Pure: the machine is described by a `Hardware` value, so a recipe can be resolved for a machine that is
not this one. After `resolve` nobody writes to the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from luthier.recipe.load import DEFAULT, LoadedRecipe
from luthier.recipe.parallel_rules import require_parallel
from luthier.recipe.schema import (
    AdapterSpec,
    BitsAndBytesSpec,
    CheckpointingSpec,
    LoraSpec,
    OnlineSpec,
    QuantizationSpec,
    Recipe,
)
from luthier.types import RecipeError

HARDWARE = "hardware"
"""The origin of a value that the machine decided."""

TOKENS_PER_BATCH = 4096
"""Tokens of one optimizer step where nobody says: about 16 answers of 256 tokens, a common batch of rows."""

TOKENS_PER_PASS = {"cpu": 512, "mps": 2048, "cuda": 8192}
"""Most tokens in one forward pass. On a CPU 512 were as fast as 1024 or 2048 (SmolLM2, two cores) and
took half the memory; a GPU needs thousands to fill its matrix units, and 8192 tokens of a 7B model
with checkpointing still fit beside its weights. A sample is never cut: a longer one is a pass of its own."""


ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What `train.precision` computes in."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one process of a run has to work with.

    `memory` is bytes: of the GPU, or of the machine where there is none. `bf16` is whether the device
    computes bfloat16 itself; `world_size` counts processes.
    """

    device: Literal["cpu", "cuda", "mps"]
    name: str
    memory: int
    bf16: bool
    cores: int
    world_size: int = 1

    def of(self, world_size: int) -> Hardware:
        """What one of so many processes has."""
        return replace(self, world_size=world_size)


def resolve(loaded: LoadedRecipe, hardware: Hardware) -> LoadedRecipe:
    """The same recipe with nothing left open, and the origins of what was filled in.

    Only `model.rows` stays open: the loaded model itself decides it, by the two-segment self-test.
    Raises RecipeError for arithmetic that this machine cannot do.
    """
    recipe = loaded.recipe
    precision = _precision(recipe, hardware)
    _check_options(recipe, hardware)
    require_parallel(recipe, hardware.world_size)
    if recipe.model.upcast_trained and precision == "fp32" and recipe.model.dtype in ("bfloat16", "float16"):
        raise RecipeError(
            f"model.upcast_trained with model.dtype={recipe.model.dtype} makes layers of two types, which "
            "only autocast brings together; give train.precision=bf16 or fp16"
        )
    machine: dict[str, Any] = {
        "train.precision": precision,
        "train.eval_precision": _eval_precision(recipe, hardware, precision),
        "model.dtype": _dtype(recipe, hardware, precision),
        "model.quantization": _quantization(recipe, precision),
        "model.attention": _attention(recipe, hardware, precision),
        "model.gradient_checkpointing": _checkpointing(recipe, hardware),
        # More processes than cores tokenize nothing faster.
        "data.workers": min(recipe.data.workers, hardware.cores),
        "train.tokens_per_pass": recipe.train.tokens_per_pass or TOKENS_PER_PASS[hardware.device],
    }
    filled: dict[str, Any] = {
        "data.overflow": recipe.data.overflow or ("split" if recipe.stage.type == "pt" else "drop"),
        "train.data_seed": recipe.train.seed if recipe.train.data_seed is None else recipe.train.data_seed,
        "train.best_metric": best_metric(recipe),
        "train.greater_is_better": _greater_is_better(recipe),
    }
    if recipe.train.rows_per_device is None and not isinstance(recipe.stage, OnlineSpec):
        filled["train.tokens_per_batch"] = recipe.train.tokens_per_batch or TOKENS_PER_BATCH
    if isinstance(recipe.method, LoraSpec):
        filled["method.alpha"] = recipe.method.alpha or 2.0 * recipe.method.rank
    origins = dict(loaded.origins)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in (machine | filled).items():
        section, name = key.split(".")
        if getattr(getattr(recipe, section), name) != value:
            sections.setdefault(section, {})[name] = value
            origins[key] = HARDWARE if key in machine else DEFAULT
    parts = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return replace(loaded, recipe=recipe.model_copy(update=parts), origins=origins)


def _precision(recipe: Recipe, hardware: Hardware) -> str:
    wanted = recipe.train.precision
    if wanted == "auto":
        return "bf16" if hardware.device == "cuda" and hardware.bf16 else "fp32"
    _check_precision("train.precision", wanted, hardware)
    return wanted


def _eval_precision(recipe: Recipe, hardware: Hardware, precision: str) -> str:
    wanted = recipe.train.eval_precision
    if wanted == "auto":
        return precision
    _check_precision("train.eval_precision", wanted, hardware)
    return wanted


def _check_precision(key: str, wanted: str, hardware: Hardware) -> None:
    if wanted == "bf16" and hardware.device != "cpu" and not hardware.bf16:
        raise RecipeError(f"{key}=bf16: {hardware.name} does not compute bfloat16; use auto, fp32 or fp16")
    if wanted == "fp16" and hardware.device == "mps":
        raise RecipeError(
            f"{key}=fp16: loss scaling is for CUDA GPUs and CPUs, and this is {hardware.name}; use auto"
        )


def _check_options(recipe: Recipe, hardware: Hardware) -> None:
    # NVIDIA's first generation with TensorFloat-32 (sm80) is the first with bfloat16.
    if recipe.train.tf32 and not (hardware.device == "cuda" and hardware.bf16):
        raise RecipeError(
            f"train.tf32=true: TensorFloat-32 is arithmetic of NVIDIA GPUs from Ampere (2020) on, and this is "
            f"{hardware.name}; remove it"
        )


def _dtype(recipe: Recipe, hardware: Hardware, precision: str) -> str:
    """Weights that train stay float32: bfloat16's 8 bits swallow updates below 0.4 % of a weight."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if hardware.device == "cpu" or not isinstance(recipe.method, AdapterSpec):
        return "float32"
    return {"bf16": "bfloat16", "fp16": "float16"}.get(precision, "float32")


def _quantization(recipe: Recipe, precision: str) -> QuantizationSpec | None:
    """Weights are expanded to the type that the run computes in, so that autocast has nothing left to change."""
    spec = recipe.model.quantization
    if getattr(spec, "compute_dtype", None) != "auto" or (
        isinstance(spec, BitsAndBytesSpec) and spec.bits == 8
    ):
        return spec
    assert spec is not None
    return spec.model_copy(update={"compute_dtype": ARITHMETIC[precision]})


def _attention(recipe: Recipe, hardware: Hardware, precision: str) -> str:
    if recipe.model.attention != "auto":
        return recipe.model.attention
    # The variable-length kernels exist for 16-bit types on GPUs of the generation that has bfloat16 (sm80).
    return "varlen" if hardware.device == "cuda" and hardware.bf16 and precision != "fp32" else "sdpa"


def _checkpointing(recipe: Recipe, hardware: Hardware) -> bool | CheckpointingSpec:
    wanted = recipe.model.gradient_checkpointing
    return hardware.device != "cpu" if wanted == "auto" else wanted


def _greater_is_better(recipe: Recipe) -> bool:
    if recipe.train.greater_is_better is not None:
        return recipe.train.greater_is_better
    return not lower_is_better(best_metric(recipe))


def best_metric(recipe: Recipe) -> str:
    """The number that the best checkpoint is chosen by."""
    default = "eval_reward" if isinstance(recipe.stage, OnlineSpec) else "eval_loss"
    return recipe.train.best_metric or default


def lower_is_better(metric: str) -> bool:
    """What the name of a metric says of its direction."""
    # `loss/ipo` is one loss of several; what is said of rejected answers should sink.
    return metric.endswith(("loss", "perplexity", "nll", "/rejected")) or "loss/" in metric
