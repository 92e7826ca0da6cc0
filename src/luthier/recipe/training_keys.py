"""transformers' `TrainingArguments` as LLaMA-Factory 0.9.5 takes them, and what later versions added."""

from __future__ import annotations

from luthier.recipe.key_rules import Key, Rule, direct, keys, read

_TRANSLATED = (
    direct(
        output_dir=("train.output", None),
        per_device_train_batch_size=("train.rows_per_device", 8),
        gradient_accumulation_steps=("train.accumulation", 1),
        num_train_epochs=("train.epochs", 3.0),
        learning_rate=("optim.lr", 5e-5),
        weight_decay=("optim.weight_decay", 0.0),
        max_grad_norm=("optim.max_grad_norm", 1.0),
        save_total_limit=("train.save_total_limit", None),
        save_only_model=("train.save_only_model", False),
        load_best_model_at_end=("train.load_best", False),
        greater_is_better=("train.greater_is_better", None),
        seed=("train.seed", 42),
        data_seed=("train.data_seed", None),
        tf32=("train.tf32", None),
        full_determinism=("train.deterministic", False),
    )
    | read(
        max_steps=("train.max_steps", -1),
        lr_scheduler_kwargs=("optim.schedule_options", None),
        warmup_steps=("optim.warmup", 0),
        warmup_ratio=("optim.warmup", None),
        adam_beta1=("optim.betas", 0.9),
        adam_beta2=("optim.betas", 0.999),
        adam_epsilon=("optim.eps", 1e-8),
        bf16=("train.precision", False),
        fp16=("train.precision", False),
        bf16_full_eval=("train.eval_precision", False),
        fp16_full_eval=("train.eval_precision", False),
        gradient_checkpointing=("model.gradient_checkpointing", False),
        neftune_noise_alpha=("train.neftune_alpha", None),
        torch_compile=("train.compile", False),
        torch_compile_backend=("train.compile.backend", None),
        torch_compile_mode=("train.compile.mode", None),
        auto_find_batch_size=("train.fit_memory", False),
        logging_strategy=("train.log_every", "steps"),
        report_to=("train.report_to", "none"),
        eval_strategy=("train.eval_every", "no"),
        metric_for_best_model=("train.best_metric", None),
        do_train=("train.eval_only", False),
        do_eval=("train.eval_at_end", False),
        predict_with_generate=("train.generate_at_eval", False),
        resume_from_checkpoint=("train.resume", None),
        overwrite_output_dir=("train.overwrite", False),
        hub_private_repo=("train.push_to_hub.private", None),
        hub_revision=("train.push_to_hub.revision", None),
        hub_token=("model.token", None),
    )
    | read(
        "use_reentrant alone", gradient_checkpointing_kwargs=("model.gradient_checkpointing.reentrant", None)
    )
    | read("a verb of its own: run `luthier predict` with the file", do_predict=("data.eval", False))
    | read("of a file that answers a data set", per_device_eval_batch_size=("generation.rows", 8))
    | read("of pt and sft", label_smoothing_factor=("stage.label_smoothing", 0.0))
    | read(lr_scheduler_type=("optim.schedule", "linear"))
    | read("see docs/optimizers.md for the names", optim=("optim.type", "adamw_torch_fused"))
    | read("of sgd, schedule_free_adamw, galore and apollo", optim_args=("optim", None))
    | read("of galore and apollo", optim_target_modules=("optim.targets", None))
    | read("a share of all steps needs max_steps", logging_steps=("train.log_every", 500))
    | read("a share of all steps needs max_steps", eval_steps=("train.eval_every", None))
    | read("a share of all steps needs max_steps", save_steps=("train.save_every", 500))
    | read(
        "best is refused: write steps and load_best_model_at_end", save_strategy=("train.save_every", "steps")
    )
    | read("group_by_length is refused", train_sampling_strategy=("data.shuffle", "random"))
    | read("needs hub_model_id", push_to_hub=("train.push_to_hub", False))
    | read("as OWNER/NAME", hub_model_id=("train.push_to_hub.repo", None))
    | read("the finished model alone is uploaded", hub_strategy=("train.push_to_hub", "every_save"))
    | read("its path, or its JSON in place", deepspeed=("parallel.config", None))
    | read("FSDP2 is used, with each decoder layer a group of its own", fsdp=("parallel.type", None))
    | read("layers are wrapped of themselves", fsdp_config=("parallel", None))
    | read(
        "over a day: the default, for nobody waits for the preparation here",
        ddp_timeout=("parallel.timeout", 1800),
    )
)

