"""The model of the contenders without a loader of their own: float32, LoRA on all linear layers."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)


def load(job: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model and its tokenizer; the seed is set first, as every contender does."""
    set_seed(job["seed"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(job["model"])


def lora(job: dict[str, Any]) -> LoraConfig:
    """Rank and alpha of the job on every linear layer but the head, without dropout."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )


def training_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """`TrainingArguments` that make the contenders do the same updates; all else stays default."""
    return {
        "output_dir": job["output"],
        "per_device_train_batch_size": job["rows_per_step"],
        "max_steps": job["steps"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": job["seed"],
        "use_cpu": True,
    }
