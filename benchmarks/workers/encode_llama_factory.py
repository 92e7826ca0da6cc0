"""LLaMA-Factory prepares the rows: `get_dataset`, as its training calls it."""

from __future__ import annotations

import json
from pathlib import Path

import cache_apart
import clock
import encoded
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer


def main() -> None:
    job = clock.load_job()
    cache_apart.check()
    rows = Path(job["rows"])
    folder = Path(job["output"]) / "data"
    folder.mkdir(parents=True)
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "file_name": str(rows),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags | {"system_tag": "system"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": described}), encoding="utf-8")
    settings = {
        "model_name_or_path": job["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 2048,
        "overwrite_cache": True,
        "output_dir": str(Path(job["output"]) / "run"),
        "use_cpu": True,
    }
    if job["processes"] > 1:
        settings["preprocessing_num_workers"] = job["processes"]
    model_args, data_args, training_args, _, _ = get_train_args(settings)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    with encoded.Spent() as spent:
        sets = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)
    table = sets["train_dataset"]
    peak = clock.memory("VmHWM")
    tokens = sum(map(len, table["input_ids"]))
    targets = sum(sum(label != -100 for label in row) for row in table["labels"])
    encoded.report(job, spent, len(table), tokens, targets, None, peak)


if __name__ == "__main__":
    main()
