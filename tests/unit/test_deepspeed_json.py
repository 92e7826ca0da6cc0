"""DeepSpeed's own JSON beside a recipe: what is taken, what has to agree, what is refused. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.deepspeed_json import deepspeed_config, offloads, zero_stage
from luthier.recipe.load import load_recipe
from luthier.recipe.parallel_rules import require_parallel
from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"
)
HEAD = {**AUTO, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
HALF = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
}
BUCKETS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": False,
    "reduce_scatter": True,
}
THREE = {
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
HOST = {"device": "cpu", "pin_memory": True}


def recipe(config: Any = None, parallel: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    tree = {"model": {"path": "m"}, "data": {"train": ["a"]}, **sections}
    tree["parallel"] = {"type": "deepspeed", "config": config, **(parallel or {})}
    return load_recipe(tree).recipe


@pytest.mark.parametrize(
    ("zero", "stage", "host"),
    [
        ({"stage": 0, **BUCKETS, "reduce_bucket_size": 5e8, "contiguous_gradients": True}, 0, False),
        ({"stage": 2, **BUCKETS, "reduce_bucket_size": 5e8, "round_robin_gradients": True}, 2, False),
        ({"stage": 2, **BUCKETS, "offload_optimizer": HOST, "round_robin_gradients": True}, 2, True),
        (THREE, 3, False),
        ({**THREE, "offload_optimizer": HOST, "offload_param": HOST}, 3, True),
    ],
    ids=["z0", "z2", "z2 offload", "z3", "z3 offload"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_usual_files(
    zero: dict[str, Any], stage: int, host: bool, precision: str, tmp_path: Path
) -> None:
    """Those that come with LLaMA-Factory have these keys."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**HEAD, **HALF, "zero_optimization": zero}), encoding="utf-8")
    made = recipe(str(file), train={"precision": precision}, optim={"type": "adamw", "max_grad_norm": 0.5})
    require_parallel(made, 2)
    config = deepspeed_config(made)
    assert config == {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.5,
    }
    assert (zero_stage(made), offloads(config)) == (stage, host)


def test_what_the_recipe_says_of_zero() -> None:
    assert zero_stage(recipe()) == 2
    assert zero_stage(recipe(parallel={"zero": 3})) == 3
    assert zero_stage(recipe({"zero_optimization": {"stage": "auto"}}, {"zero": 1})) == 1
    made = recipe(
        {"zero_optimization": {"offload_optimizer": {"device": "auto", "ratio": 0.3}}},
        {"zero": 3, "offload_optimizer": True, "offload_parameters": True},
    )
    assert deepspeed_config(made)["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "ratio": 0.3},
        "offload_param": {"device": "cpu"},
    }


def test_keys_that_only_deepspeed_knows_are_passed_on() -> None:
    config = {
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
        "zero_optimization": {"new_key": 7},
    }
    found = deepspeed_config(recipe(config))
    assert found["wall_clock_breakdown"] is True
    assert found["comms_logger"] == {"enabled": True}
    assert found["zero_optimization"] == {"new_key": 7, "stage": 2}


