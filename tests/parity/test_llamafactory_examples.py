"""The example files of LLaMA-Factory 0.9.5's repository: each is translated, or refused for a reason that is written here.

`data/llamafactory_examples.json` holds their keys and values. What a later version can train moves from `REFUSED`
to `TRANSLATED`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.recipe.known_keys import known_key
from luthier.recipe.load import dump_recipe, load_recipe
from luthier.recipe.schema import FullSpec, LlamaProSpec, LoraSpec, OftSpec, Recipe
from luthier.types import RecipeError

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "llamafactory_examples.json").read_text(encoding="utf-8")
)

NPU = (
    "use_v1_kernels: changes speed and memory only; Luthier's own kernels are used",
    "flash_attn: fa2: the variable-length kernel where the GPU has it, sdpa elsewhere",
)
PURE = "weights that train are bfloat16; autocast is on here, which keeps such sums as softmax in float32"
UNCLIPPED = "gradients are not clipped, as there: parameters are updated in the backward pass"
ASFT = "use_asft_loss: the mean is over the tokens of the whole step here, over those of each device's batch there"
KERNELS = "use_v1_kernels: changes speed and memory only; Luthier's own kernels are used"
TRANSLATED: dict[str, tuple[str, ...]] = {
    "ascend/qwen3vlmoe_full_sft_fsdp2.yaml": (
        KERNELS,
        "flash_attn: fa2: the variable-length kernel where the GPU has it, sdpa elsewhere",
    ),
    "ascend/qwen3vlmoe_lora_sft_fsdp.yaml": (
        KERNELS,
        "flash_attn: disabled: sdpa computes the same attention",
    ),
    "extras/oft/qwen2_5vl_oft_sft.yaml": (),
    "train_lora/qwen3vl_lora_dpo.yaml": (),
    "train_lora/qwen3vl_lora_sft.yaml": (),
    "ascend/qwen3_5_full_sft_fsdp2.yaml": NPU,
    "ascend/qwen3_full_sft_fsdp2.yaml": NPU,
    "ascend/qwen3moe_full_sft_fsdp.yaml": NPU,
    "extras/adam_mini/qwen2_full_sft.yaml": (),
    "extras/apollo/llama3_full_sft.yaml": ("pure_bf16: " + PURE, "apollo_layerwise: " + UNCLIPPED),
    "extras/badam/llama3_full_sft.yaml": (
        "use_badam: each block has badam_switch_interval steps here; there the first has one less, and norms are decayed",
    ),
    "extras/dft/qwen2_full_sft.yaml": (),
    "extras/eaft/qwen25_05b_eaft_full.yaml": (),
    "extras/galore/llama3_full_sft.yaml": ("pure_bf16: " + PURE, "galore_layerwise: " + UNCLIPPED),
    "extras/llama_pro/llama3_freeze_sft.yaml": (
        "use_llama_pro: the model was expanded before, as there; method.expand: true in a recipe expands it",
    ),
    "extras/loraplus/llama3_lora_sft.yaml": (),
    "extras/muon/qwen2_full_sft.yaml": (),
    "extras/oft/llama3_oft_sft.yaml": (),
    "extras/pissa/llama3_lora_sft.yaml": (
        "pissa_init: the base is not changed here, and what is saved is a plain LoRA of twice the rank for it, "
        "as with pissa_convert: true",
    ),
    "extras/qoft/llama3_oft_sft_awq.yaml": (),
    "extras/qoft/llama3_oft_sft_bnb_npu.yaml": (),
    "extras/qoft/llama3_oft_sft_gptq.yaml": (),
    "train_lora/qwen3_lora_dpo.yaml": (),
    "train_lora/qwen3_lora_kto.yaml": (
        "stage: kto: the divergence is estimated from the rows of the whole step here, of each device's batch there",
    ),
    "train_lora/qwen3_lora_reward.yaml": (),
    "train_lora/qwen3_lora_pretrain.yaml": (
        "packing: documents in a block see each other, as there; a native recipe keeps them apart",
    ),
    "train_lora/qwen3_lora_sft.yaml": (),
    "train_lora/qwen3_preprocess.yaml": (
        "tokenized_path: tokenized data is kept under data.cache and rebuilt when anything changes; "
        "this folder is not used",
        "neither bf16 nor fp16: the base trains in bf16 on a GPU that has it, else in float32",
    ),
    # Their models are quantized, which only the model's own config says.
    "train_qlora/llama3_lora_sft_aqlm.yaml": (),
    "train_qlora/llama3_lora_sft_awq.yaml": (),
    "train_qlora/llama3_lora_sft_gptq.yaml": (),
    "train_qlora/qwen3_lora_sft_bnb_npu.yaml": (),
    "train_qlora/qwen3_lora_sft_otfq.yaml": (),
    "extras/fsdp_qlora/llama3_lora_sft.yaml": (),
    "extras/asft/llama2_full_asft.yaml": (ASFT,),
    "extras/asft/qwen2_full_asft.yaml": (ASFT,),
    "train_full/qwen3_full_sft.yaml": (),
    "train_full/qwen3vl_full_sft.yaml": (),
    "train_lora/qwen3_lora_sft_ds3.yaml": (),
}
"""The notes of each that is translated."""

ACCELERATE = "configures accelerate, it is no recipe; give the file that names model and data"
EXPORT = "export_dir: this file exports a model: run `luthier export` with it"
FP8 = "8-bit floating point comes in a later version; remove it"
MEGATRON = "Megatron is not part of Luthier; remove it"
TALK = (
    "infer_backend: this file names a model to talk to: run `luthier chat` or `luthier serve` with it; "
    "to train add do_train: true and dataset"
)
V1 = (
    "LLaMA-Factory's v1 form is not read; "
    "write model_name_or_path, dataset and finetuning_type as in its other examples"
)


REFUSED: dict[str, tuple[str, ...]] = {
    "extras/fp8/llama3_fp8_deepspeed_sft.yaml": (f"fp8: {FP8}",),
    "extras/fp8/llama3_fp8_fsdp_sft.yaml": (
        f"fp8: {FP8}",
        f"fp8_enable_fsdp_float8_all_gather: {FP8}",
    ),
    "extras/mod/llama3_full_sft.yaml": (
        "mixture_of_depths: mixture of depths is not part of Luthier; remove it",
    ),
    "extras/multi_tokens/tokens_cfg.yaml": (
        "is no recipe: it has neither model (a native recipe) nor model_name_or_path (a LLaMA-Factory file)",
    ),
    "extras/nlg_eval/llama3_lora_predict.yaml": (
        "do_predict: this file answers a data set: run `luthier predict` with it",
    ),
    "inference/qwen3.yaml": (TALK,),
    "inference/qwen3_full_sft.yaml": (TALK,),
    "inference/qwen3_lora_sft.yaml": (TALK,),
    "inference/qwen3vl.yaml": (TALK,),
    "megatron/qwen2_vl_full.yaml": tuple(
        f"{key}: {MEGATRON}"
        for key in (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "pipeline_model_parallel_size",
            "bias_activation_fusion",
            "apply_rope_fusion",
            "use_distributed_optimizer",
        )
    ),
    "megatron/qwen3_moe_full.yaml": tuple(
        f"{key}: {MEGATRON}"
        for key in (
            "pipeline_model_parallel_size",
            "bias_activation_fusion",
            "apply_rope_fusion",
            "use_distributed_optimizer",
            "overlap_param_gather",
            "overlap_grad_reduce",
            "moe_grouped_gemm",
            "moe_token_dispatcher_type",
            "expert_model_parallel_size",
            "recompute_granularity",
        )
    ),
    "merge_lora/qwen3_full_sft.yaml": (EXPORT,),
    "merge_lora/qwen3_gptq.yaml": (EXPORT,),
    "merge_lora/qwen3_lora_sft.yaml": (EXPORT,),
    "merge_lora/qwen3vl_lora_sft.yaml": (EXPORT,),
    "train_lora/qwen3_lora_sft_ray.yaml": (
        "ray_num_workers: start the run with torchrun instead of Ray; remove it",
    ),
}
REFUSED |= {
    f"ktransformers/train_lora/{name}_lora_sft_kt.yaml": (
        "use_kt: KTransformers is not part of Luthier; remove it",
    )
    for name in ("deepseek_v2", "deepseek_v3", "qwen3_5moe", "qwen3moe")
}
REFUSED |= {
    name: (ACCELERATE,) for name in EXAMPLES if name.startswith(("accelerate/", "ktransformers/accelerate/"))
}
REFUSED |= {name: (V1,) for name in EXAMPLES if name.startswith("v1/")}
"""The lines of each that is refused, without file and line."""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(values: dict[str, Any]) -> Path:
    path = Path("lf.yaml")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in values.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_every_example_has_its_outcome() -> None:
    assert len(EXAMPLES) == 82
    assert set(TRANSLATED) | set(REFUSED) == set(EXAMPLES)
    assert not set(TRANSLATED) & set(REFUSED)
    assert sum(name.startswith("v1/") for name in REFUSED) == 13


@pytest.mark.parametrize("name", REFUSED)
def test_refused_examples(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(EXAMPLES[name]))
    lines = str(caught.value).split("\n")
    assert tuple(re.sub(r"^lf\.yaml(:\d+)?: ", "", line) for line in lines) == REFUSED[name]
    keys = list(EXAMPLES[name])
    for line in lines:
        named = re.match(r"lf\.yaml:(\d+): (\w+): ", line)
        if named is None:  # about the file as a whole
            assert line == f"lf.yaml: {REFUSED[name][0]}"
            continue
        assert known_key(named[2]) is not None
        assert keys[int(named[1]) - 1] == named[2]


# --------------------------------------------------------------------------------------------------
# What a translated example must say, read from its values by other means than the translation


def _lora(recipe: Recipe) -> LoraSpec:
    assert isinstance(recipe.method, LoraSpec)
    return recipe.method


def _method(recipe: Recipe) -> Any:
    return recipe.method


def _stage(recipe: Recipe) -> Any:
    return recipe.stage


def _targets(recipe: Recipe) -> str:
    return {"all-linear": "all"}.get(str(_lora(recipe).targets), "others")


def _optim(recipe: Recipe) -> Any:
    return recipe.optim


def _frozen(recipe: Recipe) -> Any:
    parts = recipe.model.frozen_parts
    return ("tower", "projector") if parts is None else parts


SAYS: dict[str, Callable[[Recipe], Any]] = {
    "apollo_layerwise": lambda recipe: _optim(recipe).layerwise,
    "apollo_rank": lambda recipe: _optim(recipe).rank,
    "apollo_scale": lambda recipe: _optim(recipe).scale,
    "apollo_scale_type": lambda recipe: _optim(recipe).scale_type,
    "apollo_target": lambda recipe: {"all-linear": "all"}.get(_optim(recipe).targets),
    "badam_mode": lambda recipe: {"badam": "layer"}.get(recipe.optim.type),
    "badam_switch_interval": lambda recipe: _optim(recipe).switch_every,
    "badam_switch_mode": lambda recipe: _optim(recipe).order,
    "galore_layerwise": lambda recipe: _optim(recipe).layerwise,
    "galore_rank": lambda recipe: _optim(recipe).rank,
    "galore_scale": lambda recipe: _optim(recipe).scale,
    "galore_target": lambda recipe: {"all-linear": "all"}.get(_optim(recipe).targets),
    "pure_bf16": lambda recipe: recipe.model.dtype == "bfloat16",
    "use_adam_mini": lambda recipe: recipe.optim.type == "adam_mini",
    "use_apollo": lambda recipe: recipe.optim.type == "apollo",
    "use_badam": lambda recipe: recipe.optim.type == "badam",
    "use_galore": lambda recipe: recipe.optim.type == "galore",
    "use_muon": lambda recipe: recipe.optim.type == "muon",
    "bf16": lambda recipe: recipe.train.precision == "bf16",
    "cutoff_len": lambda recipe: recipe.data.max_length,
    "dataset": lambda recipe: ",".join(map(str, recipe.data.train)),
    "ddp_timeout": lambda recipe: recipe.parallel.timeout,
    "deepspeed": lambda recipe: recipe.parallel.config,
    "do_train": lambda recipe: not recipe.train.eval_only,
    "finetuning_type": lambda recipe: {"llama_pro": "freeze"}.get(recipe.method.type, recipe.method.type),
    "freeze_trainable_layers": lambda recipe: _method(recipe).blocks,
    "freeze_trainable_modules": lambda recipe: ",".join(_method(recipe).modules),
    "use_llama_pro": lambda recipe: recipe.method.type == "llama_pro",
    "loraplus_lr_ratio": lambda recipe: _lora(recipe).lora_plus_ratio,
    "oft_block_size": lambda recipe: _method(recipe).block_size,
    "oft_target": lambda recipe: {"all-linear": "all"}.get(_method(recipe).targets),
    "pissa_init": lambda recipe: _lora(recipe).init == "pissa",
    "pissa_iter": lambda recipe: _lora(recipe).init_iterations,
    "flash_attn": lambda recipe: {"auto": "fa2", "sdpa": "disabled"}.get(recipe.model.attention),
    "gradient_accumulation_steps": lambda recipe: recipe.train.accumulation,
    "learning_rate": lambda recipe: recipe.optim.lr,
    "logging_steps": lambda recipe: recipe.train.log_every,
    "lora_rank": lambda recipe: _lora(recipe).rank,
    "lora_target": _targets,
    "lr_scheduler_type": lambda recipe: recipe.optim.schedule,
    "max_samples": lambda recipe: recipe.data.max_samples,
    "max_steps": lambda recipe: recipe.train.max_steps,
    "image_max_pixels": lambda recipe: recipe.data.media.image_max_pixels,
    "video_max_pixels": lambda recipe: recipe.data.media.video_max_pixels,
    "freeze_vision_tower": lambda recipe: "tower" in _frozen(recipe),
    "freeze_multi_modal_projector": lambda recipe: "projector" in _frozen(recipe),
    "freeze_language_model": lambda recipe: "language" in _frozen(recipe),
    "model_name_or_path": lambda recipe: recipe.model.path,
    "num_train_epochs": lambda recipe: recipe.train.epochs,
    "output_dir": lambda recipe: recipe.train.output,
    "overwrite_output_dir": lambda recipe: recipe.train.overwrite,
    "per_device_train_batch_size": lambda recipe: recipe.train.rows_per_device,
    "plot_loss": lambda recipe: recipe.train.plots,
    "pref_beta": lambda recipe: _stage(recipe).beta,
    "pref_loss": lambda recipe: _stage(recipe).loss,
    "preprocessing_num_workers": lambda recipe: recipe.data.workers,
    "report_to": lambda recipe: ",".join(recipe.train.report_to) or "none",
    "resume_from_checkpoint": lambda recipe: {"never": None}.get(recipe.train.resume, recipe.train.resume),
    "save_only_model": lambda recipe: recipe.train.save_only_model,
    "save_steps": lambda recipe: recipe.train.save_every,
    "seed": lambda recipe: recipe.train.seed,
    "stage": lambda recipe: recipe.stage.type,
    "template": lambda recipe: recipe.data.template,
    "trust_remote_code": lambda recipe: recipe.model.trust_remote_code,
    "use_dft_loss": lambda recipe: _stage(recipe).loss == "dft",
    "asft_alpha": lambda recipe: _stage(recipe).kl_weight,
    "use_asft_loss": lambda recipe: _stage(recipe).loss == "asft",
    "use_eaft_loss": lambda recipe: (_stage(recipe).loss, _stage(recipe).entropy_power) == ("eaft", 1),
    "warmup_ratio": lambda recipe: recipe.optim.warmup,
    "quantization_bit": lambda recipe: recipe.model.quantization.bits,
    "quantization_method": lambda recipe: {"bitsandbytes": "bnb"}[recipe.model.quantization.type],
    "double_quantization": lambda recipe: recipe.model.quantization.double,
}
NOT_SAID = {
    "badam_verbose",
    "pissa_convert",
    "dataloader_num_workers",
    "disable_gradient_checkpointing",
    "overwrite_cache",
    "tokenized_path",
    "use_v1_kernels",
}
"""What changes no result, or has a note."""


@pytest.mark.parametrize("name", TRANSLATED)
def test_translated_examples(name: str) -> None:
    values = EXAMPLES[name]
    values |= {"dataset": values["dataset"].replace(", ", ",")}
    loaded = load_recipe(write(values))
    assert loaded.notes == TRANSLATED[name]
    assert loaded.llamafactory
    said = {key: SAYS[key](loaded.recipe) for key in values if key not in NOT_SAID}
    # Nobody waits for the preparation of data here: what is over a day is left at the default.
    wanted = values | ({"ddp_timeout": 1800} if values.get("ddp_timeout", 0) > 86_400 else {})
    assert said == {key: value for key, value in wanted.items() if key not in NOT_SAID}
    assert isinstance(loaded.recipe.method, (FullSpec, LlamaProSpec, LoraSpec, OftSpec))


DRAWN = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "max_new_tokens": 1024}
"""How that tool answers where a file says nothing."""


@pytest.mark.parametrize("name", sorted(name for name in EXAMPLES if name.startswith("inference/")))
def test_examples_of_chats_name_a_model_to_talk_to(name: str) -> None:
    """What `llamafactory-cli chat`, `webchat` and `api` are given."""
    flat = EXAMPLES[name]
    recipe = load_recipe(write(flat), to_export=True).recipe
    assert recipe.model.path == flat["model_name_or_path"] and recipe.data.template == flat["template"]
    assert recipe.model.trust_remote_code and recipe.data.train == () and recipe.data.rules == "llamafactory"
    adapter = flat.get("adapter_name_or_path")
    assert recipe.method.model_dump()["adapters"] == ((adapter,) if adapter else ())
    assert {key: getattr(recipe.generation, key) for key in DRAWN} == DRAWN


def test_the_example_of_predictions_names_a_model_and_data() -> None:
    """What `llamafactory-cli train` is given with do_predict alone."""
    flat = EXAMPLES["extras/nlg_eval/llama3_lora_predict.yaml"]
    loaded = load_recipe(write(flat), to_export=True)
    recipe = loaded.recipe
    assert recipe.data.eval == ("identity", "alpaca_en_demo") and recipe.data.train == ()
    assert (recipe.data.max_samples, recipe.data.template, recipe.data.max_length) == (50, "llama3", 2048)
    assert recipe.method.model_dump()["adapters"] == ("saves/llama3-8b/lora/sft",)
    assert recipe.train.output == "saves/llama3-8b/lora/predict" and recipe.train.generate_at_eval is None
    assert {key: getattr(recipe.generation, key) for key in DRAWN} == DRAWN
    assert recipe.generation.rows == 1 and not recipe.train.eval_only
    native = yaml.safe_load(dump_recipe(loaded, everything=False))
    assert load_recipe(native, to_export=True).recipe == recipe


def test_examples_of_merges_are_exports_here() -> None:
    """What `llamafactory-cli export` is given."""
    merges = sorted(name for name in EXAMPLES if name.startswith("merge_lora/"))
    assert len(merges) == 4
    for name in merges:
        file = write(EXAMPLES[name])
        if "gptq" in name:
            with pytest.raises(
                RecipeError, match="export_quantization_bit: quantized exports, GGUF and Ollama come"
            ):
                load_recipe(file, to_export=True)
            continue
        loaded, flat = load_recipe(file, to_export=True), EXAMPLES[name]
        recipe = loaded.recipe
        assert recipe.export.output == flat["export_dir"]
        assert (recipe.export.shard_size, recipe.export.device, recipe.export.dtype) == ("5GB", "cpu", "auto")
        assert recipe.model.path == flat["model_name_or_path"]
        assert recipe.data.template == flat["template"] and recipe.data.train == ()
        adapter = flat.get("adapter_name_or_path")
        assert recipe.method.model_dump()["adapters"] == ((adapter,) if adapter else ())
        assert "infer_dtype: auto: the type of the base's files is kept" in " ".join(loaded.notes)
        # As a native recipe, which `luthier migrate` prints, it says the same.
        native = yaml.safe_load(dump_recipe(loaded, everything=False))
        again = load_recipe(native, to_export=True).recipe
        assert (
            again.model_copy(update={"train": recipe.train}) == recipe
        )  # the run's folder is named after the file