_EXTRA = keys(
    Rule.EXTRA,
    torch_empty_cache_steps=None,
    logging_first_step=False,
    log_on_each_node=True,
    log_level="passive",
    log_level_replica="warning",
    run_name=None,
    project="huggingface",
    trackio_space_id=None,
    trackio_bucket_id=None,
    trackio_static_space_id=None,
    eval_delay=0,
    eval_on_start=False,
    debug="",
    skip_memory_metrics=True,
    ddp_find_unused_parameters=None,
    ddp_bucket_cap_mb=None,
    ddp_broadcast_buffers=None,
    ddp_static_graph=None,
    ddp_backend=None,
)

_ACCEPTED = (
    keys(
        Rule.SILENT,
        use_cache=False,
        include_num_input_tokens_seen="no",
        logging_nan_inf_filter=True,
        disable_tqdm=None,
        prediction_loss_only=False,
        eval_do_concat_batches=True,
        eval_use_gather_object=False,
        eval_accumulation_steps=None,
        batch_eval_metrics=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        dataloader_multiprocessing_context=None,
        dataloader_in_order=True,
        remove_unused_columns=True,
        label_names=None,
        length_column_name="length",
        local_rank=-1,
        ignore_data_skip=False,
        hub_always_push=False,
        fp8_backend="auto",
        profiler_output_dir=None,
        profiler_wait_steps=1,
        profiler_warmup_steps=1,
        profiler_active_steps=1,
        profiler_repeat=1,
        profiler_record_shapes=True,
        profiler_profile_memory=True,
        profiler_with_stack=True,
    )
    | keys(
        Rule.NOTED,
        "changes speed and memory only; Luthier's own kernels are used",
        use_liger_kernel=False,
        liger_kernel_config=None,
    )
    | keys(
        Rule.NOTED,
        "a loss is always the mean over the tokens of all devices here",
        average_tokens_across_devices=True,
    )
    | keys(Rule.NOTED, "to keep away from a GPU, set CUDA_VISIBLE_DEVICES to nothing", use_cpu=False)
    | keys(Rule.NOTED, "prompts of like length are answered together without it", sortish_sampler=False)
    | keys(Rule.NOTED, "logs are written into the run directory", logging_dir=None)
    | keys(Rule.NOTED, "give torchrun the address", master_addr=None, master_port=None)
)

_REFUSED = (
    keys(
        Rule.REFUSED,
        "metrics here see sums over tokens, not whole batches; name functions in train.metrics of a native recipe",
        include_for_metrics=[],
    )
    | keys(
        Rule.REFUSED,
        "how processes divide a model is written in `parallel` of a native recipe; remove it",
        parallelism_config=None,
        accelerator_config=None,
    )
    | keys(
        Rule.REFUSED,
        "8-bit floating point comes in a later version; remove it",
        fp8=False,
        fp8_enable_fsdp_float8_all_gather=False,
    )
    | keys(
        Rule.REFUSED,
        "start the run with torchrun instead of Ray; remove it",
        ray_num_workers=1,
        ray_init_kwargs=None,
    )
    | keys(
        Rule.REFUSED,
        "profiling comes in a later version; remove it",
        enable_torch_profiler=False,
        profile_modules=None,
    )
    | keys(
        Rule.REFUSED,
        "checkpoints are written by Luthier, once and whole; remove it",
        save_on_each_node=False,
        enable_jit_checkpoint=False,
        restore_callback_states_from_checkpoint=False,
    )
    | keys(Rule.REFUSED, "the last rows of an epoch are trained too; remove it", dataloader_drop_last=False)
)

TRAINING_KEYS: dict[str, Key] = _TRANSLATED | _EXTRA | _ACCEPTED | _REFUSED
