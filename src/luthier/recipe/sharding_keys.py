"""How other tools write what `parallel:` says: transformers' `fsdp` and `fsdp_config`, accelerate's config files.

Both give FSDP's settings by the same names, with `fsdp_` before them or not. FSDP's first version is not used here: its
settings divide the same things in the second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier.recipe.problems import found, nearest
from luthier.types import RecipeError

Values = dict[str, Any]
"""Values of a native recipe by dotted key."""
Problem = Callable[[str, str], None]
"""Told the key and what is wrong with it."""

_OF_ITSELF = {
    "auto_wrap_policy",
    "backward_prefetch",
    "cpu_ram_efficient_loading",
    "forward_prefetch",
    "limit_all_gathers",
    "min_num_params",
    "sync_module_states",
    "transformer_layer_cls_to_wrap",
    "use_orig_params",
    "version",
    "xla_fsdp_grad_ckpt",
    "xla_fsdp_settings",
    "xla_fsdp_v2",
}
"""What FSDP2 decides itself, or what every decoder layer being a group of its own decides."""

_RESHARD = {"full_shard": True, "shard_grad_op": False, "1": True, "2": False}
_WORDS = "full_shard, shard_grad_op, offload, auto_wrap"
_STATE = {"full_state_dict": "full", "sharded_state_dict": "sharded"}
_FSDP = (
    "activation_checkpointing",
    "cpu_offload",
    "offload_params",
    "reshard_after_forward",
    "sharding_strategy",
)
HYBRID = (
    "hybrid sharding (divided in a machine, copied among machines) is not part of Luthier; write full_shard"
)


def fsdp_values(config: Mapping[str, Any], problem: Problem) -> Values:
    """What `fsdp_config` says in a native recipe; `problem` is told of each key that cannot be kept."""
    values: Values = {"parallel.type": "fsdp2"}
    for written, value in config.items():
        key = written.removeprefix("fsdp_")
        if key in _OF_ITSELF:
            continue
        if key == "xla":
            if value:
                problem(written, "TPUs and XLA are not part of Luthier; remove it")
        elif key == "state_dict_type":
            state = _STATE.get(str(value).lower())
            if state is None:
                problem(written, f"{value!r}: write FULL_STATE_DICT or SHARDED_STATE_DICT")
            values["parallel.state"] = state
        elif key in ("sharding_strategy", "reshard_after_forward") and not isinstance(value, bool):
            _strategy(written, str(value).lower(), values, problem)
        elif key not in _FSDP:
            near = nearest(key, [*_FSDP, *_OF_ITSELF, "state_dict_type"])
            hint = f"; did you mean {near}?" if near else ""
            problem(written, f"FSDP has no such setting{hint}")
        elif not isinstance(value, bool):
            problem(written, f"expected true or false, found {found(value)}")
        elif key == "activation_checkpointing":
            values |= {"model.gradient_checkpointing": True} if value else {}
        elif key == "reshard_after_forward":
            values["parallel.reshard_after_forward"] = value
        else:
            values["parallel.cpu_offload"] = value
    return values


def _strategy(key: str, value: str, values: Values, problem: Problem) -> None:
    if value in ("no_shard", "3"):
        values["parallel.type"] = "ddp"
    elif value in _RESHARD:
        values["parallel.reshard_after_forward"] = _RESHARD[value]
    elif "hybrid" in value or value in ("4", "5"):
        problem(key, HYBRID)
    else:
        problem(key, f"{value!r} is none of its values; choose from FULL_SHARD, SHARD_GRAD_OP, NO_SHARD")


def fsdp_options(words: Sequence[str], problem: Problem) -> Values:
    """What the words of transformers' `fsdp` say."""
    values: Values = {"parallel.type": "fsdp2"}
    for word in words:
        if word == "offload":
            values["parallel.cpu_offload"] = True
        elif word.startswith("hybrid_shard"):
            problem("fsdp", HYBRID)
        elif word in _RESHARD:
            values["parallel.reshard_after_forward"] = _RESHARD[word]
        elif word != "auto_wrap":
            problem(
                "fsdp",
                f"{word!r} is none of its values; choose from full_shard, shard_grad_op, offload, auto_wrap",
            )
    return values


# --------------------------------------------------------------------------------------------------
# accelerate's files

