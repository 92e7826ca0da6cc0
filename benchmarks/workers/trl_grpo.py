"""TRL's GRPOTrainer at its defaults in float32 on the job's prompts; the job says where it departs from them.

`rows_per_pass` answers a device with as much accumulation as makes a step; `gradient_checkpointing`: as the job says.
"""

from __future__ import annotations

from typing import Any

import clock
import plain_model
from datasets import Dataset
from rewards_of_benchmark import distinct_words
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [distinct_words(answer[0]["content"]) for answer in completions]


def main() -> None:
    job = clock.load_job()
    clock.install()
    clock.time_calls(GRPOTrainer, "_generate_and_score_completions", "rollout")
    model, tokenizer = plain_model.load(job)
    at_once, longest = job["rows_per_pass"], job["answer_length"]
    settings = {
        **plain_model.training_arguments(job),
        "bf16": False,
        "gradient_checkpointing": job["gradient_checkpointing"],
        "beta": 0.0,
        "num_generations": job["group_size"],
        "max_completion_length": longest,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": job["rows_per_step"] // at_once,
        "temperature": 1.0,
        "generation_kwargs": {"min_new_tokens": longest},
        "shuffle_dataset": False,
    }
    del settings["train_sampling_strategy"]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}]} for text in job["prompts"]]
        ),
        processing_class=tokenizer,
        peft_config=plain_model.lora(job),
    )
    trainer.train()
    clock.report(
        job,
        job["contender"],
        [job["rows_per_step"] * longest] * job["steps"],
        rollout_seconds=clock.RECORD.calls_of["rollout"],
        gradient_checkpointing=trainer.args.gradient_checkpointing,
    )


if __name__ == "__main__":
    main()
