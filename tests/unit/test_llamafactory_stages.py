"""LLaMA-Factory files of every stage: loss, options and reference; what its trainer computes decides the translation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.finetuning_keys import NO_EFFECT
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.schema import DpoSpec, KtoSpec, LoraSpec, ReferenceSpec, RmSpec, SftSpec
from luthier.types import RecipeError

BASE: dict[str, Any] = {"model_name_or_path": "m", "do_train": True, "dataset": "a", "bf16": True}
LIKELIHOOD = ("ld_alpha: does not touch the likelihood of the better answer here; it does there",)
KTO = "stage: kto: the divergence is estimated from the rows of the whole step here, of each device's batch there"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(stage: str, **values: Any) -> LoadedRecipe:
    return load_recipe(BASE | {"stage": stage} | values)


def problems(stage: str, **values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(stage, **values)
    return str(caught.value).split("\n")


def silent(loaded: LoadedRecipe) -> LoadedRecipe:
    assert loaded.notes == ()
    return loaded


# --------------------------------------------------------------------------------------------------
# rm, dpo, kto


def test_that_tools_defaults() -> None:
    assert silent(load("rm")).recipe.stage == RmSpec()
    assert silent(load("dpo")).recipe.stage == DpoSpec(loss="sigmoid", beta=0.1, reference="start")
    kto = load("kto")
    assert (kto.recipe.stage, kto.notes) == (KtoSpec(beta=0.1, reference="start"), (KTO,))


def test_options_of_dpo() -> None:
    stage = silent(load("dpo", pref_beta=0.3, pref_ftx=0.5, dpo_label_smoothing=0.1)).recipe.stage
    assert stage == DpoSpec(beta=0.3, sft_weight=0.5, label_smoothing=0.1)
    loaded = load("dpo", ld_alpha=0.5)
    assert loaded.recipe.stage == DpoSpec(ld_alpha=0.5)
    assert loaded.notes == (
        "ld_alpha: weights the reference's log-probabilities too; there the policy's alone",
    )
    assert load("dpo", ld_alpha=0.5, pref_ftx=0.1).notes[1:] == LIKELIHOOD
    loaded = load("dpo", pref_loss="orpo", pref_beta=0.2, ld_alpha=0.5)
    assert (loaded.recipe.stage, loaded.notes) == (DpoSpec(loss="orpo", beta=0.2, ld_alpha=0.5), LIKELIHOOD)
    assert silent(load("dpo", pref_loss="simpo", ld_alpha=0.5)).recipe.stage == DpoSpec(
        loss="simpo", ld_alpha=0.5
    )
    stage = silent(load("dpo", pref_loss="simpo", pref_beta=2, simpo_gamma=1.4)).recipe.stage
    assert stage == DpoSpec(loss="simpo", beta=2.0, gamma=1.4)


def test_early_names() -> None:
    stage = load("dpo", dpo_beta=0.3, dpo_ftx=0.5, dpo_loss="orpo").recipe.stage
    assert stage == DpoSpec(loss="orpo", beta=0.3, sft_weight=0.5)
    stage = load("dpo", dpo_ref_model="r", ref_model_checkpoint="x").recipe.stage
    assert stage == DpoSpec(reference=ReferenceSpec(path="r", adapters=("x",)))


@pytest.mark.parametrize(
    ("loss", "there"),
    [
        ("hinge", "sigmoid loss"),
        ("ipo", "sigmoid loss of mean log-probabilities"),
        ("kto_pair", "sigmoid loss"),
    ],
)
def test_losses_that_that_tool_never_reaches_are_told(loss: str, there: str) -> None:
    loaded = load("dpo", pref_loss=loss)
    assert loaded.recipe.stage == DpoSpec(loss=loss)
    assert loaded.notes == (
        f"pref_loss: {loss}: that loss is trained here; there it is the {there} in silence",
    )


def test_a_weighted_mean_with_a_binary_classifier() -> None:
    """(losses + w * bco) / (1 + w)."""
    loaded = load("dpo", pref_bco_weight=0.25)
    assert isinstance(loaded.recipe.stage, DpoSpec)
    assert loaded.recipe.stage.losses == pytest.approx({"sigmoid": 0.8, "bco_pair": 0.2}, rel=1e-15)
    assert loaded.notes == (
        "pref_bco_weight: its shift is the mean reward of the step here, a running mean of all steps there",
    )
    assert loaded.origins["stage.loss"] == "given" or "pref_bco_weight" in loaded.origins["stage.loss"]
    assert silent(load("dpo", pref_bco_weight=1e-7)).recipe.stage == DpoSpec()
    free = load("dpo", pref_loss="simpo", pref_bco_weight=0.25)
    assert free.recipe.stage == DpoSpec(loss="simpo")
    assert free.notes == ("pref_bco_weight: no effect with pref_loss: simpo",)


def test_options_of_kto() -> None:
    loaded = load("kto", pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.5)
    assert loaded.recipe.stage == KtoSpec(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    assert loaded.notes == (KTO,)
    loaded = load("kto", pref_ftx=0.5)
    assert loaded.recipe.stage == KtoSpec(sft_weight=0.5)
    assert loaded.notes[1] == (
        "pref_ftx: weights the mean over the desirable answers of the step here; there the term is also multiplied "
        "by rows / desirable rows of each device's batch"
    )


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sft", "pref_beta", 0.3),
        ("sft", "ref_model", "r"),
        ("sft", "ref_model_quantization_bit", 4),
        ("pt", "pref_loss", "ipo"),
        ("rm", "pref_ftx", 1.0),
        ("rm", "ref_model", "r"),
        ("rm", "reward_model", "r"),
        ("dpo", "kto_chosen_weight", 2.0),
        ("dpo", "reward_model_adapters", "r"),
        ("dpo", "ppo_epochs", 2),
        ("kto", "ppo_whiten_rewards", True),
        ("sft", "reward_model_type", "full"),
        ("kto", "pref_loss", "ipo"),
        ("kto", "simpo_gamma", 1.0),
        ("kto", "ld_alpha", 0.5),
        ("kto", "pref_bco_weight", 0.5),
        ("kto", "dpo_label_smoothing", 0.1),
    ],
)
def test_keys_of_other_stages_have_no_effect_and_say_so(stage: str, key: str, value: Any) -> None:
    loaded, without = load(stage, **{key: value}), load(stage)
    assert loaded.recipe == without.recipe
    assert sorted(loaded.notes) == sorted((*without.notes, f"{key}: {NO_EFFECT}"))


@pytest.mark.parametrize(
    ("stage", "values", "note"),
    [
        ("dpo", {"simpo_gamma": 1.0}, "simpo_gamma: no effect with pref_loss: sigmoid"),
        ("dpo", {"pref_loss": "orpo", "ref_model": "r"}, "ref_model: no effect with pref_loss: orpo"),
        ("dpo", {"ref_model_adapters": "x"}, "ref_model_adapters: no effect with no ref_model"),
        ("dpo", {"label_smoothing_factor": 0.1}, "label_smoothing_factor: no effect with stage: dpo"),
        ("rm", {"label_smoothing_factor": 0.1}, "label_smoothing_factor: no effect with stage: rm"),
        ("rm", {"compute_accuracy": True}, "compute_accuracy: no effect with stage: rm"),
        ("rm", {"use_dft_loss": True}, "use_dft_loss: no effect with stage: rm"),
        ("sft", {"asft_alpha": 0.5}, "asft_alpha: no effect without use_asft_loss"),
        ("sft", {"eaft_alpha": 0.5}, "eaft_alpha: no effect without use_eaft_loss"),
    ],
)
def test_options_without_their_loss_have_no_effect_and_say_so(
    stage: str, values: dict[str, Any], note: str
) -> None:
    loaded = load(stage, **values)
    assert loaded.notes == (note,)
    values = {key: value for key, value in values.items() if key == "pref_loss"}
    assert loaded.recipe == load(stage, **values).recipe


def test_dropout_is_off_where_that_tool_switches_it_off() -> None:
    for stage in ("dpo", "kto"):
        loaded = load(stage, lora_dropout=0.1)
        assert loaded.recipe.method == LoraSpec(dropout=0.0)
        assert f"lora_dropout: dropout is off with stage: {stage}, as there" in loaded.notes
    for stage in ("sft", "rm"):
        assert silent(load(stage, lora_dropout=0.1)).recipe.method == LoraSpec(dropout=0.1)


# --------------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_reference(stage: str) -> None:
    def reference(**values: Any) -> Any:
        spec = load(stage, **values).recipe.stage
        assert isinstance(spec, DpoSpec | KtoSpec)
        return spec.reference

    assert reference(ref_model="r") == ReferenceSpec(path="r")
    assert reference(ref_model="r", ref_model_adapters="x, y") == ReferenceSpec(path="r", adapters=("x", "y"))
    assert reference(finetuning_type="full") == reference(finetuning_type="freeze") == "start"
    # Trained further, the adapter is switched off for the reference; below a new one it is merged.
    assert reference(adapter_name_or_path="x") == "base"
    assert reference(adapter_name_or_path="x", create_new_adapter=True) == "start"
    assert reference(adapter_name_or_path="x", resume_lora_training=False) == "start"
    assert reference(adapter_name_or_path="x", ref_model="r") == ReferenceSpec(path="r")
    only = {"do_train": False, "do_eval": True, "eval_dataset": "b"}  # the model itself, there
    assert reference(adapter_name_or_path="x", **only) == "start"


def test_a_reference_below_the_adapter_is_told() -> None:
    assert load("dpo", adapter_name_or_path="x").notes == (
        "adapter_name_or_path: the reference is the model below the adapter, as there; "
        "stage.reference=start takes the adapter as training starts",
    )
    assert silent(load("dpo", adapter_name_or_path="x", pref_loss="orpo")).recipe.stage == DpoSpec(
        loss="orpo"
    )
    loaded = load_recipe(BASE | {"stage": "dpo", "adapter_name_or_path": "x"}, ["stage.reference=start"])
    assert loaded.recipe.stage == DpoSpec()


# --------------------------------------------------------------------------------------------------
# sft


def test_variants_of_cross_entropy() -> None:
    assert silent(load("sft", use_dft_loss=True)).recipe.stage == SftSpec(loss="dft")
    stage = silent(load("sft", use_eaft_loss=True, eaft_alpha=0.5)).recipe.stage
    assert stage == SftSpec(loss="eaft", entropy_power=0.5)
    loaded = load("sft", use_asft_loss=True, asft_alpha=0.05, ref_model="r", adapter_name_or_path="x")
    assert loaded.recipe.stage == SftSpec(loss="asft", kl_weight=0.05, reference=ReferenceSpec(path="r"))
    assert loaded.notes == (
        "use_asft_loss: the mean is over the tokens of the whole step here, over those of each device's batch there",
    )
    assert silent(load("sft", label_smoothing_factor=0.1)).recipe.stage == SftSpec(label_smoothing=0.1)
    smoothed = load("sft", label_smoothing_factor=0.1, use_dft_loss=True)
    assert smoothed.recipe.stage == SftSpec(loss="dft")
    assert smoothed.notes == ("label_smoothing_factor: no effect with use_dft_loss: true",)


# --------------------------------------------------------------------------------------------------
# Data and evaluation


def test_nothing_is_packed() -> None:
    loaded = load("dpo", packing=True, cutoff_len=256)
    assert (loaded.recipe.data.packing, loaded.recipe.data.max_length) == (False, 255)
    assert loaded.notes == (
        "packing: takes one token off cutoff_len there, so rows hold 255 tokens",
        "packing: nothing is packed with stage: dpo, as there",
    )
    data = silent(load("rm", cutoff_len=256, template="qwen")).recipe.data
    assert (data.packing, data.max_length, data.overflow, data.template) == (False, 256, "truncate", "qwen")


@pytest.mark.parametrize("metric", ["rewards/accuracies", "eval_rewards/accuracies"])
def test_the_best_model_by_a_reward(metric: str) -> None:
    train = load(
        "dpo",
        val_size=0.1,
        eval_strategy="steps",
        eval_steps=5,
        save_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    ).recipe.train
    assert (train.best_metric, train.load_best) == ("eval_rewards/accuracies", True)


def test_the_accuracy_of_a_reward_model_needs_no_key() -> None:
    train = silent(load("rm", val_size=0.1, metric_for_best_model="accuracy")).recipe.train
    assert (train.best_metric, train.metrics) == ("eval_accuracy", ())


# --------------------------------------------------------------------------------------------------
# Errors and migration


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        ("orpo", {}, "stage: write stage: dpo and pref_loss: orpo"),
        (
            "dpo",
            {"pref_loss": "sigmod"},
            "pref_loss: 'sigmod' is none of its values; did you mean sigmoid? Choose from sigmoid, hinge, ipo, "
            "kto_pair, orpo, simpo",
        ),
        ("dpo", {"pref_beta": 0}, "pref_beta: should be greater than 0, found the number 0"),
        ("dpo", {"pref_bco_weight": -1}, "pref_bco_weight: should be 0 or more, found the number -1"),
        (
            "dpo",
            {"pref_loss": "simpo", "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing: goes with pref_loss: sigmoid only",
        ),
        (
            "kto",
            {"ref_model": "r", "ref_model_quantization_bit": 3},
            "ref_model_quantization_bit: the number 3: bnb has 4, 8 bits",
        ),
        (
            "sft",
            {"use_dft_loss": True, "use_eaft_loss": True},
            "use_eaft_loss: use_dft_loss and use_eaft_loss exclude each other; keep one",
        ),
        ("dpo", {"neat_packing": True}, "neat_packing: goes with stage: sft only"),
        ("rm", {"train_on_prompt": True}, "train_on_prompt: goes with stage: sft only"),
        ("kto", {"mask_history": True}, "mask_history: goes with stage: sft only"),
    ],
)
def test_errors(stage: str, values: dict[str, Any], message: str) -> None:
    assert problems(stage, **values) == [message]


@pytest.mark.parametrize(
    ("stage", "values"),
    [
        ("rm", {}),
        ("dpo", {"pref_loss": "ipo", "pref_bco_weight": 1 / 3, "ref_model": "r", "ref_model_adapters": "x"}),
        ("dpo", {"adapter_name_or_path": "x"}),
        ("kto", {"pref_beta": 0.5, "pref_ftx": 0.1}),
        ("sft", {"use_asft_loss": True}),
    ],
)
def test_a_migrated_file_is_the_same_recipe(stage: str, values: dict[str, Any]) -> None:
    loaded = load(stage, output_dir="out", **values)
    Path("native.yaml").write_text(dump_recipe(loaded, everything=False), encoding="utf-8")
    assert load_recipe("native.yaml").recipe == loaded.recipe
