"""LLaMA-Factory files: every key of 0.9.5 is known, and the translated recipe means what the file meant."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.earlier_keys import EARLY_MARKS, OLDER_NAMES
from luthier.recipe.key_rules import Rule
from luthier.recipe.known_keys import GROUPS, KEYS, known_key
from luthier.recipe.llamafactory import EARLY_DEFAULTS
from luthier.recipe.llamafactory_train import TRACKERS
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.problems import all_keys
from luthier.recipe.schema import (
    AdamwSpec,
    CheckpointingSpec,
    DatasetSpec,
    FreezeSpec,
    FullSpec,
    LoraSpec,
    PtSpec,
    SftSpec,
    SgdSpec,
)
from luthier.recipe.source import dotted
from luthier.types import RecipeError

DATA = Path(__file__).parent / "data"
BASE = "model_name_or_path: m\ndo_train: true\ndataset: a\n"


def table(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (DATA / name).read_text().splitlines() if not line.startswith("#")]


def facts() -> dict[str, Any]:
    """Names and defaults of 0.9.5."""
    return {name: ast.literal_eval(default) for _, name, default in table("llamafactory_0_9_5_keys.txt")}


def others() -> dict[str, Any]:
    """Names and last defaults of what other versions had."""
    return {name: ast.literal_eval(default) for _, name, default, _ in table("other_versions_keys.txt")}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> LoadedRecipe:
    Path("lf.yaml").write_text(BASE + text)
    return load_recipe("lf.yaml", overrides)


def problems(text: str, *overrides: str, base: str = BASE) -> list[str]:
    Path("lf.yaml").write_text(base + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("lf.yaml", overrides)
    return str(caught.value).split("\n")


# --------------------------------------------------------------------------------------------------
# The table


def test_every_key_of_that_version_is_known_with_its_default() -> None:
    known = {name: KEYS[name].default for name in facts() if name in KEYS}
    assert known == facts()
    assert len(known) == 357


def test_every_key_of_other_versions_is_known() -> None:
    assert len(others()) > 90
    assert [name for name in others() if known_key(name) is None] == []


MEGATRON = {
    "apply_rope_fusion", "bias_activation_fusion", "context_parallel_size", "expert_model_parallel_size",
    "moe_grouped_gemm", "moe_token_dispatcher_type", "overlap_grad_reduce", "overlap_param_gather",
    "pipeline_model_parallel_size", "recompute_granularity", "sequence_parallel", "tensor_model_parallel_size",
    "use_distributed_optimizer", "virtual_pipeline_model_parallel_size",
}  # fmt: skip
"""Of a plug-in that LLaMA-Factory can train with."""


def test_the_table_holds_nothing_else() -> None:
    assert set(KEYS) | set(OLDER_NAMES) == set(facts()) | set(others()) | MEGATRON
    assert sum(len(group) for group in GROUPS.values()) == len(KEYS)
    assert not set(OLDER_NAMES) & set(KEYS)
    assert set(OLDER_NAMES.values()) <= set(facts())
    assert set(EARLY_MARKS) <= set(others())


def test_todays_transformers_has_no_key_that_is_not_known() -> None:
    transformers = pytest.importorskip("transformers")
    fields = transformers.Seq2SeqTrainingArguments.__dataclass_fields__.values()
    assert [field.name for field in fields if field.init and known_key(field.name) is None] == []


def test_every_entry_says_what_becomes_of_its_key() -> None:
    native = {dotted(path) for path in all_keys()}
    for name, key in KEYS.items():
        assert key.text or key.rule not in (Rule.NOTED, Rule.REFUSED), name
        assert not key.text or key.rule not in (Rule.SILENT, Rule.DIRECT, Rule.EXTRA), name
        assert "\n" not in key.text and not key.text.endswith("."), name
        assert bool(key.target) == (key.rule in (Rule.READ, Rule.DIRECT)), name
        assert not key.target or key.target in native, name
        assert not key.only_with or KEYS[key.only_with].default is False, name


def test_trackers_are_those_that_transformers_knows() -> None:
    utils = pytest.importorskip("transformers.integrations.integration_utils")
    assert set(TRACKERS) == set(utils.INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("name", sorted(set(KEYS) - {"model_name_or_path", "dataset", "do_train"}))
def test_a_default_that_is_written_out_changes_nothing(name: str) -> None:
    """Also the proof that every key is accepted: none is refused while it says what silence says."""
    silent = load_recipe({"model_name_or_path": "m", "do_train": True, "dataset": "a"})
    spoken = load_recipe(
        {"model_name_or_path": "m", "do_train": True, "dataset": "a", name: KEYS[name].default}
    )
    if name == "disable_gradient_checkpointing":  # said outright, it is no longer left to the hardware
        assert spoken.recipe.model.gradient_checkpointing is True
    elif name == "use_reentrant_gc":
        assert spoken.recipe.model.gradient_checkpointing == CheckpointingSpec(reentrant=True)
    else:
        assert spoken.recipe == silent.recipe
    early = (f"{name}: {EARLY_DEFAULTS}",) if name in EARLY_MARKS else ()
    assert spoken.notes == early + silent.notes


def test_every_refused_key_is_an_error_that_names_it() -> None:
    other = {False: True, True: False, None: "x"}
    refused = [name for name, key in KEYS.items() if key.rule is Rule.REFUSED]
    assert len(refused) > 70
    for name in refused:
        default = KEYS[name].default
        value = other[default] if default is None or isinstance(default, bool) else 7
        tree = {"model_name_or_path": "m", "do_train": True, "dataset": "a", name: value}
        if KEYS[name].only_with:
            load_recipe(tree)
            tree[KEYS[name].only_with] = True
        with pytest.raises(RecipeError) as caught:
            load_recipe(tree)
        assert str(caught.value) == f"{name}: {KEYS[name].text}"


def test_every_noted_key_gives_its_note() -> None:
    for name, key in KEYS.items():
        if key.rule is Rule.NOTED:
            loaded = load_recipe({"model_name_or_path": "m", "do_train": True, "dataset": "a", name: 77})
            assert f"{name}: {key.text}" in loaded.notes


def test_every_extra_key_reaches_transformers_under_its_own_name() -> None:
    extra = [name for name, key in KEYS.items() if key.rule is Rule.EXTRA]
    loaded = load("".join(f"{name}: 7\n" for name in extra))
    assert loaded.recipe.train.extra == dict.fromkeys(extra, 7)
    transformers = pytest.importorskip("transformers")
    known = transformers.Seq2SeqTrainingArguments.__dataclass_fields__
    assert [name for name in extra if name not in known] == []


# --------------------------------------------------------------------------------------------------
# Meaning


def test_a_silent_file_trains_with_that_tools_defaults() -> None:
    loaded = load("")
    recipe = loaded.recipe
    assert loaded.llamafactory
    assert recipe.model.path == "m"
    assert recipe.data.train == ("a",)
    assert recipe.stage == SftSpec()
    assert recipe.method == LoraSpec(rank=8, targets="all-linear")
    assert recipe.optim == AdamwSpec(lr=5e-5, schedule="linear", weight_decay=0.0, max_grad_norm=1.0)
    assert (recipe.data.max_length, recipe.data.overflow, recipe.data.max_lost) == (2048, "truncate", None)
    assert recipe.data.parse_special_tokens
    assert recipe.data.train_after_stop
    assert recipe.data.shuffle
    assert recipe.data.rules == "llamafactory"
    assert not recipe.data.packing
    train = recipe.train
    assert (train.rows_per_device, train.accumulation, train.tokens_per_batch) == (8, 1, None)
    assert (train.epochs, train.max_steps, train.seed, train.data_seed) == (3.0, None, 42, None)
    assert (train.log_every, train.save_every, train.eval_every, train.eval_at_end) == (500, 500, None, False)
    assert (train.plots, train.report_to, train.output) == (False, (), "runs/lf")
    assert (train.resume, train.overwrite) == ("auto", False)
    assert recipe.model.gradient_checkpointing == "auto"


def test_a_common_file_line_by_line() -> None:
    loaded = load(
        "stage: sft\nfinetuning_type: lora\nlora_rank: 16\nlora_target: q_proj, v_proj\ntemplate: qwen\n"
        "cutoff_len: 1024\nmax_samples: 500\noverwrite_cache: true\npreprocessing_num_workers: 4\n"
        "dataloader_num_workers: 4\noutput_dir: saves/x\nlogging_steps: 10\nsave_steps: 50\nplot_loss: true\n"
        "overwrite_output_dir: true\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 4\n"
        "learning_rate: 1e-4\nnum_train_epochs: 2\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\n"
        "ddp_timeout: 180000000\nval_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\n"
        "eval_steps: 25\nreport_to: none\nresume_from_checkpoint: null\n"
    )
    recipe, origins = loaded.recipe, loaded.origins
    assert recipe.method == LoraSpec(rank=16, targets=("q_proj", "v_proj"))
    assert recipe.optim == AdamwSpec(lr=1e-4, schedule="cosine", warmup=0.1)
    assert (recipe.data.template, recipe.data.max_length, recipe.data.max_samples) == ("qwen", 1024, 500)
    assert (recipe.data.workers, recipe.data.dev_split) == (4, 0.1)
    train = recipe.train
    assert (train.output, train.overwrite, train.resume) == ("saves/x", True, "never")
    assert (train.rows_per_device, train.accumulation, train.epochs) == (2, 4, 2.0)
    assert (train.log_every, train.save_every, train.eval_every, train.eval_at_end) == (10, 50, 25, True)
    assert (train.precision, train.plots, train.extra) == ("bf16", True, {})
    assert loaded.notes == ()
    assert origins["method.rank"] == "translated from lora_rank (line 6)"
    assert origins["optim.warmup"] == "translated from warmup_ratio (line 24)"
    assert origins["data.max_lost"] == "LLaMA-Factory default"
    assert origins["optim.weight_decay"] == "default"


def test_migrated_recipe_is_the_same_recipe() -> None:
    loaded = load("stage: pt\nlearning_rate: 1e-6\nlr_scheduler_kwargs: {num_cycles: 2}\noptim: sgd\n")
    Path("native.yaml").write_text(dump_recipe(loaded, everything=False))
    again = load_recipe("native.yaml")
    assert not again.llamafactory
    # The run directory is named after the file unless the file names it.
    train = again.recipe.train.model_copy(update={"output": loaded.recipe.train.output})
    assert again.recipe.model_copy(update={"train": train}) == loaded.recipe


def test_methods() -> None:
    assert load("finetuning_type: full\n").recipe.method == FullSpec()
    assert load(
        "finetuning_type: freeze\nfreeze_trainable_layers: -3\nfreeze_trainable_modules: mlp,self_attn\n"
        "freeze_extra_modules: norm\n"
    ).recipe.method == FreezeSpec(layers=-3, modules=("mlp", "self_attn"), extra_modules=("norm",))
    assert load(
        "lora_alpha: 0\nlora_dropout: 0.1\nadditional_target: embed_tokens,lm_head\n"
        "adapter_name_or_path: x, y\ncreate_new_adapter: true\n"
    ).recipe.method == LoraSpec(
        alpha=None,
        dropout=0.1,
        modules_to_save=("embed_tokens", "lm_head"),
        adapters=("x", "y"),
        create_new_adapter=True,
    )
    assert (
        "lora_rank: no effect with finetuning_type: full"
        in load("finetuning_type: full\nlora_rank: 4\n").notes
    )


def test_packing_keeps_the_rows_and_always_isolates() -> None:
    leak = "packing: what shares a row does not see each other here (there only with neat_packing)"
    shorter = "packing: takes one token off cutoff_len there, so rows hold 255 tokens"
    plain = load("cutoff_len: 256\npacking: true\nbf16: true\n")
    assert (plain.recipe.data.packing, plain.recipe.data.max_length) == (True, 255)
    assert plain.notes == (shorter, leak)
    neat = load("cutoff_len: 256\nneat_packing: true\nbf16: true\n")
    assert (neat.recipe.data.packing, neat.recipe.data.max_length) == (True, 255)
    assert neat.notes == (shorter,)


def test_pretraining_packs_by_default_into_rows_of_the_whole_length() -> None:
    loaded = load("stage: pt\ncutoff_len: 256\ntemplate: default\n")
    data = loaded.recipe.data
    assert loaded.recipe.stage == PtSpec()
    assert (data.packing, data.max_length, data.overflow, data.template) == (True, 256, "split", None)
    assert "template: plain text is trained without a template" in loaded.notes
    assert (
        "packing: documents in a block see each other, as there; a native recipe keeps them apart"
        in loaded.notes
    )
    assert load("stage: pt\ntemplate: llama3\n").recipe.data.template == "llama3"
    data = load("stage: pt\ncutoff_len: 256\npacking: false\n").recipe.data
    assert (data.packing, data.max_length, data.overflow) == (False, 256, "truncate")
    data = load("stage: pt\ncutoff_len: 256\npacking: true\n").recipe.data
    assert (data.packing, data.max_length, data.overflow) == (True, 255, "split")


@pytest.mark.parametrize(
    ("text", "warmup"),
    [
        ("", 0.0),
        ("warmup_steps: 20\n", 20.0),
        ("warmup_steps: 0.05\n", 0.05),
        ("warmup_ratio: 0.1\nwarmup_steps: 20\n", 0.1),
        ("warmup_ratio: 0\nwarmup_steps: 20\n", 0.0),
    ],
)
def test_warmup(text: str, warmup: float) -> None:
    assert load(text).recipe.optim.warmup == warmup


@pytest.mark.parametrize(
    ("text", "resume", "overwrite"),
    [
        ("", "auto", False),
        ("overwrite_output_dir: true\n", "never", True),
        ("resume_from_checkpoint: true\noverwrite_output_dir: true\n", "auto", False),
        ("resume_from_checkpoint: false\n", "never", False),
        ("resume_from_checkpoint: out/checkpoint-5\n", "out/checkpoint-5", False),
    ],
)
def test_resuming(text: str, resume: str, overwrite: bool) -> None:
    train = load(text).recipe.train
    assert (train.resume, train.overwrite) == (resume, overwrite)


@pytest.mark.parametrize(
    ("text", "precision", "dtype"),
    [
        ("bf16: true\n", "bf16", "auto"),
        ("fp16: true\n", "fp16", "auto"),
        ("pure_bf16: true\n", "bf16", "bfloat16"),
        ("finetuning_type: full\n", "fp32", "auto"),
        ("", "auto", "auto"),
    ],
)
def test_precision(text: str, precision: str, dtype: str) -> None:
    recipe = load(text).recipe
    assert (recipe.train.precision, recipe.model.dtype) == (precision, dtype)


def test_evaluation_and_the_best_checkpoint() -> None:
    train = load(
        "eval_dataset: b, c\neval_strategy: epoch\nsave_strategy: epoch\nload_best_model_at_end: true\n"
        "metric_for_best_model: accuracy\ngreater_is_better: true\nsave_total_limit: 2\ncompute_accuracy: true\n"
    ).recipe.train
    assert (train.eval_every, train.save_every, train.load_best) == ("epoch", "epoch", True)
    assert (train.best_metric, train.greater_is_better, train.save_total_limit) == ("eval_accuracy", True, 2)
    train = load(
        "val_size: 10\nevaluation_strategy: steps\nlogging_steps: 7\nsave_strategy: no\n"
    ).recipe.train
    assert (train.eval_every, train.save_every) == (7, None)
    assert load("val_size: 10\n").recipe.data.dev_split == 10
    only = load_recipe(
        {"model_name_or_path": "m", "do_eval": True, "eval_dataset": "b", "do_train": False}
    ).recipe
    assert only.train.eval_only
    assert only.train.eval_at_end
    assert only.data.eval == ("b",)


def test_other_keys() -> None:
    recipe = load(
        "split_special_tokens: true\ndisable_shuffling: true\nmax_steps: 5\noptim: sgd\nreport_to: wandb\n"
        "label_smoothing_factor: 0.1\ndisable_gradient_checkpointing: true\nflash_attn: sdpa\n"
        "lr_scheduler_kwargs: '{\"min_lr\": 1e-6}'\nlr_scheduler_type: "
        "cosine_with_min_lr\ndataset_dir: ONLINE\n"
        "mask_history: true\ndefault_system: hi\nhf_hub_token: hf_x\nmodel_revision: dev\n"
    ).recipe
    assert not recipe.data.parse_special_tokens
    assert not recipe.data.shuffle
    assert recipe.data.mask_history
    assert recipe.optim == SgdSpec(lr=5e-5, schedule="cosine_with_min_lr", schedule_options={"min_lr": 1e-6})
    assert recipe.data.train == (DatasetSpec(hf_hub_url="a"),)
    assert recipe.data.default_system == "hi"
    assert (recipe.train.max_steps, recipe.train.report_to) == (5, ("wandb",))
    assert recipe.stage == SftSpec(label_smoothing=0.1)
    assert (recipe.model.gradient_checkpointing, recipe.model.attention) == (False, "sdpa")
    assert (recipe.model.token, recipe.model.revision) == ("hf_x", "dev")
    assert load("flash_attn: fa2\nbf16: true\n").notes == (
        "flash_attn: fa2: the variable-length kernel where the GPU has it, sdpa elsewhere",
    )


def test_overrides_flat_then_native() -> None:
    loaded = load("learning_rate: 1\n", "learning_rate=1e-5", "train.seed=3", "lora_rank=4", "val_size=0.5")
    assert loaded.recipe.optim.lr == 1e-5
    assert loaded.recipe.train.seed == 3
    assert loaded.recipe.method == LoraSpec(rank=4)
    assert loaded.origins["optim.lr"] == loaded.origins["train.seed"] == "command line"


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk: 8", "lf.yaml:4: lora_rnk: LLaMA-Factory has no such key; did you mean lora_rank?"),
        ("qqq: 8", "lf.yaml:4: qqq: LLaMA-Factory has no such key"),
        (
            "train: {epochs: 1}",
            "lf.yaml:4: train: a section of a native recipe cannot stand in a LLaMA-Factory file; "
            "`luthier migrate` writes one",
        ),
        ("stage: ppo", "lf.yaml: reward_model: is missing; name the reward model, as the folder of a run of stage: rm"),
        ("stage: sfd", "lf.yaml:4: stage: 'sfd' is none of its values; did you mean sft? Choose "
         "from pt, sft, rm, dpo, kto, ppo"),
        (
            "use_llama_pro: true",
            "lf.yaml:4: use_llama_pro: goes with finetuning_type: freeze; LoRA on new blocks alone is method.layers "
            "of a recipe",
        ),
        ("lora_rank: 0", "lf.yaml:4: lora_rank: should be greater than 0, found the number 0"),
        ("cutoff_len: long", "lf.yaml:4: cutoff_len: expected a whole number, found the text 'long'"),
        ("bf16: 1", "lf.yaml:4: bf16: expected true or false, found the number 1"),
        (
            "lr_scheduler_type: cosin",
            "lf.yaml:4: lr_scheduler_type: 'cosin' is none of its values; did you mean cosine? Choose from "
            "linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, "
            "cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, reduce_lr_on_plateau, greedy",
        ),
        (
            "lr_scheduler_kwargs: {num_stable_steps: 3}\nlr_scheduler_type: warmup_stable_decay",
            "lf.yaml:4: lr_scheduler_kwargs: give both num_stable_steps and num_decay_steps, or max_steps "
            "(there they are a third and two thirds of the steps after the warm-up)",
        ),
        (
            "lr_scheduler_kwargs: 3",
            "lf.yaml:4: lr_scheduler_kwargs: expected a mapping of keys, or one as JSON text",
        ),
        (
            "optim: ademamix",
            "lf.yaml:4: optim: ademamix is not part of Luthier; write optim: adamw_torch",
        ),
        ("logging_steps: 0.1", "lf.yaml:4: logging_steps: a share of all steps needs max_steps; "
         "give a number of steps"),
        ("save_steps: .inf", "lf.yaml:4: save_steps: expected a number, found the number inf"),
        ("eval_strategy: steps", "lf.yaml:4: eval_strategy: there is nothing to evaluate on; "
         "give eval_dataset or val_size"),
        ("load_best_model_at_end: true", "lf.yaml:4: load_best_model_at_end: needs evaluations to choose by; "
         "give eval_strategy: steps or epoch"),
        ("save_strategy: best", "lf.yaml:4: save_strategy: write save_strategy: steps and "
         "load_best_model_at_end: true"),
        ("report_to: all", "lf.yaml:4: report_to: name the trackers, for example tensorboard"),
        ("enable_thinking: false", "lf.yaml:4: enable_thinking: name the template, which decides what this "
         "does (template: qwen3)"),
        ("fsdp: hybrid_shard", "lf.yaml:4: fsdp: hybrid sharding (divided in a machine, copied among machines) "
         "is not part of Luthier; write full_shard"),
        ("output_dir: ${HOME}/x", "lf.yaml:4: output_dir: variables (${...}) are not replaced; "
         "write the value itself"),
        ("interleave_probs: 0.5,0.5", "lf.yaml:4: interleave_probs: goes with mix_strategy: interleave_under, "
         "interleave_over, interleave_once; remove it or give one of these"),
        ("mix_strategy: interleave_under\ninterleave_probs: 0.5,0.5", "lf.yaml:5: interleave_probs: there are 2 "
         "for 1 data sets; give each one"),
        ("mix_strategy: interleave_under\ninterleave_probs: 0.5", "lf.yaml:5: interleave_probs: should sum to 1, "
         "and sum to 0.5"),
        ("mix_strategy: interleave_under\ninterleave_probs: a,b", "lf.yaml:5: interleave_probs: expected numbers "
         "from 0 to 1 with commas between them, found the text 'a,b'"),
        ("train_sampling_strategy: group_by_length", "lf.yaml:4: train_sampling_strategy: rows "
         "are not padded here, so grouping them by length saves nothing; remove it"),
    ],
)  # fmt: skip
def test_errors_name_the_key_as_the_file_has_it(text: str, message: str) -> None:
    assert problems(text) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16: true\nfp16: true", "lf.yaml:5: fp16: bf16 and fp16 exclude each other; keep one"),
        (
            "val_size: 0.1\neval_dataset: b",
            "lf.yaml:4: val_size: val_size and eval_dataset exclude each other; keep one",
        ),
        (
            "finetuning_type: full\nadapter_name_or_path: x",
            "lf.yaml:5: adapter_name_or_path: an adapter goes with finetuning_type: lora",
        ),
        ("stage: pt\nneat_packing: true", "lf.yaml:5: neat_packing: goes with stage: sft only"),
        ("stage: pt\nmask_history: true", "lf.yaml:5: mask_history: goes with stage: sft only"),
        (
            "train_on_prompt: true\nmask_history: true",
            "lf.yaml:5: mask_history: mask_history and train_on_prompt exclude each other; keep one",
        ),
    ],
)
def test_combinations_that_the_tool_refuses_are_refused(text: str, message: str) -> None:
    assert problems(text) == [message]


def test_errors_of_overrides_name_the_override() -> None:
    assert problems("", "lora_rank=0") == [
        "command line: lora_rank=0: should be greater than 0, found the number 0"
    ]
    assert problems("", "lora_rnk=1") == [
        "command line: lora_rnk=1: LLaMA-Factory has no such key; did you mean lora_rank?"
    ]
    assert problems("", "train.epoch=1") == [
        "command line: train.epoch=1: unknown key; did you mean train.epochs?"
    ]


def test_all_problems_at_once() -> None:
    text = "lora_rnk: 8\nquantization_bit: 5\nstage: orpo\nuse_llama_pro: true\n"
    assert [line.split(":")[1] for line in problems(text)] == ["4", "5", "6", "7"]


def test_a_file_that_does_not_train() -> None:
    base = "model_name_or_path: m\ntemplate: qwen\n"
    assert problems("dataset: a\n", base=base) == [
        "lf.yaml: do_train: neither do_train nor do_eval is true, so this file does not train; add "
        "do_train: true"
    ]
    assert problems("do_train: true\n", base=base) == ["lf.yaml: dataset: is missing; name what to train on"]


def test_native_recipe_hints_at_the_native_name() -> None:
    Path("r.yaml").write_text("model: {path: m}\ndata: {train: [a], cutoff_len: 9}\nlora_rank: 8\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).split("\n") == [
        "r.yaml:2: data.cutoff_len: unknown key; LLaMA-Factory's cutoff_len is data.max_length in a "
        "native recipe",
        "r.yaml:3: lora_rank: unknown key; LLaMA-Factory's lora_rank is method.rank in a native recipe",
    ]


ODD = (None, True, False, 0, -1, 3, 0.5, 1e308, 10**400, "", "x", "true", [], [1], ["x"], {}, {"x": 1}, [[]])


@pytest.mark.parametrize(
    "name", sorted(name for name, key in KEYS.items() if key.rule in (Rule.READ, Rule.DIRECT, Rule.EXTRA))
)
def test_no_value_of_any_key_ends_in_a_traceback(name: str) -> None:
    for value in ODD:
        tree = {"model_name_or_path": "m", "do_train": True, "dataset": "a", "val_size": 9, name: value}
        with contextlib.suppress(RecipeError):
            load_recipe(tree)
