"""The model, data and generation keys of a LLaMA-Factory 0.9.5 file: their defaults there, what becomes of them here.

A table, one entry a key. Keys that need more than a name and a converter are `READ`: the `llamafactory_*`
modules translate them by subject. Nothing that could change a result is accepted without a word.
"""

from __future__ import annotations

from luthier.recipe.key_rules import Key, Rule, direct, keys, read

MODEL_KEYS: dict[str, Key] = (
    direct(
        model_name_or_path=("model.path", None),
        cache_dir=("model.cache_dir", None),
        model_revision=("model.revision", "main"),
        hf_hub_token=("model.token", None),
        trust_remote_code=("model.trust_remote_code", False),
        upcast_layernorm=("model.upcast_layernorm", False),
    )
    | read(
        adapter_name_or_path=("method.adapters", None),
        split_special_tokens=("data.parse_special_tokens", False),
        flash_attn=("model.attention", "auto"),
        disable_gradient_checkpointing=("model.gradient_checkpointing", False),
        use_unsloth_gc=("model.activation_offload", False),
        rope_scaling=("model.rope_scaling", None),
        resize_vocab=("model.vocabulary.resize", False),
        add_tokens=("model.vocabulary.add", None),
        add_special_tokens=("model.vocabulary.add_special", None),
        new_special_tokens_config=("model.vocabulary.descriptions", None),
        init_special_tokens=("model.vocabulary.noise", "noise_init"),
    )
    | read(
        "where it is written out; the same bits either way",
        use_reentrant_gc=("model.gradient_checkpointing.reentrant", True),
    )
    | keys(Rule.REFUSED, "write the adapter's whole path into adapter_name_or_path", adapter_folder=None)
    | keys(Rule.REFUSED, "shifted sparse attention is not part of Luthier; remove it", shift_attn=False)
    | keys(Rule.REFUSED, "mixture of depths is not part of Luthier; remove it", mixture_of_depths=None)
    | keys(
        Rule.REFUSED,
        "the router's auxiliary loss comes in a later version; remove it",
        moe_aux_loss_coef=None,
    )
    | keys(
        Rule.REFUSED,
        "training from random weights comes in a later version; remove it to start from the trained ones",
        train_from_scratch=False,
    )
    | keys(
        Rule.REFUSED,
        "models come from the Hugging Face hub or a local folder; download it and give its path",
        ms_hub_token=None,
        om_hub_token=None,
    )
    | read(
        "4 or 8 with bnb, 1 to 6 or 8 with hqq",
        quantization_bit=("model.quantization.bits", None),
    )
    | read(
        "with quantization_bit; eetq is refused",
        quantization_method=("model.quantization.type", "bnb"),
    )
    | read(
        "with quantization_bit: 4 and bnb",
        quantization_type=("model.quantization.quant_type", "nf4"),
        double_quantization=("model.quantization.double", True),
    )
    | keys(
        Rule.REFUSED,
        "a device map is for generating, and that tool refuses it in training too; remove it",
        quantization_device_map=None,
    )
    | keys(
        Rule.NOTED,
        "changes speed and memory only; Luthier's own kernels are used",
        use_unsloth=False,
        enable_liger_kernel=False,
        use_v1_kernels=False,
    )
    | keys(
        Rule.NOTED,
        "log-probabilities are always computed from logits in float32, here as there",
        upcast_lmhead_output=False,
    )
    | keys(
        Rule.SILENT,
        use_fast_tokenizer=True,
        low_cpu_mem_usage=True,
        offload_folder="offload",
        use_kv_cache=True,
        print_param_status=False,
    )
    | direct(
        image_max_pixels=("data.media.image_max_pixels", 768 * 768),
        image_min_pixels=("data.media.image_min_pixels", 32 * 32),
        video_max_pixels=("data.media.video_max_pixels", 256 * 256),
        video_min_pixels=("data.media.video_min_pixels", 16 * 16),
        video_fps=("data.media.video_fps", 2.0),
        video_maxlen=("data.media.video_max_frames", 128),
        audio_sampling_rate=("data.media.audio_sampling_rate", 16000),
    )
    | read(
        "false is the processor's own setting, as there",
        image_do_pan_and_scan=("data.media.pan_and_scan", False),
        crop_to_patches=("data.media.crop_to_patches", False),
    )
    | keys(
        Rule.REFUSED,
        "the sound of a film is not read; give it as an audio of its own and remove this",
        use_audio_in_video=False,
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

_QUANTIZED = (
    "quantized exports, GGUF and Ollama come in a later version; remove it to export the full weights, and quantize "
    "them with another tool"
)

EXPORT_KEYS: dict[str, Key] = (
    read(
        export_dir=("export.output", None),
        export_size=("export.shard_size", 5),
        export_device=("export.device", "cpu"),
    )
    | keys(
        Rule.REFUSED,
        _QUANTIZED,
        export_quantization_bit=None,
        export_quantization_dataset=None,
        export_quantization_nsamples=128,
        export_quantization_maxlen=1024,
    )
    | keys(Rule.REFUSED, "weights are written as safetensors only; remove it", export_legacy_format=False)
    | read("uploaded once it is verified, private", export_hub_model_id=("export.push_to_hub.repo", None))
)

GENERATION_KEYS: dict[str, Key] = (
    read(
        do_sample=("generation.do_sample", True),
        temperature=("generation.temperature", 0.95),
        top_p=("generation.top_p", 0.7),
        top_k=("generation.top_k", 50),
        num_beams=("generation.num_beams", 1),
        repetition_penalty=("generation.repetition_penalty", 1.0),
        length_penalty=("generation.length_penalty", 1.0),
        skip_special_tokens=("generation.skip_special_tokens", True),
    )
    | read("0 leaves the length to max_length", max_new_tokens=("generation.max_new_tokens", 1024))
    | read("where max_new_tokens is 0", max_length=("generation.max_length", 1024))
    | read("at evaluations", generation_max_length=("generation.max_length", None))
    | read("at evaluations", generation_num_beams=("generation.num_beams", None))
    | read("at evaluations", eval_num_beams=("generation.num_beams", None))
    | read("with export_dir; of a file that only answers, model.dtype", infer_dtype=("export.dtype", "auto"))
    | read("huggingface is hf; vllm", infer_backend=("generation.engine", "huggingface"))
    | keys(
        Rule.REFUSED,
        "write its values into the file itself (temperature, top_p, max_new_tokens and the others)",
        generation_config=None,
    )
    | keys(
        Rule.NOTED,
        "sets up that tool's own engine; here generation.rows and generation.memory_gib do",
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
    )
)

BENCHMARK_KEYS: dict[str, Key] = keys(
    Rule.REFUSED,
    "belongs to LLaMA-Factory's benchmark command, whose settings are options of `luthier evaluate` here; remove it",
    task=None,
    task_dir="evaluation",
    batch_size=4,
    lang="en",
    n_shot=5,
    save_dir=None,
    download_mode="reuse_dataset_if_exists",
)

DATA_KEYS: dict[str, Key] = (
    direct(
        max_samples=("data.max_samples", None),
        preprocessing_num_workers=("data.workers", None),
        default_system=("data.default_system", None),
        tool_format=("data.tool_format", None),
        mask_history=("data.mask_history", False),
        train_on_prompt=("data.train_on_prompt", False),
        val_size=("data.dev_split", 0.0),
    )
    | read(
        template=("data.template", None),
        dataset=("data.train", None),
        eval_dataset=("data.eval", None),
        cutoff_len=("data.max_length", 2048),
        packing=("data.packing", None),
        neat_packing=("data.packing", False),
        disable_shuffling=("data.shuffle", False),
    )
    | read(
        "REMOTE:owner/name is read from the hub; ONLINE names data sets there",
        dataset_dir=("data.directory", "data"),
    )
    | read(
        "the rows and the order of that tool, which draws with its seed once for all epochs",
        mix_strategy=("data.mix.strategy", "concat"),
        interleave_probs=("data.mix.probabilities", None),
    )
    | read(
        "of reasoning templates: empty thoughts are learnt, or in the prompt (null, false); false takes reasoning out",
        enable_thinking=("data.thinking.empty", True),
    )
    | read(
        "of reasoning templates: earlier reasoning with mask_history, preferences and prompts",
        preserve_thinking=("data.thinking.history", False),
    )
    | keys(
        Rule.SILENT,
        overwrite_cache=False,
        data_shared_file_system=False,
        eval_on_each_dataset=False,
    )
    | read("needs max_steps, as there", streaming=("data.stream", False))
    | read("with streaming", buffer_size=("data.stream.buffer", 16384))
    | keys(
        Rule.REFUSED,
        "there is no padding in a flat row that could be learnt; remove it",
        ignore_pad_token_for_loss=True,
    )
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
    | direct(media_dir=("data.media.directory", None))
)
