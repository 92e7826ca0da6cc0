"""The optimizer and the schedule of a LLaMA-Factory file."""

from __future__ import annotations

import json
import math
from typing import Any

from luthier.recipe.flat import Flat

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"type": "adamw"},
    "adamw_torch_fused": {"type": "adamw"},
    "adamw_hf": {"type": "adamw"},
    "adamw_8bit": {"type": "adamw", "bits": 8},
    "adamw_bnb_8bit": {"type": "adamw", "bits": 8},
    "paged_adamw_32bit": {"type": "adamw", "paged": True},
    "paged_adamw_8bit": {"type": "adamw", "bits": 8, "paged": True},
    "adafactor": {"type": "adafactor"},
    "sgd": {"type": "sgd"},
    "lion_32bit": {"type": "lion"},
    "lion_8bit": {"type": "lion", "bits": 8},
    "paged_lion_32bit": {"type": "lion", "paged": True},
    "paged_lion_8bit": {"type": "lion", "bits": 8, "paged": True},
    "schedule_free_adamw": {"type": "schedule_free"},
    "galore_adamw": {"type": "galore"},
    "galore_adamw_layerwise": {"type": "galore", "layerwise": True},
    "apollo_adamw": {"type": "apollo"},
    "apollo_adamw_layerwise": {"type": "apollo", "layerwise": True},
    "lomo": {"type": "lomo"},
    "adalomo": {"type": "adalomo"},
}
"""transformers' names, and adamw_hf, which older files have."""

_EIGHT_BITS = "its moments are not kept in 8 bits or factors here; write optim: {} for moments in full"
_NOT_HERE = "is not part of Luthier; write optim: adamw_torch"
_REFUSED = {
    "adamw_torch_xla": "is for TPUs; write adamw_torch",
    "adamw_torch_npu_fused": "is for NPUs; write adamw_torch",
    "adamw_anyprecision": "needs torchdistx, which is gone; write adamw_torch",
    "adamw_torch_8bit": "is torchao's; write adamw_8bit, which is bitsandbytes'",
    "adamw_torch_4bit": "is torchao's; write adamw_8bit, which is bitsandbytes'",
    "galore_adamw_8bit": _EIGHT_BITS.format("galore_adamw"),
    "galore_adafactor": _EIGHT_BITS.format("galore_adamw"),
    "galore_adamw_8bit_layerwise": _EIGHT_BITS.format("galore_adamw_layerwise"),
    "galore_adafactor_layerwise": _EIGHT_BITS.format("galore_adamw_layerwise"),
    "schedule_free_radam": "is not part of Luthier; write schedule_free_adamw",
    "schedule_free_sgd": "is not part of Luthier; write schedule_free_adamw",
    **dict.fromkeys(
        (
            "ademamix",
            "ademamix_8bit",
            "paged_ademamix_32bit",
            "paged_ademamix_8bit",
            "adagrad",
            "rmsprop",
            "rmsprop_bnb",
            "rmsprop_bnb_8bit",
            "rmsprop_bnb_32bit",
            "grokadamw",
            "stable_adamw",
        ),
        _NOT_HERE,
    ),
}
"""transformers' other names, and what to do."""

_ARGS: dict[str, dict[str, str]] = {
    "sgd": {"momentum": "momentum"},
    "schedule_free": {"weight_lr_power": "weight_lr_power", "r": "r"},
    "galore": {"rank": "rank", "update_proj_gap": "update_every", "scale": "scale", "proj_type": "side"},
    "apollo": {
        "rank": "rank",
        "update_proj_gap": "update_every",
        "scale": "scale",
        "proj_type": "side",
        "proj": "projection",
        "scale_type": "scale_type",
    },
}
"""What `optim_args` may say of each, and the recipe's name for it."""

_FLAGS = {
    "use_galore": "galore",
    "use_apollo": "apollo",
    "use_badam": "badam",
    "use_adam_mini": "adam_mini",
    "use_muon": "muon",
}
_OPTIONS: dict[str, dict[str, str]] = {
    "use_galore": {
        "galore_target": "targets",
        "galore_rank": "rank",
        "galore_update_interval": "update_every",
        "galore_scale": "scale",
        "galore_proj_type": "side",
        "galore_layerwise": "layerwise",
    },
    "use_apollo": {
        "apollo_target": "targets",
        "apollo_rank": "rank",
        "apollo_update_interval": "update_every",
        "apollo_scale": "scale",
        "apollo_proj": "projection",
        "apollo_proj_type": "side",
        "apollo_scale_type": "scale_type",
        "apollo_layerwise": "layerwise",
        "apollo_scale_front": "scale_front",
    },
    "use_badam": {
        "badam_mode": "type",
        "badam_start_block": "start_block",
        "badam_switch_mode": "order",
        "badam_switch_interval": "switch_every",
        "badam_update_ratio": "ratio",
        "badam_mask_mode": "mask",
    },
}
"""The keys of each flag and the recipe's names for them; without the flag they say nothing."""
_WITH_BETAS = (
    "adamw",
    "lion",
    "muon",
    "schedule_free",
    "galore",
    "apollo",
    "badam",
    "badam_ratio",
    "adam_mini",
)
_WITHOUT_EPS = ("lion",)
_BADAM_PART = {
    "badam": ("badam_update_ratio", "badam_mask_mode"),
    "badam_ratio": ("badam_start_block", "badam_switch_mode", "badam_switch_interval"),
}
"""What the other mode's keys are."""


