"""Optimizers and schedules of a LLaMA-Factory file: every name is translated or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from luthier.recipe.llamafactory_optim import _OPTIMIZERS, _REFUSED
from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.schema import (
    AdafactorSpec,
    AdamMiniSpec,
    AdamwSpec,
    ApolloSpec,
    BadamRatioSpec,
    BadamSpec,
    GaloreSpec,
    LionSpec,
    LomoSpec,
    MuonSpec,
    ScheduleFreeSpec,
    SgdSpec,
)
from luthier.types import RecipeError

SHARED: dict[str, Any] = {"lr": 5e-5, "schedule": "linear"}


def load(**tree: Any) -> LoadedRecipe:
    full = {"model_name_or_path": "m", "template": "qwen", "do_train": True, "dataset": "a", "bf16": True}
    return load_recipe({**full, "finetuning_type": "full", **tree})


def problem(**tree: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load(**tree)
    return str(caught.value)


def test_every_name_of_transformers_is_decided() -> None:
    assert {name.value for name in OptimizerNames} | {"adamw_hf"} == _OPTIMIZERS.keys() | _REFUSED.keys()
    assert not _OPTIMIZERS.keys() & _REFUSED.keys()


@pytest.mark.parametrize("name", _REFUSED)
def test_a_refused_name_is_told_with_what_to_write(name: str) -> None:
    assert f"optim: {name} {_REFUSED[name]}" in problem(optim=name)


NONE = {"max_grad_norm": 0.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optim": "adamw_torch"}, AdamwSpec(**SHARED)),
        ({"optim": "adamw_8bit"}, AdamwSpec(**SHARED, bits=8)),
        ({"optim": "paged_adamw_32bit"}, AdamwSpec(**SHARED, paged=True)),
        ({"optim": "paged_adamw_8bit", "adam_beta2": 0.95}, AdamwSpec(**SHARED, bits=8, paged=True, betas=(0.9, 0.95))),
        ({"optim": "adafactor"}, AdafactorSpec(**SHARED)),
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, SgdSpec(**SHARED, momentum=0.9)),
        # that tool gives Lion Adam's betas
        ({"optim": "lion_32bit"}, LionSpec(**SHARED, betas=(0.9, 0.999))),
        ({"optim": "paged_lion_8bit"}, LionSpec(**SHARED, betas=(0.9, 0.999), bits=8, paged=True)),
        (
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "warmup_steps": 5, "optim_args": "r=1.5"},
            ScheduleFreeSpec(lr=5e-5, schedule="constant_with_warmup", warmup=5, r=1.5),
        ),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["attn"], "optim_args": "rank=64, update_proj_gap=100"},
            GaloreSpec(**SHARED, rank=64, update_every=100, targets=["attn"]),
        ),
        (
            {"optim": "apollo_adamw_layerwise", "optim_target_modules": "all_linear", "optim_args": "proj=svd"},
            ApolloSpec(**SHARED, **NONE, projection="svd", layerwise=True),
        ),
        ({"optim": "lomo"}, LomoSpec(**SHARED)),
        (
            {"use_galore": True, "galore_target": "q_proj,mlp", "galore_proj_type": "full"},
            GaloreSpec(**SHARED, rank=16, scale=2.0, targets=["q_proj", "mlp"], side="full"),
        ),
        ({"use_apollo": True, "apollo_proj": "svd", "apollo_scale_front": True},
         ApolloSpec(**SHARED, rank=16, scale=32.0, projection="svd", scale_front=True)),
        ({"use_badam": True, "badam_start_block": 2}, BadamSpec(**SHARED, start_block=2)),
        ({"use_badam": True, "badam_switch_interval": -1}, BadamSpec(**SHARED, order="fixed")),
        (
            {"use_badam": True, "badam_mode": "ratio", "badam_update_ratio": 0.1, "badam_mask_mode": "scatter"},
            BadamRatioSpec(**SHARED, ratio=0.1, mask="scatter"),
        ),
        ({"use_adam_mini": True, "adam_epsilon": 1e-6}, AdamMiniSpec(**SHARED, eps=1e-6)),
        ({"use_muon": True, "weight_decay": 0.1}, MuonSpec(**SHARED, weight_decay=0.1)),
    ],
)  # fmt: skip
def test_optimizers(values: dict[str, Any], expected: Any) -> None:
    assert load(**values).recipe.optim == expected


def test_badam_keeps_the_type_that_it_would_have_there() -> None:
    assert load(use_badam=True).recipe.model.dtype == "bfloat16"
    assert load(use_badam=True, bf16=False).recipe.model.dtype == "auto"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_galore": True, "use_muon": True}, "use_muon: use_galore is given too, and there is one optimizer; keep one"),
        (
            {"use_galore": True, "optim": "adamw_8bit"},
            "optim: use_galore works with moments of AdamW in full here; write optim: adamw_torch",
        ),
        (
            {"use_galore": True, "galore_layerwise": True, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps: galore_layerwise updates parameters in the backward pass; "
            "write gradient_accumulation_steps: 1",
        ),
        ({"optim": "adamw_torh"}, "did you mean adamw_torch? Choose from"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args: nesterov is nothing that optim: sgd has here; there is momentum"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: expected name=value, with commas between several"),
        ({"optim": "galore_adamw", "optim_target_modules": "attn.*"}, "expected all-linear or a list of modules' names"),
        ({"optim": "schedule_free_adamw"}, "takes the place of a schedule; write lr_scheduler_type: constant"),
        ({"use_badam": True, "badam_mode": "layers"}, "badam_mode: 'layers' is none of its values"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(values: dict[str, Any], message: str) -> None:
    assert message in problem(**values)


def test_what_has_no_effect_is_noted() -> None:
    notes = load(galore_rank=8, optim="sgd", adam_beta1=0.8, optim_target_modules=["a"]).notes
    assert "galore_rank: no effect without use_galore: true" in notes
    assert "adam_beta1: no effect with sgd" in notes
    assert "optim_target_modules: no effect with optim: sgd" in notes


def test_warmup_stable_decay_needs_no_number_of_steps() -> None:
    assert load(lr_scheduler_type="warmup_stable_decay").recipe.optim.schedule_options == {}
