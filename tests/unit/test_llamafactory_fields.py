"""LLaMA-Factory files: what its rarer keys, its early versions and transformers' old names become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.recipe.llamafactory import EARLY_DEFAULTS
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.schema import (
    ColumnSpec,
    CompileSpec,
    DatasetSpec,
    EarlyStoppingSpec,
    FreezeSpec,
    HubSpec,
    LoraSpec,
    RopeScalingSpec,
    VocabularySpec,
)
from luthier.types import RecipeError

BASE: dict[str, Any] = {"model_name_or_path": "m", "do_train": True, "dataset": "a", "bf16": True}


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(**values: Any) -> LoadedRecipe:
    return load_recipe(BASE | values)


def problems(**values: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**values)
    return str(caught.value).split("\n")


# --------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling(kind: str) -> None:
    """That tool derives the factor from the lengths, as an absent one here."""
    assert load(rope_scaling=kind).recipe.model.rope_scaling == RopeScalingSpec(type=kind, factor=None)


def test_rope_scaling_of_another_kind_is_refused() -> None:
    assert problems(rope_scaling="yarnn") == [
        "rope_scaling: 'yarnn' is none of its values; did you mean yarn? Choose from linear, dynamic, yarn, llama3"
    ]


def test_new_tokens_start_with_that_tools_noise() -> None:
    loaded = load(add_tokens="<a>, <b>", new_special_tokens="<c>", additional_target="embed_tokens,lm_head")
    assert loaded.recipe.model.vocabulary == VocabularySpec(
        add=("<a>", "<b>"), add_special=("<c>",), noise=1.0
    )
    assert loaded.notes == ()
    assert load(resize_vocab=True).recipe.model.vocabulary == VocabularySpec(resize=True)
    assert load(resize_vocab=False, init_special_tokens="noise_init").recipe.model.vocabulary is None


def test_new_tokens_that_that_tool_does_not_train_are_told() -> None:
    note = (
        "new tokens: their rows alone train here; there the whole embeddings and head do "
        "(method.modules_to_save trains all of them)"
    )
    assert load(add_tokens="<a>").notes == (note,)
    assert load(add_tokens="<a>", finetuning_type="full").notes == ()


@pytest.mark.parametrize(
    ("how", "noise", "described"),
    [("noise_init", 1.0, False), ("desc_init", 0.0, True), ("desc_init_w_noise", 1.0, True)],
)
def test_described_tokens(how: str, noise: float, described: bool) -> None:
    Path("tokens.yaml").write_text('"<x>": "start of a drawing"\n"<y>": "its end"\n')
    loaded = load(new_special_tokens_config="tokens.yaml", init_special_tokens=how, finetuning_type="full")
    words = {"<x>": "start of a drawing", "<y>": "its end"}
    assert loaded.recipe.model.vocabulary == VocabularySpec(
        add_special=("<x>", "<y>"), noise=noise, descriptions=words if described else {}
    )


def test_described_tokens_stand_beside_the_recipe_too() -> None:
    folder = Path("somewhere")
    folder.mkdir()
    (folder / "tokens.yaml").write_text('"<x>": "start"\n')
    (folder / "lf.json").write_text(json.dumps(BASE | {"new_special_tokens_config": "tokens.yaml"}))
    vocabulary = load_recipe(folder / "lf.json").recipe.model.vocabulary
    assert vocabulary is not None
    assert vocabulary.add_special == ("<x>",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "t.yaml: no such file"),
        ("", "t.yaml: the file is empty; it names new tokens and what each means"),
        ("- a", "t.yaml: expected a mapping from new tokens to what each means"),
        ('"<x>": 3', "t.yaml: <x>: expected a description, found the number 3"),
    ],
)
def test_bad_token_files(text: str | None, message: str) -> None:
    if text is not None:
        Path("t.yaml").write_text(text)
    assert problems(new_special_tokens_config="t.yaml") == [f"new_special_tokens_config: {message}"]


def test_other_fields_of_the_model() -> None:
    model = load(upcast_layernorm=True, tokenizer_name="t", padding_side="left").recipe.model
    assert (model.upcast_layernorm, model.tokenizer, model.padding_side) == (True, "t", "left")
    assert load(flash_attn=True).recipe.model.attention == "auto"  # early versions had a flag
    assert load(flash_attn=False).notes == ()


# --------------------------------------------------------------------------------------------------
# Training


def test_arithmetic() -> None:
    train = load(tf32=True, full_determinism=True, bf16_full_eval=True).recipe.train
    assert (train.tf32, train.deterministic, train.eval_precision) == (True, True, "bf16")
    assert load(tf32=False).recipe.train.tf32 is False
    assert load(fp16_full_eval=True).recipe.train.eval_precision == "fp16"
    assert problems(bf16_full_eval=True, fp16_full_eval=True) == [
        "fp16_full_eval: bf16_full_eval and fp16_full_eval exclude each other; keep one"
    ]


@pytest.mark.parametrize(
    ("values", "compiled"),
    [
        ({"torch_compile": True}, CompileSpec()),
        ({"torch_compile_backend": "eager"}, CompileSpec(backend="eager")),
        ({"torchdynamo": "inductor"}, CompileSpec()),
        ({"torch_compile_mode": "max-autotune"}, CompileSpec(mode="max-autotune")),
        ({"torch_compile": False}, None),
    ],
)
def test_compilation(values: dict[str, Any], compiled: CompileSpec | None) -> None:
    assert load(**values).recipe.train.compile == compiled


@pytest.mark.parametrize("key", ["neftune_noise_alpha", "neft_alpha"])
def test_neftune(key: str) -> None:
    loaded = load(**{key: 5})
    assert loaded.recipe.train.neftune_alpha == 5
    told = f"{key}: noise is scaled by each sample's own length here, there by the padded row's"
    assert told in loaded.notes
    assert load(**{key: 0}).recipe.train.neftune_alpha == 0
    assert problems(neftune_noise_alpha="x") == ["neftune_noise_alpha: expected a number, found the text 'x'"]


def test_memory_that_is_short() -> None:
    loaded = load(auto_find_batch_size=True)
    assert loaded.recipe.train.fit_memory
    assert loaded.notes == (
        "auto_find_batch_size: where memory is short, passes are halved here; the batch stays as given",
    )


def best(**values: Any) -> dict[str, Any]:
    return {
        "eval_dataset": "b",
        "eval_strategy": "steps",
        "eval_steps": 50,
        "save_steps": 100,
        "load_best_model_at_end": True,
    } | values


def test_early_stopping_and_accuracy() -> None:
    values = best(early_stopping_steps=3, compute_accuracy=True, metric_for_best_model="accuracy")
    loaded = load(**values)
    train = loaded.recipe.train
    assert loaded.notes == ()
    assert train.early_stopping == EarlyStoppingSpec(patience=3)
    assert (train.load_best, train.best_metric, train.metrics) == (True, "eval_accuracy", ("accuracy",))
    assert (train.eval_every, train.save_every) == (50, 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"early_stopping_steps": 3},
            "early_stopping_steps: needs load_best_model_at_end: true, whose metric it watches",
        ),
        (best(early_stopping_steps=0), "early_stopping_steps: should be greater than 0, found the number 0"),
        (
            best(metric_for_best_model="eval_accuracy"),
            "metric_for_best_model: accuracy needs compute_accuracy: true",
        ),
        (
            best(save_steps=70),
            "save_steps: with load_best_model_at_end give save_steps as a multiple of eval_steps (50)",
        ),
        (
            best(save_strategy="epoch"),
            "save_strategy: with load_best_model_at_end give save_strategy: steps, as eval_strategy has it",
        ),
        (
            best(eval_strategy="no"),
            "load_best_model_at_end: needs evaluations to choose by; give eval_strategy: steps or epoch",
        ),
    ],
)
def test_the_best_model_needs_what_that_tool_needs(values: dict[str, Any], message: str) -> None:
    assert problems(**values) == [message]


def test_shares_of_all_steps_where_all_steps_are_known() -> None:
    """As transformers rounds them: up."""
    train = load(
        max_steps=33, logging_steps=0.1, save_steps=0.5, eval_steps=0.25, eval_strategy="steps", val_size=9
    ).recipe.train
    assert (train.log_every, train.save_every, train.eval_every) == (4, 17, 9)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"warmup_steps": 10}, {"num_stable_steps": 30, "num_decay_steps": 60}),
        ({"warmup_ratio": 0.055}, {"num_stable_steps": 31, "num_decay_steps": 63}),
        (
            {"lr_scheduler_kwargs": {"num_decay_steps": 5}},
            {"num_stable_steps": 33, "num_decay_steps": 5},
        ),
        (
            {"max_steps": -1, "lr_scheduler_kwargs": {"num_decay_steps": 5, "num_stable_steps": 7}},
            {"num_stable_steps": 7, "num_decay_steps": 5},
        ),
    ],
)
def test_stable_and_decaying_steps(values: dict[str, Any], options: dict[str, int]) -> None:
    tree = {"lr_scheduler_type": "warmup_stable_decay", "max_steps": 100} | values
    assert load(**tree).recipe.optim.schedule_options == options


def test_upload() -> None:
    loaded = load(
        push_to_hub=True,
        hub_model_id="me/m",
        hub_private_repo=True,
        hub_revision="r",
        hub_token="hf_x",
        hub_strategy="end",
    )
    assert loaded.recipe.train.push_to_hub == HubSpec(repo="me/m", private=True, revision="r")
    assert loaded.recipe.model.token == "hf_x"
    assert "hf_x" not in dump_recipe(loaded)
    assert loaded.notes == ()
    loaded = load(push_to_hub=True, push_to_hub_model_id="m", push_to_hub_organization="we")
    assert loaded.recipe.train.push_to_hub == HubSpec(repo="we/m", private=False)
    assert loaded.notes == (
        "push_to_hub: the repository is public, as there; hub_private_repo: true makes it private",
        "push_to_hub: the finished model is uploaded once, not at every checkpoint",
    )
    assert load(push_to_hub=False, hub_model_id="me/m", hub_token="t").recipe.train.push_to_hub is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "push_to_hub: give hub_model_id: OWNER/NAME"),
        ({"hub_model_id": "m"}, "hub_model_id: give hub_model_id: OWNER/NAME"),
        (
            {"hub_model_id": "o/m", "hub_strategy": "checkpoint"},
            "hub_strategy: checkpoints are not uploaded; write hub_strategy: end",
        ),
        (
            {"hub_model_id": "o/m", "hub_token": "a", "hf_hub_token": "b"},
            "hub_token: one token serves loading and uploading here; give hf_hub_token alone",
        ),
    ],
)
def test_uploads_that_cannot_be(values: dict[str, Any], message: str) -> None:
    assert problems(push_to_hub=True, **values) == [message]


def test_trackers() -> None:
    train = load(
        report_to="tensorboard, wandb", run_name="r", project="p", trackio_space_id="o/s"
    ).recipe.train
    assert train.report_to == ("tensorboard", "wandb")
    assert train.extra == {"run_name": "r", "project": "p", "trackio_space_id": "o/s"}
    assert load(report_to=["trackio"]).recipe.train.report_to == ("trackio",)
    assert load(use_swanlab=True, report_to=["none"]).recipe.train.report_to == ("swanlab",)
    assert load(use_swanlab=True, report_to="swanlab,mlflow").recipe.train.report_to == ("swanlab", "mlflow")
    assert load(swanlab_project="p").recipe.train.report_to == ()
    assert problems(report_to="tensorbord")[0].startswith(
        "report_to: 'tensorbord' is none of its values; did you mean tensorboard? Choose from azure_ml, "
    )
    assert problems(use_swanlab=True, swanlab_project="p") == [
        "swanlab_project: set SWANLAB_PROJECT in the environment and remove it"
    ]


# --------------------------------------------------------------------------------------------------
# Early versions


def test_adapters_of_early_versions() -> None:
    method = load(checkpoint_dir="x,y", resume_lora_training=False).recipe.method
    assert method == LoraSpec(adapters=("x", "y"), create_new_adapter=True)
    loaded = load(checkpoint_dir=["x", "y"])
    assert loaded.recipe.method == LoraSpec(adapters=("x", "y"))
    assert loaded.notes == (f"checkpoint_dir: {EARLY_DEFAULTS}",)
    assert load(resume_lora_training=True).recipe.method == LoraSpec()
    assert problems(checkpoint_dir="x", finetuning_type="full") == [
        "checkpoint_dir: a whole model goes into model_name_or_path, an adapter with finetuning_type: lora"
    ]
    assert problems(resume_lora_training=True, create_new_adapter=True) == [
        "resume_lora_training: says the opposite of create_new_adapter; keep one"
    ]


def test_names_of_early_versions() -> None:
    recipe = load(
        dev_ratio=0.1,
        prompt_template="alpaca",
        finetuning_type="freeze",
        num_layer_trainable=3,
        name_module_trainable="mlp",
        max_train_samples=7,
        hf_auth_token="t",
        sft_packing=True,
    ).recipe
    assert recipe.method == FreezeSpec(layers=3, modules=("mlp",))
    assert (recipe.data.dev_split, recipe.data.template, recipe.data.max_samples) == (0.1, "alpaca", 7)
    assert recipe.data.packing
    assert recipe.model.token == "t"


def test_an_older_name_beside_the_present_one_is_an_error() -> None:
    assert problems(dev_ratio=0.1, val_size=0.2) == [
        "dev_ratio: another name of val_size, which is given too; keep one"
    ]
    assert problems(no_cuda=True, use_cpu=False) == [
        "no_cuda: another name of use_cpu, which is given too; keep one"
    ]


def test_origins_name_the_key_as_the_file_has_it() -> None:
    Path("lf.yaml").write_text("model_name_or_path: m\ndo_train: true\ndataset: a\ncheckpoint_dir: x\n")
    assert load_recipe("lf.yaml").origins["method.adapters"] == "translated from checkpoint_dir (line 4)"
    Path("lf.yaml").write_text("model_name_or_path: m\ndo_train: true\ndataset: a\ncheckpoint_dir: 3\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("lf.yaml")
    assert str(caught.value) == (
        "lf.yaml:4: checkpoint_dir: expected names with commas between them, found the number 3"
    )


def test_columns_and_split_of_early_versions() -> None:
    columns = ColumnSpec(prompt="q", response="r")
    assert load(dataset="a.json", prompt_column="q", response_column="r").recipe.data.train == (
        DatasetSpec(file_name="a.json", columns=columns),
    )
    assert load(dataset="o/a", dataset_dir="ONLINE", history_column="h", split="test").recipe.data.train == (
        DatasetSpec(hf_hub_url="o/a", columns=ColumnSpec(history="h"), split="test"),
    )
    assert problems(prompt_column="q", split="test") == [
        "prompt_column: write it into dataset_info.json, where a is described",
        "split: write it into dataset_info.json, where a is described",
    ]


def test_other_ways_of_tuning() -> None:
    assert problems(finetuning_type="p_tuning") == [
        "finetuning_type: P-tuning is not part of Luthier; write lora, oft, freeze or full"
    ]


# --------------------------------------------------------------------------------------------------
# Both forms as JSON, files that train nothing, files that are no recipes


def test_a_json_file_translates_as_the_yaml_file_does() -> None:
    values = {
        **BASE,
        "learning_rate": 1e-5,
        "lora_target": "q_proj,v_proj",
        "val_size": 0.1,
        "rope_scaling": "yarn",
    }
    Path("lf.json").write_text(json.dumps(values, indent=1))
    Path("lf.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    from_json, from_yaml = load_recipe("lf.json"), load_recipe("lf.yaml")
    assert from_json.recipe == from_yaml.recipe
    assert from_json.origins["optim.lr"] == "translated from learning_rate (line 6)"
    Path("bad.json").write_text('{"model_name_or_path": "m",\n "lora_rnk": 3}')
    with pytest.raises(RecipeError) as caught:
        load_recipe("bad.json")
    assert str(caught.value) .split("\n")[-1] == (
        "bad.json:2: lora_rnk: LLaMA-Factory has no such key; did you mean lora_rank?"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"export_dir": "x", "export_size": 5}, "export_dir: this file exports a model: "
         "run `luthier export` with it"),
        ({"task": "mmlu_test"}, "task: this file runs a benchmark: run luthier evaluate m --task mmlu_test"),
        (
            {"task": "ceval_validation", "adapter_name_or_path": "a", "lang": "zh", "n_shot": 3, "task_dir": "d"},
            "task: this file runs a benchmark: "
            "run luthier evaluate a --task ceval_validation --task-dir d --n-shot 3 --lang zh",
        ),
        (
            {"do_predict": True, "eval_dataset": "a"},
            "do_predict: this file answers a data set: run `luthier predict` with it",
        ),
        (
            {"infer_backend": "huggingface", "image_max_pixels": 9},
            "infer_backend: this file names a model to talk to: run `luthier chat` or `luthier serve` with it; "
            "to train add do_train: true and dataset",
        ),
        (
            {"template": "qwen"},
            "do_train: this file names a model to talk to: run `luthier chat` or `luthier serve` with it; "
            "to train add do_train: true and dataset",
        ),
    ],
)  # fmt: skip
def test_files_of_other_verbs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model_name_or_path": "m", **values})
    assert str(caught.value) == message


def test_a_flat_file_without_a_model_is_recognised() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            {"model_name_or_pth": "m", "stage": "sft", "do_train": True, "dataset": "a", "optim": "sgd"}
        )
    assert str(caught.value).split("\n") == [
        "model_name_or_pth: LLaMA-Factory has no such key; did you mean model_name_or_path?",
        "model_name_or_path: is missing; name the model",
    ]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"compute_environment": "LOCAL_MACHINE", "num_processes": 2},
         "configures accelerate, it is no recipe; give the file that names model and data"),
        ({"zero_optimization": {"stage": 3}},
         "configures DeepSpeed, it is no recipe; give the file that names model and data"),
        ({"peft_type": "LORA", "r": 8}, "describes an adapter, it is no recipe; name its folder in method.adapters"),
        ({"model_type": "llama"}, "describes a model, it is no recipe; name its folder in model.path"),
        ({"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "o/b"}},
         "describes data sets, it is no recipe; name its folder in data.directory"),
        ({"model": "m", "train_dataset": "d.yaml"}, "LLaMA-Factory's v1 form is not read; "
         "write model_name_or_path, dataset and finetuning_type as in its other examples"),
        ({"<x>": "a start"}, "is no recipe: it has neither model (a native recipe) "
         "nor model_name_or_path (a LLaMA-Factory file)"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipes(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tree)
    assert str(caught.value) == message
    Path("f.json").write_text(json.dumps(tree))
    with pytest.raises(RecipeError) as caught:
        load_recipe("f.json")
    assert str(caught.value) == f"f.json: {message}"


# --------------------------------------------------------------------------------------------------
# What a native recipe says of these keys


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("evaluation_strategy", "LLaMA-Factory's evaluation_strategy is train.eval_every in a native recipe"),
        ("deepspeed", "LLaMA-Factory's deepspeed is parallel.config in a native recipe"),
        ("tpu_num_cores", "TPUs and XLA are not part of Luthier; remove it to train on a GPU or a CPU"),
        ("run_name", "transformers' run_name goes into train.extra"),
    ],
)  # fmt: skip
def test_foreign_keys_in_a_native_recipe(key: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"path": "m"}, "data": {"train": ["a"]}, "train": {key: 1}})
    assert str(caught.value) == f"train.{key}: unknown key; {message}"


def test_a_model_that_is_only_a_name() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": "embedded", "data": {"train": ["a"]}})
    assert str(caught.value) == (
        "model: expected a mapping of keys, found the text 'embedded'; write {path: embedded}"
    )


def test_a_file_with_all_of_it_migrates_to_the_same_recipe() -> None:
    Path("tokens.yaml").write_text('"<x>": "start"\n')
    values = best(
        rope_scaling="linear",
        new_special_tokens_config="tokens.yaml",
        init_special_tokens="desc_init",
        resize_vocab=True,
        torch_compile=True,
        neftune_noise_alpha=5,
        compute_accuracy=True,
        early_stopping_steps=2,
        push_to_hub=True,
        hub_model_id="o/m",
        use_swanlab=True,
        run_name="r",
        output_dir="out",
        dataset="a.json",
        eval_dataset="b.csv",
        prompt_column="q",
    )
    loaded = load(**values)
    Path("native.yaml").write_text(dump_recipe(loaded, everything=False))
    again = load_recipe("native.yaml")
    assert again.recipe == loaded.recipe
    assert not again.llamafactory
