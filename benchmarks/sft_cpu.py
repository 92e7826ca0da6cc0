"""Supervised fine-tuning on a CPU, side by side: Luthier, LLaMA-Factory, TRL twice, plain Trainer.

    python benchmarks/sft_cpu.py --lf-python PEER/bin/python

Every contender trains LoRA on all linear layers in float32 on the same token sequences, in a process of its
own; each round runs all of them once and the next round starts with another one. Only ratios within a round
are quoted. The model is the embedded one, or a folder with a small Llama-shaped one as safetensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import floor
import sequences
import side_by_side
import summary
from side_by_side import Contender

CONTENDERS = {
    "luthier": Contender("luthier_sft.py"),
    "llamafactory": Contender("llama_factory.py", "lf_python", {"stage": "sft"}),
    "trl": Contender("trl_sft.py", "trl_python"),
    "trl_packing": Contender("trl_sft.py", "trl_python"),
    "trainer": Contender("plain_trainer.py"),
}


def parse() -> argparse.Namespace:
    parser = side_by_side.parser(
        __doc__, CONTENDERS, dataset="alpaca_en_demo", steps=8, results="sft_cpu.json"
    )
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--pack-length", type=int, default=1024, help="block length of TRL's packing")
    return side_by_side.parse(parser, CONTENDERS)


def build_job(options: argparse.Namespace) -> dict[str, Any]:
    """What all workers are told. Sizes for the matrix products are those of the mean step."""
    rows = sequences.load(options.model, options.data, options.dataset, options.steps * options.rows_per_step)
    tokens = sum(len(row["input_ids"]) for row in rows) // options.steps
    targets = sum(map(sequences.supervised, rows)) // options.steps
    decoder = floor.Decoder.from_config(
        json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    )
    return {
        **side_by_side.job_settings(options),
        "rows": rows,
        "max_length": max(len(row["input_ids"]) for row in rows),
        "rows_per_step": options.rows_per_step,
        "pack_length": options.pack_length,
        "products": floor.products(decoder, tokens, targets),
    }


def flops_per_token(job: dict[str, Any], model: Path) -> tuple[float, dict[str, float]]:
    """Matrix-product operations for each real token of the timed steps, and their parts."""
    timed = job["rows"][job["warmup"] * job["rows_per_step"] :]
    decoder = floor.Decoder.from_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    lengths = [len(row["input_ids"]) for row in timed]
    parts = floor.step_flops(decoder, lengths, sum(map(sequences.supervised, timed)), job["rank"])
    return sum(parts.values()) / sum(lengths), parts


def main() -> None:
    options = parse()
    job = build_job(options)
    per_token, parts = flops_per_token(job, options.model)
    settings = {key: value for key, value in job.items() if key not in ("rows", "products", "model", "data")}
    rounds: list[summary.Round] = []
    result: dict[str, Any] = {}
    for measured in side_by_side.rounds_of(options, job, CONTENDERS, summary.speed):
        rounds.append(measured)
        result = {
            "settings": settings,
            "flops_of_timed_steps": parts,
            **summary.summarise(rounds, options.contenders, per_token),
            "rounds": rounds,
        }
        side_by_side.write(result, options.results)
    summary.show(result)


if __name__ == "__main__":
    main()
