"""Whether a run that is resumed is still the run that wrote the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.recipe.online import OnlineSpec
from luthier.recipe.schema import DdpSpec, DeepSpeedSpec, Fsdp2Spec, GenerationSpec, Recipe
from luthier.trainer.checkpoint import read_manifest
from luthier.types import CheckpointError

FREE = {
    "model": {"path", "revision", "cache_dir", "token", "gguf_file", "trust_remote_code"}  # fingerprinted
    | {"activation_offload"},
    "data": {
        "train",
        "eval",
        "directory",
        "offline",
        "cache",
        "workers",
        "max_lost",
    },  # the training data, too
    "stage": {"share_prompts", "samples_every", "max_samples"},
    "train": {
        "output",
        "overwrite",
        "resume",
        "allow_changes",
        "log_every",
        "eval_every",
        "eval_at_end",
        "eval_only",
        "eval_precision",
        "save_every",
        "save_total_limit",
        "save_only_model",
        "async_save",
        "load_best",
        "best_metric",
        "greater_is_better",
        "early_stopping",
        "metrics",
        "generate_at_eval",
        "callbacks",
        "plots",
        "report_to",
        "push_to_hub",
        "bad_numbers",
        "fit_memory",
        "tokens_per_pass",
        "rows_per_device",  # `ROWS` is compared instead
        "accumulation",
    },
    # Any number of processes under any strategy reads a checkpoint; a step is the same in all.
    "parallel": {name for spec in (DdpSpec, Fsdp2Spec, DeepSpeedSpec) for name in spec.model_fields},
    "generation": set(GenerationSpec.model_fields),
    "export": {"output", "dtype", "shard_size", "device", "probes", "push_to_hub"},
}
"""What may differ: it changes no step of the training, or its content is compared instead."""


ROWS = "rows of a step (train.rows_per_device x train.accumulation x processes)"


def identity(recipe: Recipe, base: str, data: list[str], processes: int = 1) -> dict[str, Any]:
    """What a checkpoint remembers of its run: all settings that decide a step, base model and training data.

    `data` are the cache keys of the training sets in their order; `processes` is how many train it together. Rows of a
    step are consecutive rows of one order, so how they are divided decides nothing: what counts is how many they are.
    """
    tree, free = recipe.model_dump(mode="json"), FREE
    if isinstance(recipe.stage, OnlineSpec):  # what is drawn decides what is learnt
        free = {**FREE, "generation": {"rows", "memory_gib"}}
    settings = {
        f"{section}.{name}": value
        for section, values in tree.items()
        for name, value in values.items()
        if name not in free.get(section, set())
    }
    if recipe.train.rows_per_device is not None:
        settings[ROWS] = recipe.train.rows_per_device * recipe.train.accumulation * processes
    return {"settings": settings, "base": base, "data": data}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each difference between two identities in a few words; a setting that one of them lacks is none."""
    found = [
        f"{key} was {then['settings'][key]!r} and is {value!r}"
        for key, value in now["settings"].items()
        if key in then["settings"] and then["settings"][key] != value
    ]
    if then["base"] != now["base"]:
        found.append("the base model's weights or config are others")
    if then["data"] != now["data"]:
        found.append("the training data, or how it becomes tokens, is another")
    return found


def differences(checkpoint: Path, now: Mapping[str, Any], *, allowed: bool) -> list[str]:
    """What changed since a checkpoint was written. Raises CheckpointError, naming it, unless that is `allowed`."""
    before = read_manifest(checkpoint)["metadata"].get("identity")
    different = changes(before, now) if before is not None else []
    if different and not allowed:
        raise CheckpointError(
            f"{checkpoint} is of a run that was another: {'; '.join(different)}. To go on all the same, give "
            "train.allow_changes=true; to start anew, another train.output"
        )
    return different
