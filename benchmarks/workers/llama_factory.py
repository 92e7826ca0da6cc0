"""LLaMA-Factory at its defaults, given the job's token sequences through its own `tokenized_path`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clock
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp

IGNORE = -100


def sft_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    return [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in job["rows"]]


def pair_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    rows = []
    for pair in job["pairs"]:
        row: dict[str, list[int]] = {}
        for name in ("chosen", "rejected"):
            prompt, answer = pair["prompt_ids"], pair[f"{name}_ids"]
            row[f"{name}_input_ids"] = prompt + answer
            row[f"{name}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{name}_labels"] = [IGNORE] * len(prompt) + answer
        rows.append(row)
    return rows


def write_tokens(rows: list[dict[str, list[int]]], folder: Path) -> None:
    columns = Dataset.from_list(rows)
    for media in ("images", "videos", "audios"):
        columns = columns.add_column(media, [None] * len(columns))
    DatasetDict({"train": columns}).save_to_disk(str(folder))


def main() -> None:
    job = clock.load_job()
    clock.install()
    tokenized = Path(job["output"]) / "tokenized"
    pairs = job["stage"] == "dpo"
    write_tokens(pair_rows(job) if pairs else sft_rows(job), tokenized)
    at_once = job.get("rows_per_pass", job["rows_per_step"])
    preference = {"pref_loss": job["loss"], "pref_beta": job["beta"]} if pairs else {}
    run_exp(
        {
            "model_name_or_path": job["model"],
            "stage": job["stage"],
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": job["rank"],
            "lora_alpha": job["alpha"],
            "lora_dropout": 0.0,
            **preference,
            "dataset": "benchmark",
            "tokenized_path": str(tokenized),
            "output_dir": str(Path(job["output"]) / "run"),
            "disable_shuffling": True,
            "per_device_train_batch_size": at_once,
            "gradient_accumulation_steps": job["rows_per_step"] // at_once,
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
    tokens = clock.answer_tokens_of_steps(job) if pairs else clock.tokens_of_steps(job)
    clock.report(job, job["contender"], tokens)


if __name__ == "__main__":
    main()
