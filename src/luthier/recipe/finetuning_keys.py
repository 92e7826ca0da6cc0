"""The fine-tuning keys of a LLaMA-Factory 0.9.5 file: methods, losses, optimizers and trackers of that tool's own."""

from __future__ import annotations

from luthier.recipe.key_rules import Key, Rule, direct, keys, read

_METHODS = (
    read(
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
    | read("pt, sft, rm, dpo, kto and ppo", stage=("stage.type", "sft"))
    | read("lora, oft, freeze and full", finetuning_type=("method.type", "lora"))
    | read("of lora", use_rslora=("method.rslora", False), use_dora=("method.dora", False))
    | read("of lora", loraplus_lr_ratio=("method.lora_plus_ratio", None))
    | read("with loraplus_lr_ratio", loraplus_lr_embedding=("method.lora_plus_embedding_lr", 1e-6))
    | read("of lora; the base is never changed here", pissa_init=("method.init", False))
    | read("with pissa_init; -1 is the exact SVD", pissa_iter=("method.init_iterations", 16))
    | read("what is saved is always the converted adapter", pissa_convert=("method.init", False))
    | read(
        "of oft",
        module_dropout=("method.dropout", 0.0),
        oft_rank=("method.blocks", 0),
        oft_block_size=("method.block_size", 32),
        oft_target=("method.targets", "all"),
    )
    | read(
        "of freeze: the model was expanded before, as there; with lora refused",
        use_llama_pro=("method.type", False),
    )
    | read(
        "the parts that are held still, of a model with images or sounds",
        freeze_vision_tower=("model.frozen_parts", True),
        freeze_multi_modal_projector=("model.frozen_parts", True),
        freeze_language_model=("model.frozen_parts", False),
    )
    | keys(
        Rule.REFUSED,
        "this training backend is not part of Luthier; remove it",
        use_mca=False,
        use_hyper_parallel=False,
        hyper_parallel_args=None,
    )
)

NO_EFFECT = "belongs to preference or reinforcement learning and has no effect on this stage"

_LOSSES = (
    read(
        "of stage: sft",
        use_dft_loss=("stage.loss", False),
        use_asft_loss=("stage.loss", False),
        use_eaft_loss=("stage.loss", False),
    )
    | read("with use_asft_loss", asft_alpha=("stage.kl_weight", 0.1))
    | read("with use_eaft_loss", eaft_alpha=("stage.entropy_power", 1.0))
    | keys(Rule.SILENT, include_effective_tokens_per_second=False)
)

_PREFERENCES = (
    read("of dpo and kto", pref_beta=("stage.beta", 0.1), pref_ftx=("stage.sft_weight", 0.0))
    | read(
        "of dpo; hinge, ipo and kto_pair train the sigmoid loss there, and what they say here",
        pref_loss=("stage.loss", "sigmoid"),
    )
    | read(
        "of dpo: w becomes {<pref_loss>: 1 / (1 + w), bco_pair: w / (1 + w)}",
        pref_bco_weight=("stage.loss", 0.0),
    )
    | read("of dpo with pref_loss: sigmoid", dpo_label_smoothing=("stage.label_smoothing", 0.0))
    | read("of dpo with pref_loss: simpo", simpo_gamma=("stage.gamma", 0.5))
    | read(
        "of dpo; for the policy alone there, for the reference too here", ld_alpha=("stage.ld_alpha", None)
    )
    | read(
        "of kto",
        kto_chosen_weight=("stage.desirable_weight", 1.0),
        kto_rejected_weight=("stage.undesirable_weight", 1.0),
    )
    | read(
        "of dpo (not orpo, simpo), kto, ppo and use_asft_loss",
        ref_model=("stage.reference.path", None),
        ref_model_adapters=("stage.reference.adapters", None),
    )
    | read(
        "with ref_model; 4 or 8 with bnb, 1 to 6 or 8 with hqq",
        ref_model_quantization_bit=("stage.reference.quantization.bits", None),
    )
    | read(
        "of ppo; times per_device_train_batch_size and gradient_accumulation_steps it is stage.prompts_per_rollout",
        ppo_buffer_size=("stage.minibatches", 1),
    )
    | read(
        "of ppo",
        ppo_epochs=("stage.epochs", 4),
        ppo_score_norm=("stage.score_norm", False),
        ppo_target=("stage.kl.target", 6.0),
        ppo_whiten_rewards=("stage.whiten_rewards", False),
        reward_model=("stage.rewards", None),
    )
    | read("of ppo with reward_model_type: full; one", reward_model_adapters=("stage.rewards", None))
    | read(
        "of ppo with reward_model_type: full; 4 or 8 with bnb, 1 to 6 or 8 with hqq",
        reward_model_quantization_bit=("stage.rewards", None),
    )
    | read(
        "of ppo; lora and full are type: model, api is type: http",
        reward_model_type=("stage.rewards", "lora"),
    )
)

_OPTIMIZERS = (
    read(
        use_galore=("optim.type", False),
        use_apollo=("optim.type", False),
        use_adam_mini=("optim.type", False),
        use_muon=("optim.type", False),
    )
    | read("with badam_mode: ratio it becomes badam_ratio", use_badam=("optim.type", False))
    | read(
        "with use_galore",
        galore_target=("optim.targets", "all"),
        galore_rank=("optim.rank", 16),
        galore_update_interval=("optim.update_every", 200),
        galore_scale=("optim.scale", 2.0),
        galore_proj_type=("optim.side", "std"),
        galore_layerwise=("optim.layerwise", False),
    )
    | read(
        "with use_apollo",
        apollo_target=("optim.targets", "all"),
        apollo_rank=("optim.rank", 16),
        apollo_update_interval=("optim.update_every", 200),
        apollo_scale=("optim.scale", 32.0),
        apollo_proj=("optim.projection", "random"),
        apollo_proj_type=("optim.side", "std"),
        apollo_scale_type=("optim.scale_type", "channel"),
        apollo_layerwise=("optim.layerwise", False),
        apollo_scale_front=("optim.scale_front", False),
    )
    | read(
        "with use_badam",
        badam_mode=("optim.type", "layer"),
        badam_start_block=("optim.start_block", None),
        badam_switch_mode=("optim.order", "ascending"),
        badam_switch_interval=("optim.switch_every", 50),
        badam_update_ratio=("optim.ratio", 0.05),
        badam_mask_mode=("optim.mask", "adjacent"),
    )
    | keys(Rule.SILENT, badam_verbose=0)
)


def _swanlab(name: str, default: str | None, text: str) -> dict[str, Key]:
    return {f"swanlab_{name}": Key(Rule.REFUSED, default, text, only_with="use_swanlab")}


_WATCHING = (
    direct(plot_loss=("train.plots", False))
    | read(compute_accuracy=("train.metrics", False))
    | read("needs load_best_model_at_end: true", early_stopping_steps=("train.early_stopping", None))
    | read(use_swanlab=("train.report_to", False))
    | _swanlab("project", "llamafactory", "set SWANLAB_PROJECT in the environment and remove it")
    | _swanlab("workspace", None, "set SWANLAB_WORKSPACE in the environment and remove it")
    | _swanlab("run_name", None, "write it as run_name")
    | _swanlab("mode", "cloud", "set SWANLAB_MODE in the environment and remove it")
    | _swanlab("api_key", None, "set SWANLAB_API_KEY in the environment and remove it")
    | _swanlab("logdir", None, "set SWANLAB_LOG_DIR in the environment and remove it")
    | _swanlab("lark_webhook_url", None, "messages to Lark are not part of Luthier; remove it")
    | _swanlab("lark_secret", None, "messages to Lark are not part of Luthier; remove it")
)

FINETUNING_KEYS: dict[str, Key] = _METHODS | _LOSSES | _PREFERENCES | _OPTIMIZERS | _WATCHING
