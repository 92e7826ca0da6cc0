"""LLaMA-Factory predicts, given the prompts through its own `tokenized_path`; its calls of `generate` are timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import clock
import generated
import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.tuner import run_exp
from transformers import AutoTokenizer
from transformers.generation import GenerationMixin


def main() -> None:
    job = clock.load_job()
    torch.set_num_threads(job["threads"])
    end: int = AutoTokenizer.from_pretrained(job["model"]).eos_token_id
    answers: list[list[int]] = []
    spent = [0.0]
    generate = GenerationMixin.generate

    def timed(self: Any, *given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        output = generate(self, *given, **named)
        spent[0] += time.perf_counter() - start
        width = named["input_ids"].shape[1] if "input_ids" in named else given[0].shape[1]
        answers.extend(generated.until_end(row, end) for row in output[:, width:].tolist())
        return output

    GenerationMixin.generate = timed
    tokenized = Path(job["output"]) / "tokenized"
    rows = Dataset.from_list(
        [{"input_ids": p, "attention_mask": [1] * len(p), "labels": [end]} for p in job["prompts"]]
    )
    for media in ("images", "videos", "audios"):
        rows = rows.add_column(media, [None] * len(rows))
    DatasetDict({"validation": rows}).save_to_disk(str(tokenized))
    run_exp(
        {
            "model_name_or_path": job["model"],
            "stage": "sft",
            "do_predict": True,
            "predict_with_generate": True,
            "finetuning_type": "full",
            "eval_dataset": "benchmark",
            "tokenized_path": str(tokenized),
            "output_dir": str(Path(job["output"]) / "run"),
            "per_device_eval_batch_size": job["batch_size"],
            "do_sample": False,
            "max_new_tokens": job["max_new_tokens"],
            "report_to": "none",
            "use_cpu": True,
        }
    )
    generated.report(job, spent[0], answers)


if __name__ == "__main__":
    main()
