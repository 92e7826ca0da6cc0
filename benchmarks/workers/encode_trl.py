"""TRL prepares the rows: what `SFTTrainer` does with a conversational data set and `assistant_only_loss`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cache_apart
import clock
import encoded
import trl
from datasets import load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_training.jinja"
"""ChatML with the marks that `assistant_only_loss` needs."""


def main() -> None:
    job = clock.load_job()
    cache_apart.check()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    config = SFTConfig(
        output_dir=str(Path(job["output"]) / "run"),
        max_length=2048,
        assistant_only_loss=True,
        dataset_num_proc=job["processes"] if job["processes"] > 1 else None,
        report_to="none",
        use_cpu=True,
    )
    prepare = SFTTrainer._prepare_dataset
    spent = encoded.Spent()
    made: list[Any] = []

    def timed(self: Any, *given: Any, **named: Any) -> Any:
        with spent:
            made.append(prepare(self, *given, **named))
        return made[-1]

    SFTTrainer._prepare_dataset = timed
    with spent:
        rows = load_dataset("json", data_files=job["rows"], split="train")
    SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    table = made[0]
    peak = clock.memory("VmHWM")
    tokens = sum(map(len, table["input_ids"]))
    masks = next((name for name in ("assistant_masks", "labels") if name in table.column_names), None)
    targets = sum(sum(value not in (0, -100) for value in row) for row in table[masks]) if masks else None
    encoded.report(job, spent, len(table), tokens, targets, None, peak)


if __name__ == "__main__":
    main()
