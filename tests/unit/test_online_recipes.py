"""Recipes of ppo and grpo: what their parts mean together, and one sentence for each thing that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.online import reward_names
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import (
    FunctionRewardSpec,
    GrpoSpec,
    KlSpec,
    LengthSpec,
    NumericSpec,
    PpoSpec,
    RegexSpec,
    RewardKlSpec,
)
from luthier.types import RecipeError

CPU = Hardware("cpu", "a processor", 8 * 2**30, True, 2)
NUMERIC: dict[str, Any] = {"type": "numeric"}


def load(kind: str = "grpo", rewards: Any = (NUMERIC,), /, **sections: Any) -> LoadedRecipe:
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": ["a"]}}
    tree["stage"] = {"type": kind, "rewards": list(rewards)}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return load_recipe(tree)


def problem(kind: str = "grpo", rewards: Any = (NUMERIC,), /, **sections: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        load(kind, rewards, **sections)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# What a recipe means


def test_defaults() -> None:
    grpo = load().recipe.stage
    assert isinstance(grpo, GrpoSpec)
    assert (grpo.kl, grpo.updates, grpo.group_size) == (KlSpec(coefficient=0.0), 1, 8)
    ppo = load("ppo").recipe.stage
    assert isinstance(ppo, PpoSpec)
    assert (ppo.kl.coefficient, ppo.kl.estimator, ppo.kl.target, ppo.kl.horizon) == (0.2, "k1", 6.0, 10_000)
    assert ppo.updates == 4


def test_a_penalty_that_is_given_in_part_keeps_the_rest_of_its_stage() -> None:
    ppo = load("ppo", stage={"type": "ppo", "rewards": [NUMERIC], "kl": {"coefficient": 0.1}}).recipe.stage
    assert isinstance(ppo, PpoSpec)
    assert ppo.kl == RewardKlSpec(coefficient=0.1, estimator="k1", target=6.0)
    grpo = load(stage={"kl": {"coefficient": 0.1}}).recipe.stage
    assert isinstance(grpo, GrpoSpec)
    assert grpo.kl == KlSpec(coefficient=0.1, estimator="k3", target=None)
    preset = load(stage={"variant": "grpo", "kl": {"estimator": "k2"}}).recipe.stage
    assert isinstance(preset, GrpoSpec)
    assert preset.kl == KlSpec(coefficient=0.04, estimator="k2", target=None)


@pytest.mark.parametrize("variant", [None, "dr_grpo", "rloo"])
@pytest.mark.parametrize("kl", [{"estimator": "k2"}, {"target": 0.5}, {"horizon": 100}])
def test_a_penalty_of_grpo_has_its_coefficient(variant: str | None, kl: dict[str, Any]) -> None:
    """It is off there, so that a field of it alone would say nothing; a 0 that is given is meant so."""
    (field,) = kl
    message = f"stage.kl.{field} has no effect with stage.kl.coefficient: 0, its default here"
    assert message in problem(stage={"variant": variant, "kl": kl})
    off = load(stage={"variant": variant, "kl": {"coefficient": 0, "estimator": "k2"}}).recipe.stage
    assert isinstance(off, GrpoSpec)
    assert (off.kl.coefficient, off.kl.estimator) == (0, "k2")


def test_without_a_penalty_there_is_no_target_either() -> None:
    ppo = load("ppo", stage={"kl": {"coefficient": 0}}).recipe.stage
    assert isinstance(ppo, PpoSpec)
    assert (ppo.kl.coefficient, ppo.kl.target) == (0, None)


def test_updates_of_a_rollout() -> None:
    stage = load("ppo", stage={"epochs": 3, "minibatches": 2}).recipe.stage
    assert isinstance(stage, PpoSpec)
    assert stage.updates == 6


def test_rewards_are_called_by_their_name_or_their_type() -> None:
    plain, length = NumericSpec(), LengthSpec(most=3)
    named = RegexSpec(pattern="a", name="numeric")
    assert reward_names([plain, length, plain]) == ("numeric", "length", "numeric_2")
    assert reward_names([plain, named, plain]) == ("numeric_2", "numeric", "numeric_3")
    same = RegexSpec(pattern="a", name="numeric_2")
    assert reward_names([plain, plain, same]) == ("numeric", "numeric_3", "numeric_2")


def test_a_function_is_called_by_its_own_name() -> None:
    of_file, of_module = (FunctionRewardSpec(path=path) for path in ("some/file.py:brevity", "a.b:length"))
    assert reward_names([of_file]) == ("brevity",)
    assert reward_names([of_file.model_copy(update={"name": "short"}), of_file]) == ("short", "brevity")
    # Two files may have functions of one name, and one may be called like a type.
    other = FunctionRewardSpec(path="other.py:brevity")
    assert reward_names([of_file, other, of_module, LengthSpec(most=3)]) == (
        "brevity",
        "brevity_2",
        "length",
        "length_2",
    )


@pytest.mark.parametrize(
    ("stage", "metric"), [("grpo", "eval_reward"), ("ppo", "eval_reward"), ("sft", "eval_loss")]
)
def test_the_best_checkpoint_is_chosen_by_what_the_stage_is_about(stage: str, metric: str) -> None:
    loaded = (
        load(stage) if stage != "sft" else load_recipe({"model": {"path": "m"}, "data": {"train": ["a"]}})
    )
    resolved = resolve(loaded, CPU)
    train = resolved.recipe.train
    assert (train.best_metric, train.greater_is_better) == (metric, metric == "eval_reward")
    assert resolved.origins["train.best_metric"] == "default"


def test_nothing_counts_rows_or_tokens_of_a_batch() -> None:
    resolved = resolve(load(), CPU)
    assert (resolved.recipe.train.tokens_per_batch, resolved.recipe.train.tokens_per_pass) == (None, 512)


@pytest.mark.parametrize(
    "stage",
    [
        {"type": "grpo"},
        {"type": "grpo", "kl": {"coefficient": 0.1, "target": 3.0, "horizon": 500}},
        {"type": "ppo"},
        {"type": "ppo", "kl": {"coefficient": 0}},
        {"type": "ppo", "kl": {"target": None}, "reference": {"path": "other"}, "value_start": "runs/rm"},
    ],
)
def test_a_resolved_recipe_reads_back_as_itself(stage: dict[str, Any], tmp_path: Path) -> None:
    rewards = [
        {"type": "model", "path": "runs/rm", "quantization": {"type": "bitsandbytes", "bits": 8}},
        {"type": "http", "url": "http://localhost:1/score", "weight": 0.5},
        {"type": "regex", "pattern": r"\d+", "name": "digits"},
        {"type": "length", "most": 20},
    ]
    resolved = resolve(load(stage["type"], rewards, stage=stage), CPU)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(resolved))
    assert load_recipe(file).recipe == resolved.recipe


# --------------------------------------------------------------------------------------------------
# What a recipe cannot say

_SHARE = (
    "a step is a share of a rollout; give stage.prompts_per_rollout and stage.minibatches, and train.tokens_per_pass "
    "to bound memory"
)
_OWN = "rows are prompts, and only the policy's own answers are learnt; leave it out"
_SAME = "the answers to a prompt would be all the same, and there would be nothing to compare"


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"tokens_per_batch": 4096}}, f"train.tokens_per_batch does not go with {{}}: {_SHARE}"),
        ({"train": {"rows_per_device": 1}}, f"train.rows_per_device does not go with {{}}: {_SHARE}"),
        ({"data": {"packing": True}}, f"data.packing does not go with {{}}: {_OWN}"),
        ({"data": {"train_on_prompt": True}}, f"data.train_on_prompt does not go with {{}}: {_OWN}"),
        ({"data": {"mask_history": True}}, f"data.mask_history does not go with {{}}: {_OWN}"),
        ({"data": {"train_after_stop": True}}, f"data.train_after_stop does not go with {{}}: {_OWN}"),
        (
            {"data": {"overflow": "split"}},
            "data.overflow: split does not go with {}: half a prompt is another; give drop, truncate or error",
        ),
        (
            {"train": {"metrics": ["accuracy"]}},
            "train.metrics does not go with {}: its evaluations answer the prompts and report rewards; write what you "
            "want to measure as one of stage.rewards, with weight: 0 to log it alone",
        ),
        (
            {"train": {"best_metric": "eval_loss"}},
            "train.best_metric: eval_loss does not go with {}, whose loss does not say how good answers are; give "
            "eval_reward, or leave it out",
        ),
        (
            {"train": {"best_metric": "loss"}},
            "train.best_metric: loss does not go with {}, whose loss does not say how good answers are; give "
            "eval_reward, or leave it out",
        ),
        (
            {"train": {"generate_at_eval": {}}},
            "train.generate_at_eval goes with stage: sft, and this is {name}; remove it",
        ),
        ({"generation": {"do_sample": False}}, f"generation.do_sample: false: {_SAME}; leave it out"),
        ({"generation": {"temperature": 0}}, f"generation.temperature: 0: {_SAME}; give one above 0"),
        (
            {"generation": {"num_beams": 4}},
            "generation.num_beams: 4: a beam search does not draw from the policy, so its answers say nothing of it; "
            "leave it out",
        ),
        (
            {"generation": {"stop": ["\n"]}},
            "generation.stop: an answer that ends at a string was not ended by the policy, which would never learn to "
            "end one; leave it out",
        ),
        (
            {"generation": {"seed": 1}},
            "generation.seed: the answers of rollouts are drawn by train.seed; leave it out",
        ),
        (
            {"generation": {"engine": "vllm"}},
            "generation.engine: vllm: rollouts are drawn by engine: hf in this version; leave it out",
        ),
        (
            {"method": {"type": "lora", "dropout": 0.1}},
            "method.dropout does not go with {}: answers are drawn without dropout, so probabilities would not be "
            "those that drew them; leave it out",
        ),
        (
            {"train": {"neftune_alpha": 5}},
            "train.neftune_alpha does not go with {}: answers are drawn without noise, so probabilities would not be "
            "those that drew them; leave it out",
        ),
        (
            {"method": {"type": "full"}, "optim": {"type": "lomo"}},
            "optim.type: lomo changes the parameters in every backward pass, and a step of {} has several; give "
            "another optimizer",
        ),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ".".join(f"{k}" for v in value.values() for k in v)
    ),
)
def test_other_parts_that_do_not_go_with_it(stage: str, sections: dict[str, Any], message: str) -> None:
    expected = message.replace("{name}", stage).replace("{}", f"stage: {stage}")
    assert problem(stage, **sections) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"minibatches": 9},
            "stage.minibatches: 9 steps cannot share 8 prompts; give at most stage.prompts_per_rollout",
        ),
        (
            {"target_kl": 0.1},
            "stage.target_kl leaves out later steps of a rollout, and with stage.epochs: 1 and stage.minibatches: 1 "
            "there is one; leave it out",
        ),
        (
            {"reference": "precompute"},
            "stage.reference: the answers do not exist in advance, so nothing can be precomputed; leave it out",
        ),
        (
            {"reference": {"path": "other"}},
            "stage.reference has no effect with stage.kl.coefficient: 0, which keeps no reference; leave it out or "
            "give a coefficient",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_fields_of_the_stage_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    assert problem(stage={"type": "grpo", "rewards": [NUMERIC], **values}).endswith(message)


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"coefficient": 0, "target": 3}, "stage.kl.target has no effect with stage.kl.coefficient: 0"),
        ({"coefficient": -1}, "should be greater than or equal to 0, found the number -1"),
    ],
)
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_penalties_that_say_nothing(stage: str, kl: dict[str, Any], message: str) -> None:
    assert message in problem(stage, stage={"type": stage, "rewards": [NUMERIC], "kl": kl})


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "stage.rewards is empty: name at least one reward"),
        (
            [{**NUMERIC, "name": "a"}, {"type": "regex", "pattern": "a", "name": "a"}],
            "stage.rewards: two are called 'a', and logs could not tell them apart; rename one",
        ),
        (
            [{**NUMERIC, "weight": 0}],
            "stage.rewards: every weight is 0, so nothing would be learnt; give one another weight",
        ),
        (
            [NUMERIC, {"type": "regex", "pattern": "(a"}],
            "stage.rewards[1].pattern: '(a' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            [{"type": "function", "path": "reward.py"}],
            "stage.rewards[0].path: write package.module:name or file.py:name, found the text 'reward.py'",
        ),
        (
            [{"type": "function", "path": "reward.py:not a name"}],
            "stage.rewards[0].path: write package.module:name or file.py:name, found the text 'reward.py:not a name'",
        ),
        (
            [{"type": "http", "url": "localhost:8000"}],
            "stage.rewards[0].url: write the whole address, http://... or https://..., found the text 'localhost:8000'",
        ),
        ([{"type": "length"}], "every length would earn the same: give least, most or both"),
        ([{"type": "length", "least": 9, "most": 8}], "most (8) is below least (9)"),
        (
            [{**NUMERIC, "name": "a b"}],
            "stage.rewards[0].name: write one word of letters, digits and _ . -, found the text 'a b'",
        ),
        ([{"type": "numerc"}], "type: numerc: no such kind; did you mean numeric?"),
        (
            [{**NUMERIC, "pattern": "a"}],
            "stage.rewards[0].pattern: does not go with type: numeric; it belongs to type: regex",
        ),
    ],
)
def test_rewards_that_cannot_be(rewards: list[dict[str, Any]], message: str) -> None:
    (line,) = problem("grpo", rewards).split("\n")
    assert message in line


def test_a_stage_needs_rewards() -> None:
    with pytest.raises(RecipeError, match=r"stage\.rewards: is missing"):
        load_recipe({"model": {"path": "m"}, "data": {"train": ["a"]}, "stage": {"type": "grpo"}})
