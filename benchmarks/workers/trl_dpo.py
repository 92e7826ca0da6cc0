"""TRL's DPOTrainer at its defaults in float32, given the job's token ids; the job says where it departs from them.

`rows_per_pass` pairs a device with as much accumulation as makes a step; `precompute`: the reference's
log-probabilities before training.
"""

from __future__ import annotations

from typing import Any

import clock
import plain_model
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


class Tokenized(DPOTrainer):  # type: ignore[misc]
    """It has no way to be given token ids; all that follows the tokenization is its own."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def main() -> None:
    job = clock.load_job()
    clock.install()
    clock.time_calls(DPOTrainer, "_precompute_ref_logps", "precompute")
    model, tokenizer = plain_model.load(job)
    at_once = job["rows_per_pass"]
    settings = {
        **plain_model.training_arguments(job),
        "bf16": False,
        "loss_type": [job["loss"]],
        "beta": job["beta"],
        "max_length": job["max_length"],
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": job["rows_per_step"] // at_once,
        "precompute_ref_log_probs": job.get("precompute", False),
    }
    trainer = Tokenized(
        model=model,
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(job["pairs"]),
        processing_class=tokenizer,
        peft_config=plain_model.lora(job),
    )
    trainer.train()
    tokens = clock.answer_tokens_of_steps(job)
    clock.report(job, job["contender"], tokens, gradient_checkpointing=trainer.args.gradient_checkpointing)


if __name__ == "__main__":
    main()
