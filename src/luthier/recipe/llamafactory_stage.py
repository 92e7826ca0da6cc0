"""The stage of a LLaMA-Factory file: what is learnt, by which loss, compared with which model."""

from __future__ import annotations

from typing import Any

from luthier.recipe.finetuning_keys import NO_EFFECT
from luthier.recipe.flat import Flat
from luthier.recipe.llamafactory_model import quantized
from luthier.recipe.llamafactory_ppo import PPO_KEYS, REWARD_KEYS, read_ppo

_STAGES = ("pt", "sft", "rm", "dpo", "kto", "ppo")
_PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
_REFERENCE_FREE = ("orpo", "simpo")
_SIGMOID_THERE = ("hinge", "ipo", "kto_pair")
"""Losses that are never reached there: the TRL that 0.9.5 asks for takes the loss from elsewhere, and its default."""
_ZERO = 1e-6
"""Weights up to this one count as none there."""

_TOKEN_LOSSES = {"use_dft_loss": "dft", "use_asft_loss": "asft", "use_eaft_loss": "eaft"}
_TOKEN_OPTIONS = {
    "use_asft_loss": ("asft_alpha", "stage.kl_weight"),
    "use_eaft_loss": ("eaft_alpha", "stage.entropy_power"),
}
_PREFERENCE_KEYS = {
    "dpo": {
        "pref_beta": "stage.beta",
        "pref_ftx": "stage.sft_weight",
        "pref_loss": "stage.loss",
        "pref_bco_weight": "stage.loss",
        "dpo_label_smoothing": "stage.label_smoothing",
        "simpo_gamma": "stage.gamma",
        "ld_alpha": "stage.ld_alpha",
    },
    "kto": {
        "pref_beta": "stage.beta",
        "pref_ftx": "stage.sft_weight",
        "kto_chosen_weight": "stage.desirable_weight",
        "kto_rejected_weight": "stage.undesirable_weight",
    },
}
_REFERENCE_KEYS = ("ref_model", "ref_model_adapters", "ref_model_quantization_bit")


def _stage(flat: Flat) -> None:
    stage = flat.get("stage")
    if stage == "orpo":  # a stage of its own before version 0.8
        flat.problem("stage", "write stage: dpo and pref_loss: orpo")
        return
    stage = flat.choice("stage", _STAGES)
    flat.put("stage.type", stage, "stage")
    _token_loss(flat, stage)
    _label_smoothing(flat, stage)
    _other_stages(flat, stage)
    if stage == "dpo":
        _pair_loss(flat)
    elif stage == "kto":
        _feedback(flat)
    elif stage == "ppo":
        read_ppo(flat)
    _reference(flat, stage)
    if stage in ("dpo", "kto"):
        _dropout(flat, stage)


def _without_effect(flat: Flat, keys: tuple[str, ...], condition: str) -> None:
    for key in keys:
        if flat.changed(key):
            flat.note(f"{flat.written(key)}: no effect with {condition}")


# --------------------------------------------------------------------------------------------------
# pt and sft


def _asked_token_losses(flat: Flat) -> list[str]:
    return [key for key in _TOKEN_LOSSES if flat.flag(key)]


def _token_loss(flat: Flat, stage: str) -> None:
    """The variants of cross-entropy, and the option of each."""
    asked = _asked_token_losses(flat)
    if stage != "sft":
        _without_effect(flat, tuple(asked), f"stage: {stage}")
        asked = []
    elif len(asked) > 1:
        flat.problem(asked[1], f"{asked[0]} and {asked[1]} exclude each other; keep one")
    elif asked:
        flat.put("stage.loss", _TOKEN_LOSSES[asked[0]], asked[0])
    for owner, (key, target) in _TOKEN_OPTIONS.items():
        if owner in asked:
            flat.put(target, flat.get(key), key)
        elif flat.changed(key):
            flat.note(f"{key}: no effect without {owner}")
    if asked == ["use_asft_loss"]:
        flat.note(
            "use_asft_loss: the mean is over the tokens of the whole step here, over those of each device's batch there"
        )


def _label_smoothing(flat: Flat, stage: str) -> None:
    key = "label_smoothing_factor"
    losses = _asked_token_losses(flat)
    if stage == "sft" and losses:
        _without_effect(flat, (key,), f"{losses[0]}: true")
    elif stage in ("pt", "sft"):
        flat.put("stage.label_smoothing", flat.get(key), key)
    else:
        _without_effect(flat, (key,), f"stage: {stage}")


# --------------------------------------------------------------------------------------------------
# dpo and kto


def _other_stages(flat: Flat, stage: str) -> None:
    """Keys of preference and reinforcement learning that the file's stage has no use for."""
    used = _PREFERENCE_KEYS.get(stage, {})
    others = dict.fromkeys(key for keys in _PREFERENCE_KEYS.values() for key in keys if key not in used)
    if stage != "ppo":
        others |= dict.fromkeys((*PPO_KEYS, *REWARD_KEYS))
    for key in others:
        if flat.changed(key):
            flat.note(f"{flat.written(key)}: {NO_EFFECT}")


