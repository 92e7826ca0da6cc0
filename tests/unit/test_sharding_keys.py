"""What other tools' files say of processes: transformers' fsdp, accelerate's config files, LLaMA-Factory's deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from luthier.cli import app
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DdpSpec, DeepSpeedSpec, Fsdp2Spec, ParallelSpec
from luthier.recipe.sharding_keys import accelerate_overrides
from luthier.types import RecipeError

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "parity/data/llamafactory_examples.json").read_text(encoding="utf-8")
)
FILE = {"model_name_or_path": "m", "do_train": True, "dataset": "a"}
NATIVE = {"model": {"path": "m"}, "data": {"train": ["a"]}}


def translated(values: dict[str, Any], folder: Path) -> ParallelSpec:
    file = folder / "lf.yaml"
    file.write_text(yaml.safe_dump(FILE | values))
    return load_recipe(file).recipe.parallel


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        ({}, DdpSpec()),
        ({"ddp_timeout": 600}, DdpSpec(timeout=600)),
        ({"ddp_timeout": 180_000_000}, DdpSpec()),
        ({"deepspeed": "ds.json"}, DeepSpeedSpec(config="ds.json")),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}, "ddp_timeout": 60},
            DeepSpeedSpec(config={"zero_optimization": {"stage": 3}}, timeout=60),
        ),
        ({"fsdp": "full_shard auto_wrap"}, Fsdp2Spec()),
        ({"fsdp": True}, Fsdp2Spec()),
        ({"fsdp": ["shard_grad_op", "offload"]}, Fsdp2Spec(reshard_after_forward=False, cpu_offload=True)),
        (
            {"fsdp": "full_shard", "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "version": 2}},
            Fsdp2Spec(state="sharded"),
        ),
        (
            {"fsdp": "full_shard", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
            Fsdp2Spec(),
        ),
        ({"fsdp": "", "deepspeed": None}, DdpSpec()),
    ],
)  # fmt: skip
def test_llamafactory_keys(values: dict[str, Any], spec: ParallelSpec, tmp_path: Path) -> None:
    assert translated(values, tmp_path) == spec


def test_fsdp_config_in_a_file(tmp_path: Path) -> None:
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({"reshard_after_forward": False, "activation_checkpointing": True}))
    file = tmp_path / "lf.yaml"
    file.write_text(yaml.safe_dump(FILE | {"fsdp": "full_shard", "fsdp_config": str(config)}))
    recipe = load_recipe(file).recipe
    assert recipe.parallel == Fsdp2Spec(reshard_after_forward=False)
    assert recipe.model.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"fsdp": "full_shard", "deepspeed": "d"},
            "fsdp: and deepspeed divide the same weights; keep one",
        ),
        (
            {"fsdp": "ful_shard"},
            "fsdp: 'ful_shard' is none of its values; choose from full_shard, shard_grad_op, offload, auto_wrap",
        ),
        (
            {"fsdp": "full_shard", "fsdp_config": {"offload_parms": True}},
            "fsdp_config: offload_parms: FSDP has no such setting; did you mean offload_params?",
        ),
        (
            {"fsdp": "full_shard", "fsdp_config": {"cpu_offload": "yes"}},
            "fsdp_config: cpu_offload: expected true or false, found the text 'yes'",
        ),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_kept(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        translated(values, tmp_path)
    assert str(caught.value).split(": ", 1)[1] == message


ACCELERATE = {
    "accelerate/fsdp2_config.yaml": Fsdp2Spec(processes=2),
    "accelerate/fsdp2_config_qwen35.yaml": Fsdp2Spec(processes=8),
    "accelerate/fsdp_config.yaml": Fsdp2Spec(processes=2),
    "accelerate/fsdp_config_multiple_nodes.yaml": Fsdp2Spec(processes=8, nodes=2),
    "accelerate/fsdp_config_offload.yaml": Fsdp2Spec(processes=2, cpu_offload=True),
}


def written(values: dict[str, Any], folder: Path) -> Path:
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_files_of_llamafactory(name: str, tmp_path: Path) -> None:
    overrides, notes = accelerate_overrides(written(EXAMPLES[name], tmp_path))
    # The file says all of it, so nothing is left to the defaults of the recipe.
    assert load_recipe(NATIVE, overrides).recipe.parallel == ACCELERATE[name]
    assert notes[0].endswith("mixed_precision: bf16: the recipe's train.precision decides")
    machines = EXAMPLES[name]["num_machines"]
    assert notes[1:] == (
        [f"{tmp_path}/accelerate.yaml: on each machine add --node-rank NUMBER --master 192.168.0.1:29500"]
        if machines > 1
        else []
    )


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, DdpSpec(processes=4)),
        (
            {"distributed_type": "FSDP", "num_processes": 2,
             "fsdp_config": {"fsdp_sharding_strategy": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
            Fsdp2Spec(processes=2, reshard_after_forward=False, state="sharded"),
        ),
        (
            {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}},
            DdpSpec(processes=2),
        ),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {
                "zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none",
                "gradient_accumulation_steps": 4, "zero3_init_flag": True}},
            DeepSpeedSpec(processes=2, zero=3, offload_optimizer=True),
        ),
        (
            {"distributed_type": "DEEPSPEED", "num_processes": 1,
             "deepspeed_config": {"deepspeed_config_file": "ds.json", "zero3_init_flag": True}},
            DeepSpeedSpec(processes=1, config="ds.json"),
        ),
    ],
)  # fmt: skip
def test_accelerate_files(values: dict[str, Any], spec: ParallelSpec, tmp_path: Path) -> None:
    overrides, _ = accelerate_overrides(written(values, tmp_path))
    assert load_recipe(NATIVE, overrides).recipe.parallel == spec


def test_what_an_accelerate_file_may_not_say(tmp_path: Path) -> None:
    file = written(
        {
            "distributed_type": "FSDP",
            "num_processes": 3,
            "num_machines": 2,
            "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD", "fsdp_state_dict_type": "LOCAL"},
            "parallelism_config": {"parallelism_config_cp_size": 2},
            "kt_config": {"enabled": True},
            "mixed_precison": "bf16",
        },
        tmp_path,
    )
    with pytest.raises(RecipeError) as caught:
        accelerate_overrides(file)
    assert sorted(line.removeprefix(f"{file}: ") for line in str(caught.value).splitlines()) == [
        "fsdp_sharding_strategy: hybrid sharding (divided in a machine, copied among machines) is not part of "
        "Luthier; write full_shard",
        "fsdp_state_dict_type: 'LOCAL': write FULL_STATE_DICT or SHARDED_STATE_DICT",
        "kt_config: KTransformers is not part of Luthier; remove it",
        "mixed_precison: is not read; did you mean mixed_precision?",
        "num_processes: 3 processes cannot be shared out evenly over 2 machines",
        "parallelism_config: divisions of its own are written in the recipe: parallel: {type: fsdp2}",
    ]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is no accelerate config file: it has no distributed_type"):
        accelerate_overrides(written({"model": {}}, tmp_path))
    with pytest.raises(RecipeError, match="cannot be read as an accelerate config file"):
        accelerate_overrides(tmp_path / "missing.yaml")


def test_the_command_line_reads_an_accelerate_file(tmp_path: Path) -> None:
    """`luthier launch` prints the command that holds what the file says; the recipe's own words come after it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(NATIVE))
    file = written(
        {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_offload_params": True}},
        tmp_path,
    )
    words = ["launch", str(recipe), "parallel.cpu_offload=false", "--accelerate", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    command = result.stdout.splitlines()[-1]
    assert "--nproc-per-node=4" in command
    told = command.split(" train ")[1].split()
    assert told[1:] == [
        "parallel.type=fsdp2",
        "parallel.cpu_offload=true",
        "parallel.nodes=1",
        "parallel.processes=4",
        "parallel.cpu_offload=false",
    ]
