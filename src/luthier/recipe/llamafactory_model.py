"""The model and the method of a LLaMA-Factory file: weights, vocabulary, arithmetic, adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.recipe.flat import Flat
from luthier.recipe.problems import found
from luthier.recipe.source import read_file
from luthier.types import RecipeError

_ATTENTION = {"auto": "auto", "disabled": "sdpa", "sdpa": "sdpa", "fa2": "auto", "fa3": "auto"}
_ROPE = ("linear", "dynamic", "yarn", "llama3")
_TOKENS = ("it names new tokens and what each means", "expected a mapping from new tokens to what each means")
_NEW_ROWS = ("noise_init", "desc_init", "desc_init_w_noise")


def _attention(flat: Flat) -> None:
    value = flat.get("flash_attn")
    if isinstance(value, bool):  # early versions had a flag
        value = "fa2" if value else "auto"
    flash = flat.chosen("flash_attn", value, tuple(_ATTENTION))
    flat.put("model.attention", _ATTENTION.get(flash), "flash_attn")
    if flash in ("fa2", "fa3"):
        flat.note(f"flash_attn: {flash}: the variable-length kernel where the GPU has it, sdpa elsewhere")
    elif flash == "disabled":
        flat.note("flash_attn: disabled: sdpa computes the same attention")
    if flat.given("rope_scaling"):
        flat.put("model.rope_scaling", {"type": flat.choice("rope_scaling", _ROPE)}, "rope_scaling")


def _checkpointing(flat: Flat) -> None:
    """Memory for activations. None of it changes a result: the tests compare bits."""
    disable, reentrant, offload = "disable_gradient_checkpointing", "use_reentrant_gc", "use_unsloth_gc"
    asked = flat.flag("gradient_checkpointing")
    if flat.flag(disable):
        flat.put("model.gradient_checkpointing", False, disable)
        for key in (reentrant, offload, "gradient_checkpointing_kwargs"):
            if flat.changed(key):
                flat.note(f"{flat.written(key)}: no effect with {disable}: true")
        return
    if flat.flag(offload):
        flat.put("model.activation_offload", True, offload)
        flat.note(
            f"{offload}: the inputs of checkpointed layers wait in host memory; that tool's kernels are not used"
        )
    older = _older_way(flat) if flat.given("gradient_checkpointing_kwargs") else None
    if older is None and flat.given(reentrant) and not flat.flag(offload):
        older = flat.flag(reentrant)
    if older:
        key = reentrant if flat.given(reentrant) else "gradient_checkpointing_kwargs"
        flat.put("model.gradient_checkpointing", {"reentrant": True}, key)
    elif flat.given(disable) or asked:
        flat.put("model.gradient_checkpointing", True, disable, "gradient_checkpointing")
    else:
        # On there by default: on a GPU the run must fit where it fitted there, on a CPU it would only be slower.
        flat.put("model.gradient_checkpointing", "auto")


def _older_way(flat: Flat) -> bool | None:
    """What `gradient_checkpointing_kwargs` says of torch's two ways; None where it says nothing."""
    key = "gradient_checkpointing_kwargs"
    given = flat.get(key)
    if not isinstance(given, dict) or not isinstance(given.get("use_reentrant", False), bool):
        flat.problem(
            key, f"expected {{use_reentrant: true}} or {{use_reentrant: false}}, found {found(given)}"
        )
        return None
    others = sorted(given.keys() - {"use_reentrant"})
    if others:
        flat.problem(
            key, f"{others[0]} is not chosen here: what is drawn at random is drawn again; remove it"
        )
    return given.get("use_reentrant")


