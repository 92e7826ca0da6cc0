"""PPO in a LLaMA-Factory file: rollouts, rewards and the numbers that its trainer is given or left with.

What its keys do not say is the default of TRL 0.9.6, the newest that it asks for: clipping by 0.2 of ratios and values,
a value loss of weight 0.1, discount 1 and trace 0.95, whitened advantages, and a divergence from the reference in the
reward of each token (k1) whose coefficient starts at 0.2 and is adapted over 10000 answers.
"""

from __future__ import annotations

from typing import Any

from luthier.recipe.flat import Flat
from luthier.recipe.llamafactory_model import quantized
from luthier.recipe.problems import found

PPO_KEYS = ("ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target", "ppo_whiten_rewards")
REWARD_KEYS = (
    "reward_model",
    "reward_model_adapters",
    "reward_model_quantization_bit",
    "reward_model_type",
)
_KINDS = ("lora", "full", "api")
_FIXED = {
    "stage.clip": 0.2,
    "stage.discount": 1.0,
    "stage.trace": 0.95,
    "stage.value_weight": 0.1,
    "stage.value_clip": 0.2,
    "stage.critic": "shared",
    "stage.whiten_advantages": True,
}
_PENALTY = {"coefficient": 0.2, "estimator": "k1", "horizon": 10_000}
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def read_ppo(flat: Flat) -> None:
    """The stage and its rewards; the reference is read where those of other stages are."""
    for target, value in _FIXED.items():
        flat.put(target, value)
    flat.put("stage.kl", _PENALTY | {"target": flat.get("ppo_target")}, "ppo_target")
    flat.put("stage.epochs", flat.get("ppo_epochs"), "ppo_epochs")
    flat.put("stage.score_norm", flat.flag("ppo_score_norm"), "ppo_score_norm")
    flat.put("stage.whiten_rewards", flat.flag("ppo_whiten_rewards"), "ppo_whiten_rewards")
    rows, accumulation, buffers = (_count(flat, key) for key in (*_BATCH, "ppo_buffer_size"))
    flat.put("stage.prompts_per_rollout", rows * accumulation * buffers, "ppo_buffer_size", *_BATCH)
    flat.put("stage.minibatches", buffers, "ppo_buffer_size")
    for target in ("train.rows_per_device", "train.accumulation"):
        flat.drop(target)
    flat.put("stage.rewards", [_reward(flat)], "reward_model")
    flat.note(
        "stage: ppo: prompts_per_rollout counts those of all processes here, those of each there; the loss is the mean "
        "over the tokens of an optimizer step here, over those of each device's batch there"
    )
    _dropout(flat)


def _count(flat: Flat, key: str) -> int:
    """A whole number above 0; 1 with a problem."""
    value = flat.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        flat.problem(key, f"expected a whole number above 0, found {found(value)}")
        return 1
    return value


def _reward(flat: Flat) -> dict[str, Any]:
    """The one reward that a file names."""
    kind, model = flat.choice("reward_model_type", _KINDS), flat.get("reward_model")
    if not isinstance(model, str) or not model:
        flat.problem("reward_model", "is missing; name the reward model, as the folder of a run of stage: rm")
        model = "reward"
    used: tuple[str, ...] = ("reward_model", "reward_model_type")
    reward: dict[str, Any] = {"type": "model", "path": model}
    if kind == "api":
        reward = {"type": "http", "url": model, "form": "text"}
    elif kind == "full":
        used = REWARD_KEYS
        reward |= _whole_model(flat, model)
    elif _merges_first(flat):
        flat.note(
            "reward_model: its adapter is put on the base that it was trained on; there on the base with the first "
            "adapters of adapter_name_or_path in it"
        )
    for key in REWARD_KEYS:
        if key not in used and flat.changed(key):
            flat.note(f"{flat.written(key)}: no effect with reward_model_type: {kind}")
    return reward


def _whole_model(flat: Flat, model: str) -> dict[str, Any]:
    """What a reward model of its own has beside its path: an adapter on it, and weights of fewer bits."""
    reward: dict[str, Any] = {}
    adapters = flat.names("reward_model_adapters")
    if len(adapters) > 1:
        flat.problem(
            "reward_model_adapters",
            "name one adapter, with the value head; merge the others into reward_model first",
        )
    elif adapters:
        reward |= {"path": adapters[0], "base": model}
    if flat.given("reward_model_quantization_bit"):
        reward["quantization"] = quantized(flat, "reward_model_quantization_bit")
    return reward


def _merges_first(flat: Flat) -> bool:
    """Whether that tool merges adapters into the base of policy and reward model before training."""
    adapters = flat.names("adapter_name_or_path")
    return len(adapters) > 1 or bool(adapters and flat.flag("create_new_adapter"))


def _dropout(flat: Flat) -> None:
    """Probabilities with dropout are not those that drew the answers."""
    if not flat.native.tree.get("method", {}).get("dropout"):
        return
    key = "module_dropout" if flat.get("finetuning_type") == "oft" else "lora_dropout"
    flat.put("method.dropout", 0.0, key)
    flat.note(
        f"{key}: dropout is off with stage: ppo here, so that probabilities are those that drew the answers; there "
        "it is on"
    )


def in_optimizer_steps(flat: Flat) -> None:
    """A step is a rollout in that tool's loop, and an optimizer step here."""
    if flat.get("stage") != "ppo":
        return
    stage = flat.native.tree["stage"]
    updates = stage["minibatches"] * _count(flat, "ppo_epochs")
    if updates == 1:
        return
    train, optim = flat.native.tree.get("train", {}), flat.native.tree.get("optim", {})
    for name in ("log_every", "eval_every", "save_every", "max_steps"):
        if isinstance(train.get(name), int):
            train[name] *= updates
    if isinstance(optim.get("warmup"), int | float) and optim["warmup"] >= 1:
        optim["warmup"] = int(optim["warmup"] * updates)
    options = optim.get("schedule_options") or {}
    for name in options:
        if name.endswith("_steps"):
            options[name] *= updates
    flat.note(
        f"stage: ppo: a step is a rollout there and an optimizer step here, {updates} to a rollout: max_steps, "
        f"warmup_steps, logging_steps, eval_steps and save_steps are {updates} times what the file says; the learning "
        "rate changes with each"
    )
