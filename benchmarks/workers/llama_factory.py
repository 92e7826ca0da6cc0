"""LLaMA-Factory at its defaults, given the job's token sequences through its own `tokenized_path`."""

from __future__ import annotations

from pathlib import Path

import clock
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp


def main() -> None:
    job = clock.load_job()
    clock.install()
    tokenized = Path(job["output"]) / "tokenized"
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in job["rows"]]
    columns = Dataset.from_list(rows)
    for media in ("images", "videos", "audios"):
        columns = columns.add_column(media, [None] * len(columns))
    DatasetDict({"train": columns}).save_to_disk(str(tokenized))
    run_exp(
        {
            "model_name_or_path": job["model"],
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": job["rank"],
            "lora_alpha": job["alpha"],
            "lora_dropout": 0.0,
            "dataset": "benchmark",
            "tokenized_path": str(tokenized),
            "output_dir": str(Path(job["output"]) / "run"),
            "disable_shuffling": True,
            "per_device_train_batch_size": job["rows_per_step"],
            "max_steps": job["steps"],
            "learning_rate": job["lr"],
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": job["seed"],
            "use_cpu": True,
        }
    )
    clock.report(job, "llamafactory", clock.tokens_of_steps(job))


if __name__ == "__main__":
    main()