def _vocabulary(flat: Flat) -> None:
    """New tokens. Their rows start as that tool starts them: a mean, and noise of 1 / sqrt(hidden size)."""
    descriptions = _described_tokens(flat)
    special = [*descriptions] or flat.names("add_special_tokens")
    if descriptions and flat.given("add_special_tokens"):
        flat.note("add_special_tokens: new_special_tokens_config names the tokens; this list is not used")
    how = flat.choice("init_special_tokens", _NEW_ROWS)
    if how != "noise_init" and not flat.given("new_special_tokens_config"):
        flat.note(f"init_special_tokens: {how}: without new_special_tokens_config it is noise_init")
        how = "noise_init"
    added: dict[str, tuple[Any, str]] = {
        "add": (flat.names("add_tokens"), "add_tokens"),
        "add_special": (special, "new_special_tokens_config" if descriptions else "add_special_tokens"),
        "resize": (flat.flag("resize_vocab"), "resize_vocab"),
    }
    if not any(value for value, _ in added.values()):
        return
    if how != "noise_init":
        added["descriptions"] = descriptions, "new_special_tokens_config"
        added["noise"] = (0.0 if how == "desc_init" else 1.0), "init_special_tokens"
    for name, (value, key) in added.items():
        if value or name == "noise":
            flat.put(f"model.vocabulary.{name}", value, key)
    if flat.get("finetuning_type") == "lora" and not flat.given("additional_target"):
        flat.note(
            "new tokens: their rows alone train here; there the whole embeddings and head do "
            "(method.modules_to_save trains all of them)"
        )


def _described_tokens(flat: Flat) -> dict[str, str]:
    """The file of new special tokens: each with the words that say what it means."""
    key = "new_special_tokens_config"
    name = flat.get(key)
    if name is None:
        return {}
    if not isinstance(name, str):
        flat.problem(key, f"expected the path of a YAML file, found {found(name)}")
        return {}
    beside = flat.source.path.parent / name if flat.source.path is not None else Path(name)
    try:
        tree = read_file(Path(name) if Path(name).exists() else beside, name, _TOKENS).tree
    except RecipeError as error:
        flat.problem(key, str(error))
        return {}
    wrong = next((token for token, words in tree.items() if not isinstance(words, str)), None)
    if wrong is not None:
        flat.problem(key, f"{name}: {wrong}: expected a description, found {found(tree[wrong])}")
    return tree


_QUANTIZATION_KEYS = ("quantization_method", "quantization_type", "double_quantization")


def _quantization(flat: Flat) -> None:
    if not flat.given("quantization_bit"):
        if not (flat.given("ref_model_quantization_bit") or flat.given("reward_model_quantization_bit")):
            for key in _QUANTIZATION_KEYS:
                if flat.changed(key):
                    flat.note(f"{flat.written(key)}: no effect without quantization_bit")
        return
    chosen = quantized(flat, "quantization_bit")
    if chosen is not None:
        flat.put("model.quantization", chosen, "quantization_bit")


def quantized(flat: Flat, key: str) -> dict[str, Any] | None:
    """`model.quantization` of so many bits as `key` says, by the method that the file names; None with a problem."""
    method, bits = flat.choice("quantization_method", ("bnb", "hqq", "eetq")), flat.get(key)
    if method == "eetq":
        flat.problem(
            "quantization_method",
            "EETQ's kernels exist for CUDA alone and no library of the tested set has them; write bnb with 8 bits",
        )
        return None
    possible = (4, 8) if method == "bnb" else (1, 2, 3, 4, 5, 6, 8)
    if bits not in possible or isinstance(bits, bool):
        flat.problem(key, f"{found(bits)}: {method} has {', '.join(map(str, possible))} bits")
        return None
    if method == "hqq":
        chosen: dict[str, Any] = {"type": "hqq", "bits": bits, "axis": 0}
    else:
        chosen = {"type": "bitsandbytes", "bits": bits}
    if method == "bnb" and bits == 4:
        kind = flat.choice("quantization_type", ("nf4", "fp4"))
        return chosen | {"quant_type": kind, "double": flat.flag("double_quantization")}
    for other in _QUANTIZATION_KEYS[1:]:
        if flat.changed(other):
            flat.note(f"{flat.written(other)}: no effect with {method} of {bits} bits")
    return chosen


_PRECISION = ("bf16", "pure_bf16", "fp16")
_PURE = "weights that train are bfloat16; autocast is on here, which keeps such sums as softmax in float32"
_EVAL_PRECISION = ("bf16_full_eval", "fp16_full_eval")


def _precision(flat: Flat) -> None:
    bf16, fp16, pure = flat.flag("bf16"), flat.flag("fp16"), flat.flag("pure_bf16")
    if (bf16 or pure) and fp16:
        flat.problem("fp16", "bf16 and fp16 exclude each other; keep one")
    if pure:
        flat.put("model.dtype", "bfloat16", "pure_bf16")
        if not bf16:
            flat.note(f"pure_bf16: {_PURE}")
    if bf16 or pure or fp16:
        flat.put(
            "train.precision", "fp16" if fp16 else "bf16", *(key for key in _PRECISION if flat.flag(key))
        )
    elif flat.get("finetuning_type") == "lora":
        flat.note("neither bf16 nor fp16: the base trains in bf16 on a GPU that has it, else in float32")
    else:
        flat.put("train.precision", "fp32")
    asked = [key for key in _EVAL_PRECISION if flat.flag(key)]
    if len(asked) == 2:
        flat.problem("fp16_full_eval", "bf16_full_eval and fp16_full_eval exclude each other; keep one")
    elif asked:
        flat.put("train.eval_precision", asked[0].partition("_")[0], asked[0])


