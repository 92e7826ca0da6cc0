"""From a resolved recipe to transformers' `TrainingArguments`, which the loop underneath still reads."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainingArguments

from luthier.model.multimodal import trains_outside_language
from luthier.recipe.resolve import best_metric, lower_is_better
from luthier.recipe.schema import Recipe
from luthier.trainer.processes import meet_on_cpu
from luthier.types import RecipeError

_ELSEWHERE = {
    "tf32": "give train.tf32",
    "full_determinism": "give train.deterministic",
    "neftune_noise_alpha": "give train.neftune_alpha",
    "auto_find_batch_size": "give train.fit_memory",
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "give train.compile: {backend: ..., mode: ...}",
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "give train.eval_precision"),
    "logging_dir": "trackers write below the run directory; TENSORBOARD_LOGGING_DIR names another folder",
    "restore_callback_states_from_checkpoint": "a resumed run always restores them; remove it",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision", "hub_strategy"),
        "the finished model is uploaded with train.push_to_hub: {repo: owner/name}",
    ),
}
"""Keys that transformers has, or had, and that are another part of a recipe."""


def training_arguments(recipe: Recipe, *, use_cpu: bool) -> Seq2SeqTrainingArguments:
    """The arguments of a resolved recipe; `train.extra` is checked and added last.

    The data loader yields one optimizer step per item, so batch size and accumulation are 1 here.
    Raises RecipeError for keys of `train.extra` that do not exist or have a place of their own in the recipe.
    """
    train, optim = recipe.train, recipe.optim
    owned: dict[str, Any] = {
        "output_dir": train.output,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "learning_rate": optim.lr,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "logging_strategy": "steps",
        "logging_steps": train.log_every,
        "eval_strategy": _strategy(train.eval_every),
        "save_strategy": _strategy(train.save_every),
        "save_only_model": train.save_only_model,
        "load_best_model_at_end": train.load_best,
        "metric_for_best_model": best_metric(recipe),
        "greater_is_better": _greater(recipe),
        "seed": train.seed,
        "data_seed": train.data_seed,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "use_cpu": use_cpu,
        "report_to": "none",  # trackers are made by `trainer.trackers`, which knows where they write
        "remove_unused_columns": False,
        "disable_tqdm": True,
        # A NaN must be seen, not replaced by the average of earlier losses.
        "logging_nan_inf_filter": False,
        # Flat rows never use a cache; this keeps `use_cache` of the saved config as it was.
        "use_cache": True,
    }
    if isinstance(train.eval_every, int):
        owned["eval_steps"] = train.eval_every
    if isinstance(train.save_every, int):
        owned["save_steps"] = train.save_every
    known = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    for key in train.extra:
        if key in owned:
            raise RecipeError(
                f"train.extra.{key}: this has a place of its own in the recipe; see `luthier schema`"
            )
        if key in _ELSEWHERE:
            raise RecipeError(f"train.extra.{key}: {_ELSEWHERE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"train.extra.{key}: transformers' TrainingArguments has no such key{hint}")
    if use_cpu:
        meet_on_cpu(recipe.parallel.timeout)
    try:
        return Seq2SeqTrainingArguments(**owned, **_many_processes(train.extra, recipe.parallel.timeout))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: transformers refuses these settings: {error}") from error


def _many_processes(extra: Mapping[str, Any], timeout: int) -> dict[str, Any]:
    """No buffer is sent around: they are alike, and a process with fewer passes would be waited for in vain.

    timeout: seconds that a process waits for the others.
    """
    if extra.get("ddp_broadcast_buffers"):
        raise RecipeError(
            "train.extra.ddp_broadcast_buffers: processes have passes of unequal number here; remove it"
        )
    return {"ddp_timeout": timeout, **extra, "ddp_broadcast_buffers": False}


def require_followable(recipe: Recipe, model: nn.Module, processes: int) -> None:
    """Raise RecipeError where DDP would have to look for what a pass without media left unused, and activations are
    computed again in the reentrant way, which it cannot follow."""
    reentrant = getattr(recipe.model.gradient_checkpointing, "reentrant", False)
    if processes > 1 and reentrant and trains_outside_language(model):
        raise RecipeError(
            "model.gradient_checkpointing.reentrant: true does not go with several processes and a tower that trains, "
            "because a pass without media leaves its parameters unused; set it to false, or freeze the tower "
            "(model.frozen_parts)"
        )


def _strategy(every: int | str | None) -> str:
    if every is None:
        return "no"
    return "epoch" if every == "epoch" else "steps"


def _greater(recipe: Recipe) -> bool:
    chosen = recipe.train.greater_is_better
    return chosen if chosen is not None else not lower_is_better(best_metric(recipe))