def read_optimizer(flat: Flat) -> None:
    flags = [flag for flag in _FLAGS if flat.flag(flag)]
    _unused_options(flat, flags)
    name = str(flat.get("optim"))
    if len(flags) > 1:
        flat.problem(flags[1], f"{flags[0]} is given too, and there is one optimizer; keep one")
    elif flags:
        _flagged(flat, flags[0], name)
    elif name in _OPTIMIZERS:
        _named(flat, name)
    elif name in _REFUSED:
        flat.problem("optim", f"{name} {_REFUSED[name]}")
    else:
        flat.chosen("optim", name, tuple(_OPTIMIZERS))
    # The ratio wins where a file gives both; a number of steps below 1 is a ratio too.
    flat.put("optim.warmup", flat.get("warmup_ratio") or 0, "warmup_ratio")
    if not flat.given("warmup_ratio"):
        flat.put("optim.warmup", flat.get("warmup_steps"), "warmup_steps")


def _unused_options(flat: Flat, flags: list[str]) -> None:
    for flag, options in _OPTIONS.items():
        for key in options if flag not in flags else ():
            if flat.changed(key):
                flat.note(f"{key}: no effect without {flag}: true")


def _named(flat: Flat, name: str) -> None:
    settings = dict(_OPTIMIZERS[name])
    kind = settings["type"]
    flat.put("optim.type", kind, "optim")
    for key, value in settings.items():
        if key != "type":
            flat.put(f"optim.{key}", value, "optim")
    _moments(flat, kind, name)
    _in_backward(flat, settings, "optim")
    for key, value in _optim_args(flat, kind).items():
        flat.put(f"optim.{key}", value, "optim_args")
    _target_modules(flat, kind)
    if kind == "schedule_free" and flat.get("lr_scheduler_type") not in ("constant", "constant_with_warmup"):
        flat.problem("optim", f"{name} takes the place of a schedule; write lr_scheduler_type: constant")


def _moments(flat: Flat, kind: str, name: str) -> None:
    used = []
    if kind in _WITH_BETAS:
        betas = [flat.get("adam_beta1"), flat.get("adam_beta2")]
        flat.put("optim.betas", betas, "adam_beta1", "adam_beta2")
        used += ["adam_beta1", "adam_beta2"]
        if kind not in _WITHOUT_EPS:
            flat.put("optim.eps", flat.get("adam_epsilon"), "adam_epsilon")
            used.append("adam_epsilon")
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if key not in used and flat.changed(key):
            flat.note(f"{key}: no effect with {name}")


def _in_backward(flat: Flat, settings: dict[str, Any], key: str) -> None:
    if settings["type"] not in ("lomo", "adalomo") and not settings.get("layerwise"):
        return
    if flat.number("max_grad_norm"):
        flat.put("optim.max_grad_norm", 0.0, key)
        flat.note(f"{key}: gradients are not clipped, as there: parameters are updated in the backward pass")
    if flat.number("gradient_accumulation_steps") != 1:
        flat.problem(
            "gradient_accumulation_steps",
            f"{flat.written(key)} updates parameters in the backward pass; write gradient_accumulation_steps: 1",
        )


def _optim_args(flat: Flat, kind: str) -> dict[str, Any]:
    """`a=1, b=c` as transformers reads it."""
    text = flat.get("optim_args")
    known, found = _ARGS.get(kind, {}), dict[str, Any]()
    if text is None:
        return {}
    pairs = [pair.partition("=") for pair in str(text).replace(" ", "").split(",") if pair]
    for name, equals, value in pairs:
        if not equals:
            flat.problem("optim_args", "expected name=value, with commas between several")
        elif name not in known:
            listed = f"; there is {', '.join(known)}" if known else "; remove it"
            flat.problem("optim_args", f"{name} is nothing that optim: {flat.get('optim')} has here{listed}")
        else:
            found[known[name]] = _number(value)
    return found


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _target_modules(flat: Flat, kind: str) -> None:
    if not flat.given("optim_target_modules"):
        return
    targets = flat.get("optim_target_modules")
    if kind not in ("galore", "apollo"):
        flat.note(f"optim_target_modules: no effect with optim: {flat.get('optim')}")
    elif isinstance(targets, str) and targets.replace("_", "-") == "all-linear":
        flat.put("optim.targets", "all-linear", "optim_target_modules")
    elif isinstance(targets, list):
        flat.put("optim.targets", flat.names("optim_target_modules"), "optim_target_modules")
    else:
        flat.problem("optim_target_modules", "expected all-linear or a list of modules' names")