_METHOD_KEYS: dict[str, dict[str, tuple[str, Callable[[Flat, str], Any]]]] = {
    "full": {},
    "freeze": {
        "freeze_trainable_layers": ("method.layers", lambda flat, key: flat.get(key)),
        "freeze_trainable_modules": ("method.modules", lambda flat, key: flat.names(key)),
        "freeze_extra_modules": ("method.extra_modules", lambda flat, key: flat.names(key)),
    },
    "lora": {
        "lora_rank": ("method.rank", lambda flat, key: flat.get(key)),
        "lora_alpha": ("method.alpha", lambda flat, key: flat.get(key) or None),  # 0 means absent there
        "lora_dropout": ("method.dropout", lambda flat, key: flat.get(key)),
        "lora_target": ("method.targets", lambda flat, key: _targets(flat.names(key))),
        "additional_target": ("method.modules_to_save", lambda flat, key: flat.names(key)),
        "adapter_name_or_path": ("method.adapters", lambda flat, key: flat.names(key)),
        "create_new_adapter": ("method.create_new_adapter", lambda flat, key: flat.flag(key)),
        "loraplus_lr_ratio": ("method.lora_plus_ratio", lambda flat, key: flat.get(key)),
    },
    "oft": {
        "oft_rank": ("method.blocks", lambda flat, key: flat.get(key)),
        "oft_block_size": ("method.block_size", lambda flat, key: flat.get(key)),
        "lora_target": (
            "method.targets",
            lambda flat, key: _targets(flat.names(key)),
        ),  # not oft_target there
        "module_dropout": ("method.dropout", lambda flat, key: flat.get(key)),
        "additional_target": ("method.modules_to_save", lambda flat, key: flat.names(key)),
        "adapter_name_or_path": ("method.adapters", lambda flat, key: flat.names(key)),
        "create_new_adapter": ("method.create_new_adapter", lambda flat, key: flat.flag(key)),
    },
}
"""What each type reads; a key that the chosen one does not read is noted, unless another of the same name is its."""


def _targets(names: list[str]) -> str | list[str]:
    return "all-linear" if names == ["all"] else names


def _method(flat: Flat) -> None:
    kind = flat.get("finetuning_type")
    if kind in ("p_tuning", "p-tuning"):
        flat.problem("finetuning_type", "P-tuning is not part of Luthier; write lora, oft, freeze or full")
        return
    flat.put("method.type", flat.choice("finetuning_type", tuple(sorted(_METHOD_KEYS))), "finetuning_type")
    for owner, keys in _METHOD_KEYS.items():
        for key, (target, convert) in keys.items():
            if owner == kind:
                flat.put(target, convert(flat, key), key)
            elif key == "adapter_name_or_path" and flat.given(key) and kind in ("full", "freeze"):
                flat.problem(key, _not_an_adapter(flat))
            elif flat.changed(key) and key not in _METHOD_KEYS.get(kind, {}):
                flat.note(f"{flat.written(key)}: no effect with finetuning_type: {kind}")
    _low_rank(flat)
    _rotated(flat)
    _expanded(flat)
    _continued(flat)


def _low_rank(flat: Flat) -> None:
    """What of LoRA goes by flags there."""
    kind, continued = flat.get("finetuning_type"), _continues(flat)
    for key, target, value in (
        ("use_rslora", "method.rslora", True),
        ("use_dora", "method.dora", True),
        ("pissa_init", "method.init", "pissa"),
    ):
        if not flat.flag(key):
            continue
        if kind != "lora":
            flat.note(f"{key}: no effect with finetuning_type: {kind}")
        elif continued:
            flat.note(f"{key}: no effect on an adapter that is continued, as there")
        else:
            flat.put(target, value, key)
            _start(flat, key)
    if not flat.flag("pissa_init"):
        for key in ("pissa_iter", "pissa_convert"):
            if flat.changed(key):
                flat.note(f"{key}: no effect without pissa_init")
    if flat.given("loraplus_lr_ratio") and kind == "lora":
        flat.put("method.lora_plus_embedding_lr", flat.get("loraplus_lr_embedding"), "loraplus_lr_embedding")
    elif flat.changed("loraplus_lr_embedding"):
        flat.note("loraplus_lr_embedding: no effect without loraplus_lr_ratio")


