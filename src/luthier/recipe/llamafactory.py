"""A LLaMA-Factory file as a native recipe: every key is translated, accepted with a note, or an error.

The file's own defaults are LLaMA-Factory's, so a file that trained there trains the same here. Where that
tool lets packed conversations see each other, Luthier does not, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from luthier.recipe.flat import KEYS, TOOL_DEFAULT, Flat
from luthier.recipe.llamafactory_keys import Rule
from luthier.recipe.problems import nearest, specs, tag
from luthier.recipe.schema import Recipe, Spec
from luthier.recipe.source import Document
from luthier.recipe.training_keys import OLDER_NAMES
from luthier.types import RecipeError

NEXT_STAGES = ("rm", "ppo", "dpo", "kto")
ATTENTION = {"auto": "auto", "disabled": "sdpa", "sdpa": "sdpa", "fa2": "auto", "fa3": "auto"}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "sgd": "sgd",
}


def recognises(tree: dict[str, Any]) -> bool:
    """Whether a file is a LLaMA-Factory one."""
    return "model_name_or_path" in tree


def translate(document: Document) -> Document:
    """The native tree of a flat document. Raises RecipeError, one line for every key that cannot be kept."""
    flat = Flat(document)
    _check_keys(flat)
    for key, rule in KEYS.items():
        if rule.rule is Rule.DIRECT:
            flat.put(rule.target, flat.get(key), key)
        elif rule.rule is Rule.EXTRA and flat.changed(key):
            flat.put(f"train.extra.{key}", flat.get(key), key)
    for part in (_model, _method, _sources, _length, _rows, _optim, _logging, _evaluation, _what_to_do):
        part(flat)
    if flat.problems:
        raise RecipeError("\n".join(flat.problems))
    _forget_our_defaults(flat)
    return flat.native


def _check_keys(flat: Flat) -> None:
    """Unknown and refused keys, and the notes of those that are accepted."""
    for key, value in flat.source.tree.items():
        if key not in KEYS:
            flat.problem(key, _unknown(key))
            continue
        if isinstance(value, str) and "${" in value:
            flat.problem(key, "variables (${...}) are not replaced; write the value itself")
        entry = KEYS[key]
        if flat.changed(key) and entry.rule is Rule.REFUSED:
            flat.problem(key, entry.text)
        elif flat.changed(key) and entry.rule is Rule.NOTED:
            flat.note(f"{key}: {entry.text}")
    if "enable_thinking" in flat.source.tree and flat.source.tree["enable_thinking"] is not True:
        flat.problem("enable_thinking", "training without empty thoughts comes in a later version; remove it")


def _unknown(key: str) -> str:
    if key in Recipe.model_fields:
        return (
            "a section of a native recipe cannot stand in a LLaMA-Factory file; `luthier migrate` writes one"
        )
    near = nearest(key, [*KEYS, *OLDER_NAMES])
    return f"LLaMA-Factory has no such key; did you mean {near}?" if near else "LLaMA-Factory has no such key"


def _forget_our_defaults(flat: Flat) -> None:
    """Where both tools have the same default there is nothing to tell: it is the default."""
    native = flat.native
    for path, place in list(native.places.items()):
        if len(path) != 2 or place.origin != TOOL_DEFAULT or path[1] == "type":
            continue
        section, name = str(path[0]), str(path[1])
        values = native.tree[section]
        default = _our_default(section, values).get(name)
        default = list(default) if isinstance(default, tuple) else default
        if values[name] == default and isinstance(values[name], bool) == isinstance(default, bool):
            flat.drop(f"{section}.{name}")


def _our_default(section: str, values: dict[str, Any]) -> dict[str, Any]:
    info = Recipe.model_fields[section]
    kinds = specs(info.annotation)
    kind: type[Spec] = next((kind for kind in kinds if tag(kind) == values.get("type")), kinds[0])
    return {name: field.default for name, field in kind.model_fields.items()}


# --------------------------------------------------------------------------------------------------
# The subjects


def _model(flat: Flat) -> None:
    flash = flat.choice("flash_attn", tuple(ATTENTION))
    flat.put("model.attention", ATTENTION.get(flash), "flash_attn")
    if flash in ("fa2", "fa3"):
        flat.note(f"flash_attn: {flash}: the variable-length kernel where the GPU has it, sdpa elsewhere")
    elif flash == "disabled":
        flat.note("flash_attn: disabled: sdpa computes the same attention")
    if flat.given("disable_gradient_checkpointing") or flat.flag("gradient_checkpointing"):
        keys = ("disable_gradient_checkpointing", "gradient_checkpointing")
        flat.put("model.gradient_checkpointing", not flat.flag(keys[0]), *keys)
    else:
        # On there by default. It changes no result: on a GPU the run must fit where it fitted there,
        # on a CPU it would only be slower.
        flat.put("model.gradient_checkpointing", "auto")
    bf16, fp16, pure = flat.flag("bf16"), flat.flag("fp16"), flat.flag("pure_bf16")
    if (bf16 or pure) and fp16:
        flat.problem("fp16", "bf16 and fp16 exclude each other; keep one")
    if pure:
        flat.put("model.dtype", "bfloat16", "pure_bf16")
    if bf16 or pure or fp16:
        flat.put(
            "train.precision", "fp16" if fp16 else "bf16", *(key for key in _PRECISION if flat.flag(key))
        )
    elif flat.get("finetuning_type") == "lora":
        flat.note("neither bf16 nor fp16: the base trains in bf16 on a GPU that has it, else in float32")
    else:
        flat.put("train.precision", "fp32")


_PRECISION = ("bf16", "pure_bf16", "fp16")

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
    },
}


def _targets(names: list[str]) -> str | list[str]:
    return "all-linear" if names == ["all"] else names


def _method(flat: Flat) -> None:
    stage, kind = flat.get("stage"), flat.get("finetuning_type")
    if stage in NEXT_STAGES:
        flat.problem("stage", f"{stage} comes in a later version; this one has pt and sft")
    else:
        flat.put("stage.type", flat.choice("stage", ("pt", "sft")), "stage")
    if kind == "oft":
        flat.problem("finetuning_type", "oft comes in a later version; this one has lora, freeze and full")
        return
    flat.put("method.type", flat.choice("finetuning_type", tuple(sorted(_METHOD_KEYS))), "finetuning_type")
    for owner, keys in _METHOD_KEYS.items():
        for key, (target, convert) in keys.items():
            if owner == kind:
                flat.put(target, convert(flat, key), key)
            elif key == "adapter_name_or_path" and flat.given(key):
                flat.problem(key, "an adapter goes with finetuning_type: lora")
            elif flat.changed(key):
                flat.note(f"{key}: no effect with finetuning_type: {kind}")


def _sources(flat: Flat) -> None:
    directory = flat.get("dataset_dir")
    online = directory == "ONLINE"
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = flat.names(key)
        flat.put(target, [{"hf_hub_url": name} for name in names] if online else names, key)
    if isinstance(directory, str) and directory.startswith("REMOTE:"):
        flat.problem("dataset_dir", "download that folder and give its path")
    elif not online:
        flat.put("data.directory", directory, "dataset_dir")
    held_out = flat.number("val_size")
    if held_out > 0 and flat.given("eval_dataset"):
        flat.problem("val_size", "val_size and eval_dataset exclude each other; keep one")
    elif held_out > 0 and not flat.given("dataset"):
        flat.problem("val_size", "there is no dataset to hold rows out of")
    elif held_out > 1 or held_out == int(held_out):
        flat.put("data.dev_split", int(held_out), "val_size")
    if not flat.given("preprocessing_num_workers"):
        flat.drop("data.workers")


def _length(flat: Flat) -> None:
    """Length, truncation and packing: exactly the rows that LLaMA-Factory would cut."""
    pt = flat.get("stage") == "pt"
    asked = flat.flag("packing") or flat.flag("neat_packing")
    packing = asked or (pt and not flat.given("packing"))
    cutoff = flat.get("cutoff_len")
    if asked and isinstance(cutoff, int) and not isinstance(cutoff, bool):
        cutoff -= 1  # packing, where a file asks for it, keeps one token of the row for padding there
        flat.note(f"packing: takes one token off cutoff_len there, so rows hold {cutoff} tokens")
    flat.put("data.max_length", cutoff, "cutoff_len")
    flat.put("data.rules", "llamafactory")
    flat.put("data.overflow", "split" if pt and packing else "truncate")
    flat.put("data.max_lost", None)
    flat.put("data.packing", packing, "neat_packing" if flat.flag("neat_packing") else "packing")
    if packing and pt:
        flat.note("packing: documents in a block see each other, as there; a native recipe keeps them apart")
    elif packing and not flat.flag("neat_packing"):
        flat.note("packing: what shares a row does not see each other here (there only with neat_packing)")
    for key in ("neat_packing", "train_on_prompt", "mask_history"):
        if flat.flag(key) and not pt and key == "mask_history" and flat.flag("train_on_prompt"):
            flat.problem(key, "mask_history and train_on_prompt exclude each other; keep one")
        elif flat.flag(key) and pt:
            flat.problem(key, "goes with stage: sft only")


def _rows(flat: Flat) -> None:
    """What becomes a token, in which order."""
    pt = flat.get("stage") == "pt"
    flat.put("data.parse_special_tokens", not flat.flag("split_special_tokens"), "split_special_tokens")
    if not pt:
        flat.put("data.template", flat.get("template"), "template")
        flat.put("data.train_after_stop", True)
    elif flat.get("template") == "llama3":
        flat.put("data.template", "llama3", "template")  # the one that ends documents with a token of its own
    elif flat.given("template"):
        flat.note("template: plain text is trained without a template")
    sampling = flat.choice("train_sampling_strategy", ("random", "sequential", "group_by_length"))
    if sampling == "group_by_length":
        flat.problem("train_sampling_strategy", KEYS["group_by_length"].text)
    shuffle = sampling == "random" and not flat.flag("disable_shuffling")
    keys = ("disable_shuffling", "train_sampling_strategy")
    flat.put("data.shuffle", shuffle, *(key for key in keys if flat.changed(key)), *keys)


def _optim(flat: Flat) -> None:
    name = str(flat.get("optim"))
    if name not in OPTIMIZERS:
        listed = ", ".join(sorted(OPTIMIZERS))
        flat.problem("optim", f"{name} comes in a later version or is no optimizer; this one has {listed}")
        return
    kind = OPTIMIZERS[name]
    flat.put("optim.type", kind, "optim")
    if kind == "adamw":
        betas = [flat.get("adam_beta1"), flat.get("adam_beta2")]
        flat.put("optim.betas", betas, "adam_beta1", "adam_beta2")
        flat.put("optim.eps", flat.get("adam_epsilon"), "adam_epsilon")
    else:
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if flat.changed(key):
                flat.note(f"{key}: no effect with optim: {name}")
    # The ratio wins where a file gives both; a number of steps below 1 is a ratio too.
    flat.put("optim.warmup", flat.get("warmup_ratio") or 0, "warmup_ratio")
    if not flat.given("warmup_ratio"):
        flat.put("optim.warmup", flat.get("warmup_steps"), "warmup_steps")
    options = flat.get("lr_scheduler_kwargs") or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError:
            options = None
    if not isinstance(options, dict):
        flat.problem("lr_scheduler_kwargs", "expected a mapping of keys, or one as JSON text")
        options = {}
    flat.put("optim.schedule_options", options, "lr_scheduler_kwargs")
    needed = {"num_stable_steps", "num_decay_steps"}
    if flat.get("lr_scheduler_type") == "warmup_stable_decay" and not needed <= set(options):
        flat.problem(
            "lr_scheduler_type",
            "give num_stable_steps and num_decay_steps in lr_scheduler_kwargs "
            "(there they are a third and two thirds of the steps after the warm-up)",
        )


def _logging(flat: Flat) -> None:
    if flat.choice("logging_strategy", ("steps", "no", "epoch")) == "steps":
        flat.put("train.log_every", flat.every("logging_steps"), "logging_steps")
    else:
        flat.note(f"logging_strategy: {flat.get('logging_strategy')}: the loss is logged every 10 steps here")
    trackers = flat.names("report_to")
    if "all" in trackers:
        flat.problem("report_to", "name the trackers, for example tensorboard")
    flat.put("train.report_to", [] if trackers == ["none"] else trackers, "report_to")


def _evaluation(flat: Flat) -> None:
    when = flat.choice("eval_strategy", ("no", "steps", "epoch"))
    if when == "steps":
        key = "eval_steps" if flat.given("eval_steps") else "logging_steps"
        flat.put("train.eval_every", flat.every(key), "eval_steps", "eval_strategy")
    else:
        flat.put("train.eval_every", "epoch" if when == "epoch" else None, "eval_strategy")
    flat.put("train.eval_at_end", flat.flag("do_eval") or when != "no", "do_eval", "eval_strategy")
    if (
        (flat.flag("do_eval") or when != "no")
        and not flat.given("eval_dataset")
        and not flat.number("val_size")
    ):
        key = "do_eval" if flat.flag("do_eval") else "eval_strategy"
        flat.problem(key, "there is nothing to evaluate on; give eval_dataset or val_size")
    if flat.flag("load_best_model_at_end") and when == "no":
        flat.problem(
            "load_best_model_at_end", "needs evaluations to choose by; give eval_strategy: steps or epoch"
        )
    metric = flat.get("metric_for_best_model") or "loss"
    metric = metric if str(metric).startswith("eval_") else f"eval_{metric}"
    flat.put("train.best_metric", metric, "metric_for_best_model")
    when = flat.choice("save_strategy", ("no", "steps", "epoch", "best"))
    if when == "best":
        flat.problem("save_strategy", "write save_strategy: steps and load_best_model_at_end: true")
    elif when == "steps":
        flat.put("train.save_every", flat.every("save_steps"), "save_steps", "save_strategy")
    else:
        flat.put("train.save_every", "epoch" if when == "epoch" else None, "save_strategy")


def _what_to_do(flat: Flat) -> None:
    if not flat.flag("do_train") and not flat.flag("do_eval"):
        flat.problem(
            "do_train",
            "neither do_train nor do_eval is true, so this file does not train; add do_train: true",
        )
    if flat.flag("do_train") and not flat.names("dataset"):
        flat.problem("dataset", "is missing; name what to train on")
    flat.put("train.eval_only", not flat.flag("do_train"), "do_train")
    steps = flat.number("max_steps")
    flat.put("train.max_steps", flat.every("max_steps") if steps > 0 else None, "max_steps")
    overwrite, resume = flat.flag("overwrite_output_dir"), flat.get("resume_from_checkpoint")
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if resume is None:
        # That tool goes on from the newest checkpoint of its own accord.
        flat.put("train.resume", "never" if overwrite else "auto", "overwrite_output_dir")
    elif isinstance(resume, bool):
        flat.put("train.resume", "auto" if resume else "never", "resume_from_checkpoint")
    else:
        flat.put("train.resume", resume, "resume_from_checkpoint")
    # To go on with a run is not to overwrite it.
    fresh = flat.native.tree["train"]["resume"] == "never"
    flat.put("train.overwrite", overwrite and fresh, "overwrite_output_dir")
    if flat.native.tree["train"].get("output") is None:
        flat.drop("train.output")
