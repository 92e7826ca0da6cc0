"""Keys that are gone: from LLaMA-Factory's early versions (LLaMA-Efficient-Tuning) and transformers 3 and 4.

Where today's key means the same, the old one is only another name of it. The rest are entries like all others,
with the value as default that leaves today's meaning as it is.
"""

from __future__ import annotations

from luthier.recipe.key_rules import Key, Rule, direct, keys, read

EARLY_NAMES = {
    "checkpoint_dir": "adapter_name_or_path",
    "dataset_name": "dataset",
    "dev_ratio": "val_size",
    "hf_auth_token": "hf_hub_token",
    "max_train_samples": "max_samples",
    "neft_alpha": "neftune_noise_alpha",
    "prompt_template": "template",
}
"""Names of LLaMA-Factory before version 0.4."""

EARLY_MARKS = EARLY_NAMES.keys() | {
    "num_hidden_layers",
    "padding_side",
    "resume_lora_training",
    "use_auth_token",
}
"""What shows that a file was written for such a version, when many defaults were others."""

OLDER_NAMES = EARLY_NAMES | {
    "badam_switch_block_every": "badam_switch_interval",
    "cache_path": "tokenized_path",
    "dpo_beta": "pref_beta",
    "dpo_ftx": "pref_ftx",
    "dpo_loss": "pref_loss",
    "dpo_ref_model": "ref_model",
    "dpo_ref_model_checkpoint": "ref_model_adapters",
    "image_dir": "media_dir",
    "image_resolution": "image_max_pixels",
    "lora_bf16_mode": "pure_bf16",
    "name_module_trainable": "freeze_trainable_modules",
    "new_special_tokens": "add_special_tokens",
    "num_layer_trainable": "freeze_trainable_layers",
    "orpo_beta": "pref_beta",
    "ref_model_checkpoint": "ref_model_adapters",
    "reward_model_checkpoint": "reward_model_adapters",
    "sft_packing": "packing",
    "video_resolution": "video_max_pixels",
    # transformers; `activation_checkpointing` is the newer name of a key that 0.9.5 has under the older one
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
    "xpu_backend": "ddp_backend",
}
"""Names of other versions that mean the same."""

_EARLY_TRANSLATED = (
    direct(padding_side=("model.padding_side", "right"), tokenizer_name=("model.tokenizer", None))
    | read(resume_lora_training=("method.create_new_adapter", True))
    | read(
        "for data sets that are named by their files; else in dataset_info.json",
        prompt_column=("data.train", None),
        query_column=("data.train", None),
        response_column=("data.train", None),
        history_column=("data.train", None),
        split=("data.train", "train"),
    )
)

_EARLY_REFUSED = (
    keys(
        Rule.REFUSED,
        "question and answer share one length here; remove both and write cutoff_len, their sum",
        max_source_length=None,
        max_target_length=None,
    )
    | keys(
        Rule.REFUSED,
        "question and answer share cutoff_len here, in proportion to their lengths; remove it",
        reserved_label_len=1,
    )
    | keys(
        Rule.REFUSED,
        "write the text as default_system, or into a template of your own",
        source_prefix=None,
        system_prompt=None,
    )
    | keys(Rule.REFUSED, "max_samples bounds every data set; write that", max_eval_samples=None)
    | keys(Rule.REFUSED, "the config is the model's own; remove it", config_name=None)
    | keys(Rule.REFUSED, "write rope_scaling to reach longer positions", resize_position_embeddings=False)
    | keys(
        Rule.REFUSED,
        "P-tuning is not part of Luthier; write finetuning_type: lora and remove it",
        pre_seq_len=None,
        prefix_projection=False,
    )
    | keys(
        Rule.REFUSED,
        "whether a model sees is read from its own config; remove it",
        visual_inputs=False,
    )
    | keys(
        Rule.REFUSED,
        "images, videos and audio come in a later version; remove it for a text-only run",
        train_mm_proj_only=False,
    )
    | keys(
        Rule.REFUSED,
        "start the run with torchrun instead of Ray; remove it",
        placement_strategy="PACK",
        ray_run_name=None,
        ray_storage_path="./saves",
        ray_storage_filesystem=None,
        resources_per_worker=None,
    )
    | keys(
        Rule.REFUSED,
        "KTransformers is not part of Luthier; remove it",
        chunk_size=8192,
        cpu_infer=32,
        kt_force_think=False,
        kt_maxlen=4096,
        kt_mode="normal",
        kt_optimize_rule=None,
        kt_use_cuda_graph=True,
        mode="normal",
    )
    | keys(
        Rule.REFUSED,
        "Megatron is not part of Luthier; remove it",
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        moe_grouped_gemm=False,
        moe_token_dispatcher_type=None,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        pipeline_model_parallel_size=1,
        recompute_granularity=None,
        sequence_parallel=False,
        tensor_model_parallel_size=1,
        use_distributed_optimizer=False,
        virtual_pipeline_model_parallel_size=None,
    )
)

