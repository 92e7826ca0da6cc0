"""transformers' generate: batches in the order of the rows, padded on the left."""

from __future__ import annotations

import time

import clock
import generated
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    job = clock.load_job()
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    end: int = AutoTokenizer.from_pretrained(job["model"]).eos_token_id
    config = GenerationConfig(
        max_new_tokens=job["max_new_tokens"], do_sample=False, eos_token_id=end, pad_token_id=end
    )
    answers: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(job["prompts"]), job["batch_size"]):
        batch = job["prompts"][first : first + job["batch_size"]]
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        answers += [generated.until_end(row, end) for row in output[:, width:].tolist()]
    generated.report(job, time.perf_counter() - start, answers)


if __name__ == "__main__":
    main()
