"""LLaMA-Factory's `stage: ppo`: the numbers that its trainer runs with are those of the translation.

Where a file says nothing, that trainer runs with its own defaults and with those of TRL 0.9.6's PPOConfig; both are
written out here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import (
    BitsAndBytesSpec,
    HttpRewardSpec,
    ModelRewardSpec,
    PpoSpec,
    ReferenceSpec,
    RewardKlSpec,
)
from luthier.types import RecipeError

CPU = Hardware("cpu", "a processor", 8 * 2**30, True, 2)
BASE: dict[str, Any] = {
    "model_name_or_path": "m",
    "do_train": True,
    "dataset": "a",
    "stage": "ppo",
    "reward_model": "saves/reward",
    "bf16": True,
}
BATCHES = (
    "stage: ppo: prompts_per_rollout counts those of all processes here, those of each there; the loss is the mean over "
    "the tokens of an optimizer step here, over those of each device's batch there"
)


def steps(updates: int) -> str:
    return (
        f"stage: ppo: a step is a rollout there and an optimizer step here, {updates} to a rollout: max_steps, "
        f"warmup_steps, logging_steps, eval_steps and save_steps are {updates} times what the file says; the learning "
        "rate changes with each"
    )


def load(**values: Any) -> LoadedRecipe:
    return load_recipe(BASE | values)


def problems(**values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**values)
    return str(caught.value).split("\n")


def stage_of(**values: Any) -> PpoSpec:
    stage = load(**values).recipe.stage
    assert isinstance(stage, PpoSpec)
    return stage


# --------------------------------------------------------------------------------------------------
# Numbers


def test_what_that_tool_runs_with_where_a_file_says_nothing() -> None:
    loaded = load()
    stage = loaded.recipe.stage
    assert isinstance(stage, PpoSpec)
    assert (stage.clip, stage.clip_high, stage.value_clip) == (0.2, None, 0.2)  # cliprange, cliprange_value
    assert (stage.discount, stage.trace) == (1.0, 0.95)  # gamma, lam
    assert (stage.value_weight, stage.critic, stage.value_start) == (0.1, "shared", None)  # vf_coef
    assert stage.kl == RewardKlSpec(coefficient=0.2, estimator="k1", target=6.0, horizon=10_000)
    assert (stage.whiten_advantages, stage.whiten_rewards) == (True, False)
    assert (stage.score_norm, stage.score_clip, stage.missing_end_penalty) == (False, None, None)
    assert (stage.epochs, stage.minibatches, stage.prompts_per_rollout) == (4, 1, 8)
    assert (stage.entropy, stage.importance_cap, stage.target_kl, stage.mask_truncated) == (
        0,
        None,
        None,
        False,
    )
    assert (stage.rewards, stage.reference) == ((ModelRewardSpec(path="saves/reward"),), "start")
    assert loaded.notes == (BATCHES, steps(4))


def test_the_numbers_hold_whatever_the_defaults_here_become() -> None:
    """What is equal to a default here is left out of the native file, and was written before."""
    from luthier.recipe import llamafactory_ppo

    assert llamafactory_ppo._FIXED | llamafactory_ppo._PENALTY == {
        "stage.clip": 0.2,
        "stage.discount": 1.0,
        "stage.trace": 0.95,
        "stage.value_weight": 0.1,
        "stage.value_clip": 0.2,
        "stage.critic": "shared",
        "stage.whiten_advantages": True,
        "coefficient": 0.2,
        "estimator": "k1",
        "horizon": 10_000,
    }


def test_its_own_keys() -> None:
    stage = stage_of(ppo_epochs=2, ppo_score_norm=True, ppo_target=0.5, ppo_whiten_rewards=True)
    assert (stage.epochs, stage.score_norm, stage.whiten_rewards) == (2, True, True)
    assert stage.kl == RewardKlSpec(coefficient=0.2, target=0.5)


def test_prompts_of_a_rollout_and_its_steps() -> None:
    loaded = load(
        per_device_train_batch_size=3, gradient_accumulation_steps=5, ppo_buffer_size=2, ppo_epochs=7
    )
    stage, train = loaded.recipe.stage, loaded.recipe.train
    assert isinstance(stage, PpoSpec)
    assert (stage.prompts_per_rollout, stage.minibatches, stage.updates) == (30, 2, 14)
    assert (train.rows_per_device, train.accumulation, train.tokens_per_batch) == (None, 1, None)
    assert resolve(loaded, CPU).recipe.train.tokens_per_batch is None


@pytest.mark.parametrize(("epochs", "buffers", "updates"), [(1, 1, 1), (4, 1, 4), (2, 3, 6)])
def test_steps_of_that_tool_are_rollouts(epochs: int, buffers: int, updates: int) -> None:
    loaded = load(
        ppo_epochs=epochs,
        ppo_buffer_size=buffers,
        max_steps=10,
        warmup_steps=2,
        logging_steps=3,
        save_steps=5,
        eval_dataset="b",
        eval_strategy="steps",
        eval_steps=4,
    )
    train = loaded.recipe.train
    assert train.max_steps == 10 * updates
    assert (train.log_every, train.save_every, train.eval_every) == (3 * updates, 5 * updates, 4 * updates)
    assert loaded.recipe.optim.warmup == 2 * updates
    assert loaded.notes == (BATCHES, *([steps(updates)] if updates > 1 else []))


def test_shares_of_all_steps_stay_shares() -> None:
    recipe = load(warmup_ratio=0.1, max_steps=20, logging_steps=0.1, save_strategy="epoch").recipe
    assert recipe.optim.warmup == 0.1
    assert (recipe.train.log_every, recipe.train.max_steps, recipe.train.save_every) == (8, 80, "epoch")


def test_lengths_of_a_schedule_are_counted_in_the_same_steps() -> None:
    kwargs = {"num_stable_steps": 6, "num_decay_steps": 2}
    recipe = load(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs, max_steps=10, warmup_steps=2
    ).recipe
    assert recipe.optim.schedule_options["num_stable_steps"] == 24
    assert recipe.optim.schedule_options["num_decay_steps"] == 8
    assert (recipe.train.max_steps, recipe.optim.warmup) == (40, 8)


# --------------------------------------------------------------------------------------------------
# Answers


def test_answers_are_drawn_as_that_tool_draws_them() -> None:
    generation = load().recipe.generation
    assert (generation.do_sample, generation.temperature) == (True, 0.95)
    assert (generation.top_p, generation.top_k, generation.max_new_tokens) == (0.7, 50, 1024)
    assert (generation.num_beams, generation.repetition_penalty) == (1, 1.0)
    generation = load(temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=0, max_length=99).recipe.generation
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 0.9, 0)
    assert (generation.max_new_tokens, generation.max_length) == (None, 99)


def test_rollouts_know_one_engine() -> None:
    loaded = load(infer_backend="vllm")
    assert loaded.recipe.generation.engine == "hf"
    assert (
        "infer_backend: no effect with stage: ppo: rollouts are drawn by transformers, as there"
        in loaded.notes
    )


def test_rows_are_prompts() -> None:
    data = load(cutoff_len=128).recipe.data
    assert (data.train_after_stop, data.train_on_prompt, data.packing) == (False, False, False)
    assert (data.max_length, data.overflow, data.rules) == (128, "truncate", "llamafactory")


# --------------------------------------------------------------------------------------------------
# Rewards and reference


def test_an_adapter_as_reward() -> None:
    assert stage_of().rewards == (ModelRewardSpec(path="saves/reward", base=None),)
    loaded = load(adapter_name_or_path="a,b")
    assert loaded.recipe.stage.rewards == (ModelRewardSpec(path="saves/reward"),)  # type: ignore[union-attr]
    assert any(
        note.startswith("reward_model: its adapter is put on the base that it was") for note in loaded.notes
    )


def test_a_whole_model_as_reward() -> None:
    assert stage_of(reward_model_type="full").rewards == (ModelRewardSpec(path="saves/reward"),)
    assert stage_of(
        reward_model_type="full", reward_model_adapters="saves/head", reward_model_quantization_bit=8
    ).rewards == (
        ModelRewardSpec(path="saves/head", base="saves/reward", quantization=BitsAndBytesSpec(bits=8)),
    )
    rewards = stage_of(
        reward_model_type="full", reward_model_quantization_bit=4, quantization_type="fp4"
    ).rewards
    assert rewards[0].quantization == BitsAndBytesSpec(bits=4, quant_type="fp4", double=True)  # type: ignore[union-attr]


def test_a_service_as_reward() -> None:
    loaded = load(
        reward_model_type="api", reward_model="http://localhost:8000/score", reward_model_adapters="x"
    )
    assert loaded.recipe.stage.rewards == (HttpRewardSpec(url="http://localhost:8000/score", form="text"),)  # type: ignore[union-attr]
    assert "reward_model_adapters: no effect with reward_model_type: api" in loaded.notes


def test_the_reference() -> None:
    assert stage_of().reference == "start"
    assert stage_of(adapter_name_or_path="a").reference == "base"
    assert stage_of(adapter_name_or_path="a", create_new_adapter=True).reference == "start"
    assert stage_of(finetuning_type="full").reference == "start"
    full = load(finetuning_type="full", ref_model="r", ref_model_quantization_bit=8)
    assert full.recipe.stage.reference == ReferenceSpec(  # type: ignore[union-attr]
        path="r", quantization=BitsAndBytesSpec(bits=8)
    )
    assert full.notes == (BATCHES, steps(4))
    adapters = load(ref_model="r", ref_model_adapters="x,y")
    assert adapters.recipe.stage.reference == ReferenceSpec(path="r", adapters=("x", "y"))  # type: ignore[union-attr]
    assert (
        "ref_model: the reference here; there, where adapters train, it is loaded and not asked: the model below them "
        "is"
    ) in adapters.notes


def test_dropout_and_noise() -> None:
    loaded = load(lora_dropout=0.1, neftune_noise_alpha=5)
    assert loaded.recipe.method.dropout == 0.0  # type: ignore[union-attr]
    assert loaded.recipe.train.neftune_alpha == 0.0
    assert (
        "lora_dropout: dropout is off with stage: ppo here, so that probabilities are those that drew the answers; "
        "there it is on"
    ) in loaded.notes
    assert "neftune_noise_alpha: no effect with stage: ppo, as there" in loaded.notes


@pytest.mark.parametrize(
    ("key", "value"),
    [("pref_beta", 0.3), ("kto_chosen_weight", 2.0), ("pref_loss", "ipo"), ("ld_alpha", 0.5)],
)
def test_keys_of_preference_learning_have_no_effect_and_say_so(key: str, value: Any) -> None:
    loaded = load(**{key: value})
    assert loaded.recipe == load().recipe
    assert any(note.startswith(f"{key}: ") for note in loaded.notes)


def test_accuracy_is_no_number_of_a_policy() -> None:
    loaded = load(compute_accuracy=True)
    assert loaded.recipe.train.metrics == ()
    assert "compute_accuracy: no effect with stage: ppo" in loaded.notes


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"reward_model": None},
            "reward_model: is missing; name the reward model, as the folder of a run of stage: rm",
        ),
        (
            {"reward_model_type": "oft"},
            "reward_model_type: 'oft' is none of its values; choose from lora, full, api",
        ),
        (
            {"reward_model_type": "full", "reward_model_adapters": "a,b"},
            "reward_model_adapters: name one adapter, with the value head; merge the others into reward_model first",
        ),
        (
            {"reward_model_type": "full", "reward_model_quantization_bit": 3},
            "reward_model_quantization_bit: the number 3: bnb has 4, 8 bits",
        ),
        ({"ppo_buffer_size": 0}, "ppo_buffer_size: expected a whole number above 0, found the number 0"),
        ({"ppo_buffer_size": 1.5}, "ppo_buffer_size: expected a whole number above 0, found the number 1.5"),
        ({"train_on_prompt": True}, "train_on_prompt: goes with stage: sft only"),
        (
            {"predict_with_generate": True},
            "predict_with_generate: goes with stage: sft, and this is ppo; remove it",
        ),
        ({"ppo_epochs": 0}, "ppo_epochs: should be greater than 0, found the number 0"),
        ({"ppo_target": -1}, "ppo_target: should be greater than 0, found the number -1"),
        ({"ppo_score_norm": "yes"}, "ppo_score_norm: expected true or false, found the text 'yes'"),
        (
            {"num_beams": 2},
            "generation.num_beams: 2: a beam search does not draw from the policy, so its answers say "
            "nothing of it; leave it out",
        ),
        (
            {"do_sample": False},
            "generation.do_sample: false: the answers to a prompt would be all the same, and there "
            "would be nothing to compare; leave it out",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be(values: dict[str, Any], message: str) -> None:
    assert problems(**values) == [message]


def test_a_service_needs_its_whole_address() -> None:
    (line,) = problems(reward_model_type="api", reward_model="localhost:8000")
    assert line == (
        "reward_model: write the whole address, http://... or https://..., found the text 'localhost:8000'"
    )


# --------------------------------------------------------------------------------------------------
# Whole files

THEIRS = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
reward_model: saves/llama3-8b/lora/reward
stage: ppo
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/ppo
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
max_new_tokens: 512
top_k: 0
top_p: 0.9
"""
"""The keys of the file that tool shows for this stage."""


