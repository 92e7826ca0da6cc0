"""The training of a LLaMA-Factory file: logging, evaluation, checkpoints, upload, start and end."""

from __future__ import annotations

from luthier.recipe.flat import Flat
from luthier.recipe.llamafactory_optim import read_optimizer, read_schedule
from luthier.recipe.llamafactory_parallel import read_processes

TRACKERS = (
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
)
"""What transformers can report to."""
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def _arithmetic(flat: Flat) -> None:
    """What changes speed and memory, and NEFTune's noise."""
    alpha = flat.get("neftune_noise_alpha")
    if alpha and flat.get("stage") == "ppo":
        flat.note(f"{flat.written('neftune_noise_alpha')}: no effect with stage: ppo, as there")
    elif alpha:
        flat.put("train.neftune_alpha", alpha, "neftune_noise_alpha")
        key = flat.written("neftune_noise_alpha")
        flat.note(f"{key}: noise is scaled by each sample's own length here, there by the padded row's")
    asked = [key for key in ("torch_compile_backend", "torch_compile_mode") if flat.given(key)]
    if flat.flag("torch_compile") or asked:
        settings = {"backend": flat.get("torch_compile_backend"), "mode": flat.get("torch_compile_mode")}
        if settings["mode"] is not None:
            flat.choice("torch_compile_mode", _COMPILE_MODES)
        settings = {name: value for name, value in settings.items() if value is not None}
        flat.put("train.compile", settings, *asked, "torch_compile")
    if flat.flag("auto_find_batch_size"):
        flat.put("train.fit_memory", True, "auto_find_batch_size")
        flat.note(
            "auto_find_batch_size: where memory is short, passes are halved here; the batch stays as given"
        )


def _logging(flat: Flat) -> None:
    if flat.choice("logging_strategy", ("steps", "no", "epoch")) == "steps":
        flat.put("train.log_every", flat.every("logging_steps"), "logging_steps")
    else:
        flat.note(f"logging_strategy: {flat.get('logging_strategy')}: the loss is logged every 10 steps here")
    trackers = [name for name in flat.names("report_to") if name != "none"]
    if "all" in trackers:
        flat.problem("report_to", "name the trackers, for example tensorboard")
        trackers = []
    for name in trackers:
        flat.chosen("report_to", name, TRACKERS)
    if flat.flag("use_swanlab") and "swanlab" not in trackers:
        trackers.append("swanlab")
    keys = ("use_swanlab", "report_to") if flat.flag("use_swanlab") else ("report_to",)
    flat.put("train.report_to", trackers, *keys)


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
    metric = flat.get("metric_for_best_model") or "loss"
    metric = metric if str(metric).startswith("eval_") else f"eval_{metric}"
    if flat.given("metric_for_best_model"):
        flat.put("train.best_metric", metric, "metric_for_best_model")
    stage = flat.get("stage")
    if stage in ("rm", "dpo", "kto", "ppo"):
        if flat.flag("compute_accuracy"):
            flat.note(f"compute_accuracy: no effect with stage: {stage}")
    elif flat.flag("compute_accuracy"):
        flat.put("train.metrics", ["accuracy"], "compute_accuracy")
    elif metric == "eval_accuracy":
        flat.problem("metric_for_best_model", "accuracy needs compute_accuracy: true")


def _checkpoints(flat: Flat) -> None:
    when = flat.choice("save_strategy", ("no", "steps", "epoch", "best"))
    if when == "best":
        flat.problem("save_strategy", "write save_strategy: steps and load_best_model_at_end: true")
    elif when == "steps":
        flat.put("train.save_every", flat.every("save_steps"), "save_steps", "save_strategy")
    else:
        flat.put("train.save_every", "epoch" if when == "epoch" else None, "save_strategy")
    evaluated, best = str(flat.get("eval_strategy")), flat.flag("load_best_model_at_end")
    if best and evaluated in ("no", "False"):
        flat.problem(
            "load_best_model_at_end", "needs evaluations to choose by; give eval_strategy: steps or epoch"
        )
    elif best and when in ("no", "steps", "epoch"):
        _saved_when_evaluated(flat, when, evaluated)
    if flat.given("early_stopping_steps"):
        if not best:
            flat.problem(
                "early_stopping_steps", "needs load_best_model_at_end: true, whose metric it watches"
            )
        flat.put(
            "train.early_stopping", {"patience": flat.get("early_stopping_steps")}, "early_stopping_steps"
        )


def _saved_when_evaluated(flat: Flat, saved: str, evaluated: str) -> None:
    """The best model must have been saved when it was found to be the best."""
    if saved != evaluated:
        key = "save_strategy" if flat.given("save_strategy") else "load_best_model_at_end"
        flat.problem(
            key, f"with load_best_model_at_end give save_strategy: {evaluated}, as eval_strategy has it"
        )
    elif saved == "steps":
        every = flat.every("eval_steps" if flat.given("eval_steps") else "logging_steps")
        if every > 0 and flat.every("save_steps") % every:
            key = "save_steps" if flat.given("save_steps") else "load_best_model_at_end"
            flat.problem(
                key, f"with load_best_model_at_end give save_steps as a multiple of eval_steps ({every})"
            )


def _upload(flat: Flat) -> None:
    """The finished model on the hub. Public unless the file says otherwise, as there."""
    if not flat.flag("push_to_hub"):
        return
    repo, owner = flat.get("hub_model_id"), flat.get("push_to_hub_organization")
    if isinstance(repo, str) and isinstance(owner, str) and "/" not in repo:
        repo = f"{owner}/{repo}"
    if not isinstance(repo, str) or "/" not in repo:
        flat.problem(
            "hub_model_id" if flat.given("hub_model_id") else "push_to_hub", "give hub_model_id: OWNER/NAME"
        )
    settings = {"repo": repo, "private": flat.flag("hub_private_repo")}
    if flat.given("hub_revision"):
        settings["revision"] = flat.get("hub_revision")
    flat.put("train.push_to_hub", settings, "hub_model_id", "push_to_hub")
    if not flat.given("hub_private_repo"):
        flat.note("push_to_hub: the repository is public, as there; hub_private_repo: true makes it private")
    when = flat.choice("hub_strategy", ("end", "every_save", "checkpoint", "all_checkpoints"))
    if when in ("checkpoint", "all_checkpoints"):
        flat.problem("hub_strategy", "checkpoints are not uploaded; write hub_strategy: end")
    elif when == "every_save":
        flat.note("push_to_hub: the finished model is uploaded once, not at every checkpoint")
    token = flat.get("hub_token")
    if token is not None and flat.get("hf_hub_token") not in (None, token):
        flat.problem("hub_token", "one token serves loading and uploading here; give hf_hub_token alone")
    elif token is not None:
        flat.put("model.token", token, "hub_token")


def _what_to_do(flat: Flat) -> None:
    if not flat.flag("do_train") and not flat.flag("do_eval"):
        flat.problem(
            "do_train",
            "neither do_train nor do_eval is true, so this file does not train; add do_train: true",
        )
    if flat.flag("do_train") and flat.get("dataset") in (None, "", []):
        flat.problem("dataset", "is missing; name what to train on")
    flat.put("train.eval_only", not flat.flag("do_train"), "do_train")
    steps = flat.number("max_steps")
    flat.put(
        "train.max_steps", (int(steps) if steps == int(steps) else steps) if steps > 0 else None, "max_steps"
    )
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


TRAIN_SUBJECTS = (
    read_optimizer,
    read_schedule,
    _arithmetic,
    _logging,
    _evaluation,
    _checkpoints,
    _upload,
    read_processes,
    _what_to_do,
)