_EARLY_ACCEPTED = (
    keys(Rule.NOTED, "the token of `hf auth login` is used of itself", use_auth_token=False)
    | keys(Rule.NOTED, "is read from the model's config", num_hidden_layers=None)
    | keys(Rule.NOTED, "belongs to reinforcement learning and has no effect on this stage", ppo_logger=None)
    | keys(Rule.SILENT, disable_version_checking=False, pad_to_max_length=False)
)

_TRANSFORMERS = (
    read("write hub_model_id: OWNER/NAME", push_to_hub_organization=("train.push_to_hub.repo", None))
    | keys(Rule.REFUSED, "write eval_strategy: steps", evaluate_during_training=False)
    | keys(
        Rule.REFUSED,
        "rows are not padded here, so grouping them by length saves nothing; remove it",
        group_by_length=False,
    )
    | keys(Rule.REFUSED, "write optim: adafactor", adafactor=False)
    | keys(Rule.SILENT, fsdp_min_num_params=0, fsdp_transformer_layer_cls_to_wrap=None)
    | keys(Rule.REFUSED, "write fsdp: full_shard", sharded_ddp="")
    | keys(Rule.REFUSED, "SageMaker's model parallelism is not part of Luthier; remove it", mp_parameters="")
    | keys(
        Rule.REFUSED,
        "TPUs and XLA are not part of Luthier; remove it to train on a GPU or a CPU",
        tpu_num_cores=None,
        tpu_metrics_debug=False,
    )
    | keys(
        Rule.REFUSED,
        "hyperparameters are searched with the verb sweep here; remove it",
        ray_scope="last",
    )
    | keys(
        Rule.REFUSED,
        "metrics here see sums over tokens, not whole batches; name functions in train.metrics of a native recipe",
        include_inputs_for_metrics=False,
    )
    | keys(
        Rule.NOTED,
        "torch's own mixed precision is used; Apex and its levels are gone",
        half_precision_backend="auto",
        fp16_backend="auto",
        fp16_opt_level="O1",
    )
    | keys(
        Rule.NOTED,
        "changes speed only; torch's own kernels are used",
        use_ipex=False,
        jit_mode_eval=False,
    )
    | keys(Rule.NOTED, "an Apple GPU is used of itself", use_mps_device=False)
    | keys(Rule.NOTED, "weights are always saved as safetensors", save_safetensors=True)
    | keys(
        Rule.NOTED,
        "is gone from transformers too and has no effect",
        include_tokens_per_second=False,
        use_legacy_prediction_loop=False,
        past_index=-1,
        dispatch_batches=None,
        split_batches=None,
    )
)

EARLIER_KEYS: dict[str, Key] = _EARLY_TRANSLATED | _EARLY_REFUSED | _EARLY_ACCEPTED | _TRANSFORMERS