_PLAIN_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU")
_SILENT = {
    "compute_environment",
    "debug",
    "distributed_type",
    "downcast_bf16",
    "dynamo_config",
    "enable_cpu_affinity",
    "gpu_ids",
    "ipex_config",
    "main_training_function",
    "rdzv_backend",
    "same_network",
    "tpu_env",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "use_cpu",
}
_DEEPSPEED_SILENT = {
    "deepspeed_hostfile",
    "deepspeed_moe_layer_cls_names",
    "deepspeed_multinode_launcher",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero3_init_flag",
    "zero3_save_16bit_model",
}
"""The recipe's own batch and clipping hold; the rest is done of itself."""


def accelerate_overrides(path: Path) -> tuple[list[str], list[str]]:
    """What an accelerate config file (`accelerate launch --config_file`) says, as overrides of a recipe; and notes.

    Raises RecipeError that names the file and every key that cannot be kept.
    """
    tree = _read(path)
    problems: list[str] = []

    def problem(key: str, text: str) -> None:
        problems.append(f"{path}: {key}: {text}")

    values, notes = _values(tree, problem), list[str]()
    if problems:
        raise RecipeError("\n".join(problems))
    if (precision := tree.get("mixed_precision", "no")) != "no":
        notes.append(f"{path}: mixed_precision: {precision}: the recipe's train.precision decides")
    if int(tree.get("num_machines", 1)) > 1:
        master = f"{tree.get('main_process_ip', 'HOST')}:{tree.get('main_process_port', 29500)}"
        notes.append(f"{path}: on each machine add --node-rank NUMBER --master {master}")
    return [f"{key}={_word(value)}" for key, value in values.items()], notes


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as an accelerate config file: {error}") from error
    if not isinstance(tree, dict) or "distributed_type" not in tree:
        raise RecipeError(f"{path} is no accelerate config file: it has no distributed_type")
    return tree


def _values(tree: Mapping[str, Any], problem: Problem) -> Values:
    kind, values = str(tree["distributed_type"]).upper(), Values()
    if kind in _PLAIN_KINDS:
        values["parallel.type"] = "ddp"
    elif kind == "FSDP":
        values |= fsdp_values(tree.get("fsdp_config") or {}, problem)
    elif kind == "DEEPSPEED":
        values |= _deepspeed(tree.get("deepspeed_config") or {}, problem)
    else:
        problem("distributed_type", f"{kind} is not part of Luthier; choose from MULTI_GPU, FSDP, DEEPSPEED")
    nodes, processes = _count(tree, "num_machines", problem), _count(tree, "num_processes", problem)
    if nodes and processes and processes % nodes:
        problem("num_processes", f"{processes} processes cannot be shared out evenly over {nodes} machines")
    elif nodes and processes:
        values |= {"parallel.nodes": nodes, "parallel.processes": processes // nodes}
    parts = {"mixed_precision", "machine_rank", "main_process_ip", "main_process_port", "num_machines"}
    known = _SILENT | parts | {"num_processes", "fsdp_config", "deepspeed_config", "parallelism_config"}
    for key, value in tree.items():
        if key == "parallelism_config" and any(_is_several(size) for size in (value or {}).values()):
            problem(key, "divisions of its own are written in the recipe: parallel: {type: fsdp2}")
        elif key == "kt_config" and value:
            problem(key, "KTransformers is not part of Luthier; remove it")
        elif key not in known and value:
            near = nearest(str(key), sorted(known))
            problem(str(key), f"is not read{f'; did you mean {near}?' if near else '; remove it'}")
    return values


def _is_several(size: Any) -> bool:
    return isinstance(size, int) and size > 1


def _count(tree: Mapping[str, Any], key: str, problem: Problem) -> int:
    value = tree.get(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        problem(key, f"expected a positive number, found {found(value)}")
        return 0
    return value


def _deepspeed(config: Mapping[str, Any], problem: Problem) -> Values:
    values: Values = {"parallel.type": "deepspeed"}
    for key, value in config.items():
        if key == "deepspeed_config_file":
            values["parallel.config"] = value
        elif key == "zero_stage":
            if value not in (1, 2, 3):
                problem(
                    key,
                    f"expected 1, 2 or 3, found {found(value)}; without ZeRO write distributed_type: MULTI_GPU",
                )
            values["parallel.zero"] = value
        elif key in ("offload_optimizer_device", "offload_param_device"):
            name = "offload_optimizer" if key.startswith("offload_opt") else "offload_parameters"
            if value not in ("none", "cpu"):
                problem(key, f"{value!r}: name a DeepSpeed file with it in deepspeed_config_file")
            elif value == "cpu":
                values[f"parallel.{name}"] = True
        elif key not in _DEEPSPEED_SILENT:
            problem(key, "is not read; name a DeepSpeed file with it in deepspeed_config_file")
    return values