def test_that_tools_own_example(tmp_path: Path) -> None:
    (tmp_path / "ppo.yaml").write_text(THEIRS)
    loaded = load_recipe(tmp_path / "ppo.yaml")
    recipe = loaded.recipe
    stage, train = recipe.stage, recipe.train
    assert isinstance(stage, PpoSpec)
    assert (stage.prompts_per_rollout, stage.minibatches, stage.epochs) == (8, 1, 4)
    assert stage.rewards == (ModelRewardSpec(path="saves/llama3-8b/lora/reward"),)
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.warmup) == (1e-5, "cosine", 0.1)
    assert (train.epochs, train.max_steps, train.log_every, train.save_every) == (3.0, None, 40, 2000)
    assert (train.precision, train.overwrite, train.plots) == ("bf16", True, True)
    generation = recipe.generation
    assert (generation.max_new_tokens, generation.top_k, generation.top_p) == (512, 0, 0.9)
    assert generation.temperature == 0.95
    assert loaded.notes == (BATCHES, steps(4))


def test_what_migrate_writes_is_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "ppo.yaml").write_text(THEIRS)
    loaded = load_recipe(tmp_path / "ppo.yaml", ["ppo_target=3.0", "ppo_epochs=2"])
    native = dump_recipe(loaded, everything=False)
    (tmp_path / "native.yaml").write_text(native)
    assert load_recipe(tmp_path / "native.yaml").recipe == loaded.recipe
    assert "  epochs: 2  # command line" in native
    assert "  prompts_per_rollout: 8  # translated from per_device_train_batch_size (line 18)" in native
