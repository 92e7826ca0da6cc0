"""transformers.Trainer with padded rows: the reference for the losses."""

from __future__ import annotations

import clock
import plain_model
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main() -> None:
    job = clock.load_job()
    clock.install()
    model, tokenizer = plain_model.load(job)
    trainer = Trainer(
        model=get_peft_model(model, plain_model.lora(job)),
        args=TrainingArguments(**plain_model.training_arguments(job)),
        train_dataset=Dataset.from_list(job["rows"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    clock.report(job, "trainer", clock.tokens_of_steps(job))


if __name__ == "__main__":
    main()
