"""Luthier's engine, as `luthier predict` uses it."""

from __future__ import annotations

import time

import clock
import generated
import torch

from luthier.answering import open_model
from luthier.recipe.schema import GenerationSpec


def main() -> None:
    job = clock.load_job()
    torch.set_num_threads(job["threads"])
    answerer = open_model(job["model"], generation=GenerationSpec(rows=job["batch_size"]))
    settings = answerer.settings(max_new_tokens=job["max_new_tokens"], do_sample=False)
    start = time.perf_counter()
    answers = answerer.engine.generate(job["prompts"], settings)
    generated.report(job, time.perf_counter() - start, [answer.ids for answer in answers])


if __name__ == "__main__":
    main()
