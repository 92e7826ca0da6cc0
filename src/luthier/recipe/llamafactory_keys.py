"""Every key of a LLaMA-Factory 0.9.5 file: its default there, and what becomes of it here.

A table, one entry a key. Keys that need more than a name and a converter are `READ`: `llamafactory.py`
translates them by subject. Nothing that could change a result is accepted without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Rule(Enum):
    """What happens to a key that is set to something other than its default."""

    READ = auto()
    """Translated together with others, mostly into `target`."""
    DIRECT = auto()
    """Its value goes to `target` as it is."""
    EXTRA = auto()
    """It goes to `train.extra` under its own name."""
    SILENT = auto()
    """It cannot change what is trained here, and nobody misses it."""
    NOTED = auto()
    """It is accepted, and `text` tells the user what is done instead."""
    REFUSED = auto()
    """An error; `text` says what to do."""


@dataclass(frozen=True, slots=True)
class Key:
    rule: Rule
    default: Any
    text: str = ""
    target: str = ""


def keys(rule: Rule, text: str = "", **defaults: Any) -> dict[str, Key]:
    return {name: Key(rule, default, text) for name, default in defaults.items()}


def direct(**targets: tuple[str, Any]) -> dict[str, Key]:
    return {name: Key(Rule.DIRECT, default, "", target) for name, (target, default) in targets.items()}


def read(**targets: tuple[str, Any]) -> dict[str, Key]:
    return {name: Key(Rule.READ, default, "", target) for name, (target, default) in targets.items()}


_MODEL = (
    direct(
        model_name_or_path=("model.path", None),
        cache_dir=("model.cache_dir", None),
        model_revision=("model.revision", "main"),
        hf_hub_token=("model.token", None),
        trust_remote_code=("model.trust_remote_code", False),
    )
    | read(
        adapter_name_or_path=("method.adapters", None),
        split_special_tokens=("data.parse_special_tokens", False),
        flash_attn=("model.attention", "auto"),
        disable_gradient_checkpointing=("model.gradient_checkpointing", False),
    )
    | keys(
        Rule.REFUSED,
        "adding tokens to a vocabulary comes in a later version; remove it",
        resize_vocab=False,
        add_tokens=None,
        add_special_tokens=None,
        new_special_tokens_config=None,
        init_special_tokens="noise_init",
    )
    | keys(Rule.REFUSED, "write the adapter's whole path into adapter_name_or_path", adapter_folder=None)
    | keys(Rule.REFUSED, "put the scaling into the model's own config.json (rope_scaling)", rope_scaling=None)
    | keys(Rule.REFUSED, "shifted sparse attention is not part of Luthier; remove it", shift_attn=False)
    | keys(Rule.REFUSED, "mixture of depths is not part of Luthier; remove it", mixture_of_depths=None)
    | keys(Rule.REFUSED, "the router's auxiliary loss comes in a later version", moe_aux_loss_coef=None)
    | keys(Rule.REFUSED, "training from random weights comes in a later version", train_from_scratch=False)
    | keys(
        Rule.REFUSED, "use model.dtype=float32, which keeps all weights in float32", upcast_layernorm=False
    )
    | keys(
        Rule.REFUSED,
        "models come from the Hugging Face hub or a local folder; download it and give its path",
        ms_hub_token=None,
        om_hub_token=None,
    )
    | keys(
        Rule.REFUSED,
        "training on a quantized model comes in a later version; remove it to train on the full weights",
        quantization_bit=None,
    )
    | keys(
        Rule.NOTED,
        "changes speed and memory only; Luthier's own kernels are used",
        use_unsloth=False,
        use_unsloth_gc=False,
        enable_liger_kernel=False,
        use_liger_kernel=False,
        liger_kernel_config=None,
        use_v1_kernels=False,
    )
    | keys(Rule.NOTED, "log-probabilities are always computed in float32 here", upcast_lmhead_output=False)
    | keys(
        Rule.SILENT,
        use_fast_tokenizer=True,
        low_cpu_mem_usage=True,
        use_reentrant_gc=True,
        offload_folder="offload",
        use_kv_cache=True,
        print_param_status=False,
        quantization_method="bnb",
        quantization_type="nf4",
        double_quantization=True,
        quantization_device_map=None,
    )
    | keys(
        Rule.NOTED,
        "is about generating and has no effect on this training",
        infer_backend="huggingface",
        infer_dtype="auto",
        vllm_maxlen=4096,
        vllm_gpu_util=0.7,
        vllm_enforce_eager=False,
        vllm_max_lora_rank=32,
        vllm_config=None,
        sglang_maxlen=4096,
        sglang_mem_fraction=0.7,
        sglang_tp_size=-1,
        sglang_config=None,
        sglang_lora_backend="triton",
        do_sample=True,
        temperature=0.95,
        top_p=0.7,
        top_k=50,
        num_beams=1,
        max_length=1024,
        max_new_tokens=1024,
        repetition_penalty=1.0,
        length_penalty=1.0,
        skip_special_tokens=True,
        eval_num_beams=None,
        generation_max_length=None,
        generation_num_beams=None,
        generation_config=None,
    )
    | keys(
        Rule.REFUSED,
        "images, videos and audio come in a later version; remove it for a text-only run",
        image_max_pixels=768 * 768,
        image_min_pixels=32 * 32,
        image_do_pan_and_scan=False,
        crop_to_patches=False,
        video_max_pixels=256 * 256,
        video_min_pixels=16 * 16,
        video_fps=2.0,
        video_maxlen=128,
        use_audio_in_video=False,
        audio_sampling_rate=16000,
        media_dir=None,
        freeze_vision_tower=True,
        freeze_multi_modal_projector=True,
        freeze_language_model=False,
    )
    | keys(
        Rule.REFUSED,
        "is about exporting a model, not about training one; remove it",
        export_dir=None,
        export_size=5,
        export_device="cpu",
        export_quantization_bit=None,
        export_quantization_dataset=None,
        export_quantization_nsamples=128,
        export_quantization_maxlen=1024,
        export_legacy_format=False,
        export_hub_model_id=None,
    )
    | keys(
        Rule.REFUSED,
        "KTransformers is not part of Luthier; remove it",
        use_kt=False,
        kt_weight_path=None,
        kt_expert_checkpoint_path=None,
        kt_use_lora_experts=None,
        kt_lora_expert_num=None,
        kt_lora_expert_intermediate_size=None,
    )
    | keys(
        Rule.REFUSED,
        "LLaMA-Factory derives this and refuses it in a file; remove it",
        compute_dtype=None,
        device_map=None,
        model_max_length=None,
        block_diag_attn=False,
    )
)

_DATA = (
    direct(
        max_samples=("data.max_samples", None),
        preprocessing_num_workers=("data.workers", None),
        default_system=("data.default_system", None),
        mask_history=("data.mask_history", False),
        train_on_prompt=("data.train_on_prompt", False),
        val_size=("data.dev_split", 0.0),
    )
    | read(
        template=("data.template", None),
        dataset=("data.train", None),
        eval_dataset=("data.eval", None),
        dataset_dir=("data.directory", "data"),
        cutoff_len=("data.max_length", 2048),
        packing=("data.packing", None),
        neat_packing=("data.packing", False),
        enable_thinking=("data.template", True),
        disable_shuffling=("data.shuffle", False),
    )
    | keys(
        Rule.SILENT,
        buffer_size=16384,
        overwrite_cache=False,
        data_shared_file_system=False,
        eval_on_each_dataset=False,
    )
    | keys(
        Rule.REFUSED, "streaming data comes in a later version; remove it to read the files", streaming=False
    )
    | keys(
        Rule.REFUSED,
        "interleaving comes in a later version; remove it to put the data sets one after another",
        mix_strategy="concat",
        interleave_probs=None,
    )
    | keys(
        Rule.REFUSED, "there is no padding in a flat row that could be learnt", ignore_pad_token_for_loss=True
    )
    | keys(Rule.REFUSED, "the template writes tool calls in its own format; remove it", tool_format=None)
    | keys(Rule.REFUSED, "keeping earlier reasoning comes in a later version", preserve_thinking=False)
    | keys(
        Rule.NOTED,
        "tokenized data is kept under data.cache and rebuilt when anything changes; this folder is not used",
        tokenized_path=None,
    )
    | keys(
        Rule.NOTED,
        "packing fills rows from groups of 1000 here, as by default there",
        preprocessing_batch_size=1000,
    )
)

_METHOD = (
    read(
        stage=("stage.type", "sft"),
        finetuning_type=("method.type", "lora"),
        freeze_trainable_layers=("method.layers", 2),
        freeze_trainable_modules=("method.modules", "all"),
        freeze_extra_modules=("method.extra_modules", None),
        additional_target=("method.modules_to_save", None),
        create_new_adapter=("method.create_new_adapter", False),
        lora_alpha=("method.alpha", None),
        lora_dropout=("method.dropout", 0.0),
        lora_rank=("method.rank", 8),
        lora_target=("method.targets", "all"),
        pure_bf16=("model.dtype", False),
    )
    | direct(plot_loss=("train.plots", False))
    | keys(
        Rule.REFUSED,
        "this kind of adapter comes in a later version; remove it for plain LoRA",
        loraplus_lr_ratio=None,
        use_rslora=False,
        use_dora=False,
        pissa_init=False,
    )
    | keys(Rule.SILENT, loraplus_lr_embedding=1e-6, pissa_iter=16, pissa_convert=False)
    | keys(
        Rule.REFUSED,
        "OFT comes in a later version; remove it",
        module_dropout=0.0,
        oft_rank=0,
        oft_block_size=32,
        oft_target="all",
    )
    | keys(Rule.REFUSED, "LLaMA-Pro's block expansion comes in a later version", use_llama_pro=False)
    | keys(
        Rule.REFUSED,
        "this loss comes in a later version; remove it for cross-entropy",
        use_dft_loss=False,
        use_asft_loss=False,
        use_eaft_loss=False,
    )
    | keys(Rule.SILENT, asft_alpha=0.1, eaft_alpha=1.0, include_effective_tokens_per_second=False)
    | keys(
        Rule.REFUSED,
        "this optimizer comes in a later version; remove it for AdamW",
        use_galore=False,
        use_apollo=False,
        use_badam=False,
        use_adam_mini=False,
        use_muon=False,
    )
    | keys(
        Rule.SILENT,
        galore_target="all",
        galore_rank=16,
        galore_update_interval=200,
        galore_scale=2.0,
        galore_proj_type="std",
        galore_layerwise=False,
        apollo_target="all",
        apollo_rank=16,
        apollo_update_interval=200,
        apollo_scale=32.0,
        apollo_proj="random",
        apollo_proj_type="std",
        apollo_scale_type="channel",
        apollo_layerwise=False,
        apollo_scale_front=False,
        badam_mode="layer",
        badam_start_block=None,
        badam_switch_mode="ascending",
        badam_switch_interval=50,
        badam_update_ratio=0.05,
        badam_mask_mode="adjacent",
        badam_verbose=0,
    )
    | keys(
        Rule.NOTED,
        "belongs to preference or reinforcement learning and has no effect on this stage",
        pref_beta=0.1,
        pref_ftx=0.0,
        pref_bco_weight=0.0,
        pref_loss="sigmoid",
        dpo_label_smoothing=0.0,
        kto_chosen_weight=1.0,
        kto_rejected_weight=1.0,
        simpo_gamma=0.5,
        ppo_buffer_size=1,
        ppo_epochs=4,
        ppo_score_norm=False,
        ppo_target=6.0,
        ppo_whiten_rewards=False,
        ref_model=None,
        ref_model_adapters=None,
        ref_model_quantization_bit=None,
        reward_model=None,
        reward_model_adapters=None,
        reward_model_quantization_bit=None,
        reward_model_type="lora",
        ld_alpha=None,
    )
    | keys(Rule.REFUSED, "write report_to: swanlab", use_swanlab=False)
    | keys(
        Rule.SILENT,
        swanlab_project="llamafactory",
        swanlab_workspace=None,
        swanlab_run_name=None,
        swanlab_mode="cloud",
        swanlab_api_key=None,
        swanlab_logdir=None,
        swanlab_lark_webhook_url=None,
        swanlab_lark_secret=None,
    )
    | keys(
        Rule.REFUSED,
        "this training backend is not part of Luthier; remove it",
        use_mca=False,
        use_hyper_parallel=False,
        hyper_parallel_args=None,
    )
    | keys(
        Rule.REFUSED, "token accuracy comes in a later version; eval_loss is reported", compute_accuracy=False
    )
    | keys(
        Rule.REFUSED,
        "early stopping comes in a later version; load_best_model_at_end keeps the best weights",
        early_stopping_steps=None,
    )
)

_EVALUATION = keys(
    Rule.REFUSED,
    "belongs to LLaMA-Factory's benchmark command, not to training; remove it",
    task=None,
    task_dir="evaluation",
    batch_size=4,
    lang="en",
    n_shot=5,
    save_dir=None,
    download_mode="reuse_dataset_if_exists",
)

TOOL_KEYS: dict[str, Key] = _MODEL | _DATA | _METHOD | _EVALUATION
"""The keys of LLaMA-Factory's own; transformers' training arguments are in `training_keys.py`."""
