"""DeepSpeed's own JSON (`parallel.config`) beside the recipe: what the recipe decides is decided once.

A key that both know is `auto` there, or says the same; everything else is passed on to DeepSpeed as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier.recipe.optim import AdamwSpec, OptimSpec
from luthier.recipe.parallel import DeepSpeedSpec
from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

Tree = dict[str, Any]

_MISSING = object()
_AUTO = "auto"

_REFUSED = {
    "tensor_parallel": "layers are not split here",
    "sequence_parallel_size": "sequences are not split here",
    "pipeline": "layers are not spread over processes here",
    "elasticity": "the recipe says what a batch is",
    "data_efficiency": "the recipe's data says what is seen when",
    "curriculum_learning": "the recipe's data says what is seen when",
    "compression_training": "it changes the weights behind the recipe's back",
    "autotuning": "it starts runs of its own",
    "hybrid_engine": "it is for answers, which processes that divide weights do not give here",
    "torch_autocast": "train.precision says what is computed in 16 bits",
    "amp": "train.precision says what is computed in 16 bits",
}
"""Sections that would change what the recipe decides, or what a checkpoint is."""

_SCHEDULERS = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
"""What transformers takes DeepSpeed's schedules for."""


def zero_stage(recipe: Recipe, processes: int | None = None) -> int:
    """0 to 3: the ZeRO stage of a recipe with `parallel: {type: deepspeed}`; 0 divides nothing. Raises RecipeError."""
    stage: int = deepspeed_config(recipe, processes)["zero_optimization"]["stage"]
    return stage


def deepspeed_config(recipe: Recipe, processes: int | None = None) -> Tree:
    """What DeepSpeed is given, but for batch sizes; `auto` is left where only the model says a number. With the number
    of `processes`, the size of a whole batch is compared too.

    Raises RecipeError for a file that cannot be read, and for the first key that contradicts the recipe, naming both
    values.
    """
    spec = recipe.parallel
    assert isinstance(spec, DeepSpeedSpec)
    given = _read(spec.config)
    for text in _problems(given, recipe, processes):
        raise RecipeError(text)
    zero = given.get("zero_optimization", {})
    stage = _stage(zero, spec)
    built = {name: value for name, value in given.items() if name not in _DECIDED}
    built["zero_optimization"] = {**zero, "stage": stage, **_offload(zero, spec)}
    # The optimizer is the recipe's own object, on the host too.
    built |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    built["gradient_clipping"] = recipe.optim.max_grad_norm
    return built


def offloads(config: Mapping[str, Any]) -> bool:
    """Whether a `deepspeed_config` keeps weights or optimizer in the host's memory."""
    zero = config["zero_optimization"]
    return "cpu" in (_place(zero, "offload_optimizer"), _place(zero, "offload_param"))


_DECIDED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "fp16",
        "bf16",
        "bfloat16",
    }
)