def _flagged(flat: Flat, flag: str, name: str) -> None:
    """What a flag of that tool asks for; `optim` is then the optimizer inside."""
    if name not in ("adamw_torch", "adamw_torch_fused", "adamw_hf"):
        flat.problem("optim", f"{flag} works with moments of AdamW in full here; write optim: adamw_torch")
    for key in ("optim_args", "optim_target_modules"):
        if flat.given(key):
            flat.note(f"{key}: no effect with {flag}")
    kind = _FLAGS[flag]
    if flag == "use_badam":
        kind = "badam" if flat.choice("badam_mode", ("layer", "ratio")) == "layer" else "badam_ratio"
    flat.put("optim.type", kind, flag)
    _moments(flat, kind, flag)
    settings: dict[str, Any] = {"type": kind}
    for key, native in _OPTIONS.get(flag, {}).items():
        if native == "type":
            continue
        if key in _BADAM_PART.get(kind, ()):
            if flat.changed(key):
                flat.note(f"{key}: no effect with badam_mode: {flat.get('badam_mode')}")
            continue
        settings[native] = _option(flat, key)
        flat.put(f"optim.{native}", settings[native], key)
    _in_backward(flat, settings, next((key for key in _OPTIONS.get(flag, ()) if "layerwise" in key), flag))
    if flag == "use_badam":
        _badam(flat, kind)


def _option(flat: Flat, key: str) -> Any:
    if not key.endswith("_target"):
        return flat.get(key)
    names = flat.names(key)
    return "all-linear" if names == ["all"] else names


def _badam(flat: Flat, kind: str) -> None:
    if kind == "badam" and flat.get("badam_switch_interval") == -1:
        flat.put("optim.order", "fixed", "badam_switch_interval")
        flat.drop("optim.switch_every")
    elif kind == "badam":
        flat.note(
            "use_badam: each block has badam_switch_interval steps here; there the first has one less, "
            "and norms are decayed"
        )
    if flat.flag("bf16"):  # parameters are not cast up there: the active block has a float32 copy
        flat.put("model.dtype", "bfloat16", "bf16")


def read_schedule(flat: Flat) -> None:
    flat.put("optim.schedule", flat.get("lr_scheduler_type"), "lr_scheduler_type")
    options = flat.get("lr_scheduler_kwargs") or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError:
            options = None
    if not isinstance(options, dict):
        flat.problem("lr_scheduler_kwargs", "expected a mapping of keys, or one as JSON text")
        options = {}
    keys = ["lr_scheduler_kwargs"]
    if flat.get("lr_scheduler_type") == "warmup_stable_decay":
        options = {**_stable_and_decay(flat, options), **options}
        keys.append("lr_scheduler_type")
    flat.put("optim.schedule_options", options, *keys)
    warm = flat.number("warmup_ratio" if flat.given("warmup_ratio") else "warmup_steps")
    kind = flat.native.tree["optim"].get("type")
    if kind == "schedule_free" and warm and flat.get("lr_scheduler_type") == "constant":
        # There the optimizer itself warms up; here its schedule does.
        flat.put("optim.schedule", "constant_with_warmup", "lr_scheduler_type")


def _stable_and_decay(flat: Flat, options: dict[str, Any]) -> dict[str, int]:
    """That tool's shares of the steps after the warm-up: a third stays at the peak, the rest decays."""
    given = {"num_stable_steps", "num_decay_steps"} & set(options)
    steps = flat.number("max_steps")
    if len(given) == 2 or (steps <= 0 and not given):  # Luthier's own shares are the same
        return {}
    if steps <= 0:
        flat.problem(
            "lr_scheduler_kwargs",
            "give both num_stable_steps and num_decay_steps, or max_steps "
            "(there they are a third and two thirds of the steps after the warm-up)",
        )
        return {}
    warmup = flat.number("warmup_ratio" if flat.given("warmup_ratio") else "warmup_steps")
    after = int(steps) - (int(warmup) if warmup >= 1 else math.ceil(steps * warmup))
    return {"num_stable_steps": after // 3, "num_decay_steps": after - after // 3}