def test_equal_values_are_taken() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3},
    }
    made = recipe(
        config,
        {"zero": 3},
        train={"rows_per_device": 4, "accumulation": 2, "precision": "bf16"},
        optim={"type": "adamw", "lr": 3e-4},
    )
    assert deepspeed_config(made).keys() == {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "gradient_clipping",
    }


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        ({"gradient_clipping": 0.3}, {}, "parallel.config.gradient_clipping is 0.3, and optim.max_grad_norm is 1.0"),
        (
            {"zero_optimization": {"stage": 3}},
            {"zero": 2},
            "parallel.config.zero_optimization.stage is 3, and parallel.zero is 2",
        ),
        ({"bf16": {"enabled": False}}, {}, "parallel.config.bf16.enabled is False, and train.precision is 'bf16'"),
        ({"fp16": {"enabled": True}}, {}, "parallel.config.fp16.enabled is True, and train.precision is 'bf16'"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            {},
            "parallel.config.train_micro_batch_size_per_gpu is 8, and train.rows_per_device is 4",
        ),
        (
            {"gradient_accumulation_steps": 8},
            {},
            "parallel.config.gradient_accumulation_steps is 8, and train.accumulation is 2",
        ),
        (
            {"train_batch_size": 8},
            {},
            "train_batch_size is 8, and train.rows_per_device x train.accumulation x 2 processes is 16",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}},
            {},
            "parallel.config.optimizer.params.lr is 1.0, and optim.lr is 0.0001",
        ),
        ({"optimizer": {"type": "Lamb"}}, {}, "parallel.config.optimizer.type is 'lamb', and optim.type is 'adamw'"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "parallel.config.scheduler.type is 'constant_with_warmup', and optim.schedule is 'cosine'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "none"}}},
            {"offload_optimizer": True},
            "parallel.config.zero_optimization.offload_optimizer.device is 'none', and parallel.offload_optimizer is True",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {},
            "parallel.config.zero_optimization.offload_optimizer.device is 'nvme': checkpoints are gathered from memory",
        ),
        ({"zero_optimization": {"stage": 4}}, {}, "expected 0, 1, 2 or 3, found 4"),
        ({}, {"offload_parameters": True}, "parallel.offload_parameters goes with zero: 3"),
        (
            {"zero_optimization": {"stage": 0}},
            {"offload_optimizer": True},
            "parallel.offload_optimizer goes with zero: 1, 2 or 3, and this is 0",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, "parallel.config.tensor_parallel: layers are not split here"),
        ({"bf16": True}, {}, "parallel.config.bf16: expected an object, found True"),
    ],
)  # fmt: skip
def test_what_contradicts_the_recipe(config: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    made = recipe(config, parallel, train={"rows_per_device": 4, "accumulation": 2, "precision": "bf16"})
    with pytest.raises(RecipeError) as caught:
        require_parallel(made, 2)
    assert message in str(caught.value)


def test_batches_in_tokens_have_no_number_of_rows() -> None:
    made = recipe({"train_micro_batch_size_per_gpu": 8}, train={"tokens_per_batch": 4096})
    with pytest.raises(RecipeError, match=r"is 8, and the batch of train.tokens_per_batch is 'in tokens'"):
        deepspeed_config(made)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    with pytest.raises(RecipeError, match=r"ds.json: No such file or directory; name a file"):
        deepspeed_config(recipe(str(file)))
    file.write_text("{", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"ds.json is not JSON: Expecting property name"):
        deepspeed_config(recipe(str(file)))
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(RecipeError, match="expected an object with DeepSpeed's keys, found a list"):
        deepspeed_config(recipe(str(file)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"precision": "fp16"}}, "does not go with train.precision: fp16"),
        ({"train": {"bad_numbers": {"action": "skip"}}}, "does not go with train.bad_numbers.action: skip"),
        (
            {"train": {"bad_numbers": {"action": "rewind"}}},
            "does not go with train.bad_numbers.action: rewind",
        ),
        ({"train": {"compile": {}}}, "does not go with train.compile"),
        (
            {"optim": {"type": "muon"}},
            "does not go with optim.type: muon: a process holds pieces of flat rows",
        ),
        ({"optim": {"type": "adamw", "bits": 8}}, "does not go with optim.type: adamw with bits or paged"),
        (
            {"optim": {"type": "schedule_free", "schedule": "constant"}},
            "does not go with optim.type: schedule_free",
        ),
    ],
)
def test_what_its_own_step_leaves_no_room_for(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        require_parallel(recipe(**sections), 2)
    assert message in str(caught.value)
    require_parallel(recipe({"zero_optimization": {"stage": 0}}, **sections), 2)  # which divides nothing