def _read(config: str | Mapping[str, Any] | None) -> Tree:
    if not isinstance(config, str):
        return dict(config or {})
    where = f"parallel.config={config}"
    try:
        tree = json.loads(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{where}: {error.strerror}; name a file with DeepSpeed's JSON") from error
    except ValueError as error:
        raise RecipeError(f"{where} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: expected an object with DeepSpeed's keys, found a {type(tree).__name__}")
    return tree


def _problems(given: Tree, recipe: Recipe, processes: int | None) -> Iterator[str]:
    for name, why in _REFUSED.items():
        if given.get(name) not in (None, False, 1, {}):
            yield f"parallel.config.{name}: {why}; remove it"
    sections = ("zero_optimization", "optimizer", "scheduler", "fp16", "bf16", "bfloat16")
    for name in sections:
        if not isinstance(given.get(name, {}), dict):
            yield f"parallel.config.{name}: expected an object, found {given[name]!r}"
    for key, wanted, ours in _decisions(given, recipe, processes):
        if wanted not in (_MISSING, _AUTO, None) and not _equal(wanted, ours[1]):
            yield (
                f"parallel.config.{key} is {wanted!r}, and {ours[0]} is {ours[1]!r}: write auto there, or give both "
                "the same value"
            )
    yield from _offload_problems(given.get("zero_optimization", {}))


def _decisions(
    given: Tree, recipe: Recipe, processes: int | None
) -> Iterator[tuple[str, Any, tuple[str, Any]]]:
    """(DeepSpeed's key, its value there, (the recipe's key, its value))."""
    spec, train, optim = recipe.parallel, recipe.train, recipe.optim
    assert isinstance(spec, DeepSpeedSpec)

    def at(*path: str) -> Any:
        value: Any = given
        for name in path:
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
        return value

    if spec.zero is not None:
        yield "zero_optimization.stage", at("zero_optimization", "stage"), ("parallel.zero", spec.zero)
    for key, ours in (
        ("offload_optimizer", spec.offload_optimizer),
        ("offload_param", spec.offload_parameters),
    ):
        if ours:
            name = "offload_parameters" if key == "offload_param" else key
            place = at("zero_optimization", key, "device")
            if place in ("none", None):
                yield f"zero_optimization.{key}.device", "none", (f"parallel.{name}", True)
    precisions = (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16"))
    for section, precision in precisions:
        wanted = at(section, "enabled")
        if (
            train.precision != _AUTO
            and wanted not in (_MISSING, _AUTO)
            and wanted != (train.precision == precision)
        ):
            yield f"{section}.enabled", wanted, ("train.precision", train.precision)
    yield "gradient_clipping", at("gradient_clipping"), ("optim.max_grad_norm", optim.max_grad_norm)
    by_rows = train.rows_per_device is not None
    rule = "train.rows_per_device" if by_rows else "the batch of train.tokens_per_batch"
    yield (
        "train_micro_batch_size_per_gpu",
        at("train_micro_batch_size_per_gpu"),
        (rule, train.rows_per_device if by_rows else "in tokens"),
    )
    yield (
        "gradient_accumulation_steps",
        at("gradient_accumulation_steps"),
        ("train.accumulation" if by_rows else rule, train.accumulation if by_rows else "in tokens"),
    )
    if processes is not None or not by_rows:
        rows = (train.rows_per_device or 0) * train.accumulation * (processes or 0)
        name = f"{rule} x train.accumulation x {processes} processes" if by_rows else rule
        yield "train_batch_size", at("train_batch_size"), (name, rows if by_rows else "in tokens")
    yield from _optimizer(at, optim)


def _optimizer(at: Any, optim: Any) -> Iterator[tuple[str, Any, tuple[str, Any]]]:
    assert isinstance(optim, OptimSpec)
    kind = at("optimizer", "type")
    if kind is not _MISSING:
        name = str(kind).lower()
        yield (
            "optimizer.type",
            "adamw" if name == "adam" else name,
            ("optim.type", getattr(optim, "type", "")),
        )
        for key in ("lr", "weight_decay"):
            yield (
                f"optimizer.params.{key}",
                at("optimizer", "params", key),
                (f"optim.{key}", getattr(optim, key)),
            )
        if isinstance(optim, AdamwSpec):
            for key in ("betas", "eps"):
                yield (
                    f"optimizer.params.{key}",
                    at("optimizer", "params", key),
                    (f"optim.{key}", getattr(optim, key)),
                )
    if (kind := at("scheduler", "type")) is not _MISSING:
        name = _SCHEDULERS.get(str(kind).lower(), str(kind))
        yield "scheduler.type", name, ("optim.schedule", optim.schedule)
        params = at("scheduler", "params")
        for key, value in params.items() if isinstance(params, dict) else ():
            if value != _AUTO:
                yield f"scheduler.params.{key}", value, ("the schedule of optim", optim.schedule)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def _stage(zero: Tree, spec: DeepSpeedSpec) -> int:
    stage = zero.get("stage", _AUTO)
    if stage in (_AUTO, None):
        stage = 2 if spec.zero is None else spec.zero
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise RecipeError(f"parallel.config.zero_optimization.stage: expected 0, 1, 2 or 3, found {stage!r}")
    if stage != 3 and (spec.offload_parameters or _place(zero, "offload_param") == "cpu"):
        raise RecipeError(
            f"parallel.offload_parameters goes with zero: 3, which divides weights, and this is {stage}"
        )
    if stage == 0 and (spec.offload_optimizer or _place(zero, "offload_optimizer") == "cpu"):
        raise RecipeError("parallel.offload_optimizer goes with zero: 1, 2 or 3, and this is 0")
    return int(stage)


def _place(zero: Tree, key: str) -> str:
    section = zero.get(key)
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def _offload(zero: Tree, spec: DeepSpeedSpec) -> Tree:
    found: Tree = {}
    for key, wanted in (
        ("offload_optimizer", spec.offload_optimizer),
        ("offload_param", spec.offload_parameters),
    ):
        if wanted:
            section = zero.get(key)
            found[key] = {**(section if isinstance(section, dict) else {}), "device": "cpu"}
    return found


def _offload_problems(zero: Tree) -> Iterator[str]:
    for key in ("offload_optimizer", "offload_param"):
        if (place := _place(zero, key)) not in ("none", "cpu", _AUTO):
            yield (
                f"parallel.config.zero_optimization.{key}.device is {place!r}: checkpoints are gathered from memory; "
                "write cpu or none"
            )
