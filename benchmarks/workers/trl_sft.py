"""TRL's SFTTrainer: its defaults in float32, or with packing when the job's contender is `trl_packing`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import clock
import plain_model
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Defaults, but float32. Packed: as many blocks a step as hold about `rows_per_step` rows."""
    if job["contender"] != "trl_packing":
        return {"bf16": False}
    total = sum(len(row["input_ids"]) for row in job["rows"])
    a_step = total * job["rows_per_step"] / len(job["rows"])
    blocks = max(1, round(a_step / job["pack_length"]))
    steps = -(-total // (blocks * job["pack_length"]))
    return {
        "bf16": False,
        "packing": True,
        "max_length": job["pack_length"],
        "per_device_train_batch_size": blocks,
        "max_steps": min(job["steps"], steps),
    }


def main() -> None:
    job = clock.load_job()
    clock.install()
    model, tokenizer = plain_model.load(job)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**plain_model.training_arguments(job), **settings(job)}),
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        peft_config=plain_model.lora(job),
    )
    trainer.train()
    tokens = [after - before for before, after in pairwise([0, *clock.RECORD.counted_tokens])]
    clock.report(job, job["contender"], tokens, gradient_checkpointing=trainer.args.gradient_checkpointing)


if __name__ == "__main__":
    main()