def _start(flat: Flat, key: str) -> None:
    if key != "pissa_init":
        return
    iterations = flat.number("pissa_iter")
    if iterations != -1:  # -1 is the exact one there
        flat.put("method.init_iterations", iterations, "pissa_iter")
    flat.note(
        "pissa_init: the base is not changed here, and what is saved is a plain LoRA of twice the rank for it, as with "
        "pissa_convert: true"
    )


def _rotated(flat: Flat) -> None:
    """OFT goes on `lora_target` in 0.9.5, whatever `oft_target` says."""
    kind = flat.get("finetuning_type")
    if kind != "oft":
        if flat.changed("oft_target"):
            flat.note(f"oft_target: no effect with finetuning_type: {kind}")
        return
    if flat.changed("oft_target"):
        flat.put("method.targets", _targets(flat.names("oft_target")), "oft_target")
        flat.note("oft_target: OFT goes on the layers that it names; there it goes on those of lora_target")
    if flat.get("oft_rank") and not flat.given("oft_block_size"):
        flat.put("method.block_size", 0, "oft_rank")


def _expanded(flat: Flat) -> None:
    """Block expansion: there a script expands the model, and the run trains the blocks of an expanded one."""
    kind = flat.get("finetuning_type")
    if not flat.flag("use_llama_pro"):
        return
    if kind != "freeze":
        flat.problem(
            "use_llama_pro",
            "goes with finetuning_type: freeze; LoRA on new blocks alone is method.layers of a recipe",
        )
        return
    flat.put("method.type", "llama_pro", "use_llama_pro")
    flat.put("method.expand", False, "use_llama_pro")
    flat.put("method.blocks", flat.get("freeze_trainable_layers"), "freeze_trainable_layers")
    flat.drop("method.layers")
    flat.note(
        "use_llama_pro: the model was expanded before, as there; method.expand: true in a recipe expands it"
    )


def _continues(flat: Flat) -> bool:
    return flat.given("adapter_name_or_path") and not flat.flag("create_new_adapter")


def _not_an_adapter(flat: Flat) -> str:
    if "checkpoint_dir" in flat.older:
        return "a whole model goes into model_name_or_path, an adapter with finetuning_type: lora"
    return "an adapter goes with finetuning_type: lora"


def _continued(flat: Flat) -> None:
    """An early version's word for the opposite of `create_new_adapter`."""
    early, key = "resume_lora_training", "create_new_adapter"
    if not flat.given(early) or flat.get("finetuning_type") != "lora":
        return
    if flat.given(key) and flat.flag(key) == flat.flag(early):
        flat.problem(early, f"says the opposite of {key}; keep one")
    flat.put("method.create_new_adapter", not flat.flag(early), early)


def _parts(flat: Flat) -> None:
    """What of a model with images or sounds does not change."""
    flags = {
        "freeze_vision_tower": "tower",
        "freeze_multi_modal_projector": "projector",
        "freeze_language_model": "language",
    }
    frozen = [part for key, part in flags.items() if flat.flag(key)]
    key = "freeze_multi_modal_projector"
    if "projector" not in frozen and flat.get("finetuning_type") == "lora" and _all_layers(flat):
        flat.note(f"{flat.written(key)}: no effect with lora_target: all, which leaves projectors out there")
        frozen.append("projector")
    if set(frozen) != {"tower", "projector"}:
        flat.put("model.frozen_parts", frozen, *(key for key in flags if flat.changed(key)))


def _all_layers(flat: Flat) -> bool:
    return flat.names("lora_target") == ["all"]


MODEL_SUBJECTS = (_attention, _checkpointing, _vocabulary, _quantization, _precision, _method, _parts)
EXPORTED_SUBJECTS = (_vocabulary, _method)
"""What a file that only exports says of its model."""
ANSWERING_SUBJECTS = (_attention, _vocabulary, _quantization, _method)
"""What a file that only answers says of it."""