def _pair_loss(flat: Flat) -> None:
    loss = flat.choice("pref_loss", _PAIR_LOSSES)
    with_loss = f"pref_loss: {loss}"
    key = flat.written("pref_loss")
    if loss in _SIGMOID_THERE:
        average = " of mean log-probabilities" if loss == "ipo" else ""
        flat.note(
            f"{key}: {loss}: that loss is trained here; there it is the sigmoid loss{average} in silence"
        )
    flat.put("stage.loss", _weighted(flat, loss), "pref_loss", "pref_bco_weight")
    flat.put("stage.beta", flat.get("pref_beta"), "pref_beta")
    flat.put("stage.sft_weight", flat.get("pref_ftx"), "pref_ftx")
    flat.put("stage.ld_alpha", flat.get("ld_alpha"), "ld_alpha")
    _length_desensitised(flat, loss)
    if loss == "simpo":
        flat.put("stage.gamma", flat.get("simpo_gamma"), "simpo_gamma")
    else:
        _without_effect(flat, ("simpo_gamma",), with_loss)
    if loss == "sigmoid":
        flat.put("stage.label_smoothing", flat.get("dpo_label_smoothing"), "dpo_label_smoothing")
    elif flat.number("dpo_label_smoothing") > _ZERO:
        flat.problem("dpo_label_smoothing", "goes with pref_loss: sigmoid only")


def _length_desensitised(flat: Flat, loss: str) -> None:
    if not flat.given("ld_alpha"):
        return
    if loss not in _REFERENCE_FREE:
        flat.note("ld_alpha: weights the reference's log-probabilities too; there the policy's alone")
    if loss == "orpo" or flat.changed("pref_ftx"):
        flat.note("ld_alpha: does not touch the likelihood of the better answer here; it does there")


def _weighted(flat: Flat, loss: str) -> str | dict[str, float]:
    """The loss, or its weighted mean with the one of a binary classifier."""
    key = "pref_bco_weight"
    weight = flat.number(key)
    if weight < 0:
        flat.problem(key, f"should be 0 or more, found the number {weight}")
    if loss in _REFERENCE_FREE:
        _without_effect(flat, (key,), f"pref_loss: {loss}")
    elif weight > _ZERO:
        flat.note(f"{key}: its shift is the mean reward of the step here, a running mean of all steps there")
        return {loss: 1 / (1 + weight), "bco_pair": weight / (1 + weight)}
    return loss


def _feedback(flat: Flat) -> None:
    for key, target in _PREFERENCE_KEYS["kto"].items():
        flat.put(target, flat.get(key), key)
    flat.note(
        "stage: kto: the divergence is estimated from the rows of the whole step here, of each device's batch there"
    )
    if flat.changed("pref_ftx"):
        flat.note(
            f"{flat.written('pref_ftx')}: weights the mean over the desirable answers of the step here; there the term "
            "is also multiplied by rows / desirable rows of each device's batch"
        )


def _dropout(flat: Flat, stage: str) -> None:
    """That tool switches every dropout layer off for these stages."""
    if flat.get("finetuning_type") == "lora" and flat.changed("lora_dropout"):
        flat.put("method.dropout", 0.0, "lora_dropout")
        flat.note(f"lora_dropout: dropout is off with stage: {stage}, as there")


# --------------------------------------------------------------------------------------------------
# The reference


def _reference(flat: Flat, stage: str) -> None:
    compared = stage in ("kto", "ppo") or (stage == "dpo" and flat.get("pref_loss") not in _REFERENCE_FREE)
    if not compared and not (stage == "sft" and "use_asft_loss" in _asked_token_losses(flat)):
        for key in _REFERENCE_KEYS:
            if flat.changed(key):
                flat.note(f"{flat.written(key)}: {_no_reference(flat, stage)}")
        return
    if not flat.given("ref_model"):
        _without_effect(flat, _REFERENCE_KEYS[1:], "no ref_model")
        if compared:
            _below_the_adapters(flat)
        return
    reference: dict[str, Any] = {"path": flat.get("ref_model")}
    if flat.given("ref_model_quantization_bit"):
        reference["quantization"] = quantized(flat, "ref_model_quantization_bit")
    adapters = flat.names("ref_model_adapters")
    if adapters:
        reference["adapters"] = adapters
    flat.put("stage.reference", reference, "ref_model")
    if stage == "ppo" and flat.get("finetuning_type") in ("lora", "oft"):
        flat.note(
            f"{flat.written('ref_model')}: the reference here; there, where adapters train, it is loaded and "
            "not asked: the model below them is"
        )


def _no_reference(flat: Flat, stage: str) -> str:
    return f"no effect with pref_loss: {flat.get('pref_loss')}" if stage == "dpo" else NO_EFFECT


def _below_the_adapters(flat: Flat) -> None:
    """Where an adapter is trained further, that tool compares with the model without it."""
    method = flat.native.tree.get("method", {})
    trains = flat.flag("do_train")
    if trains and method.get("adapters") and not method.get("create_new_adapter"):
        key = flat.written("adapter_name_or_path")
        flat.put("stage.reference", "base", "adapter_name_or_path")
        flat.note(
            f"{key}: the reference is the model below the adapter, as there; "
            "stage.reference=start takes the adapter as training starts"
        )


STAGE_SUBJECTS = (_stage,)
