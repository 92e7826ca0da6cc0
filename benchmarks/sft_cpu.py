"""Supervised fine-tuning on a CPU, side by side: Luthier, LLaMA-Factory, TRL twice, plain Trainer.

    python benchmarks/sft_cpu.py --lf-python PEER/bin/python

Every contender trains LoRA on all linear layers in float32 on the same token sequences, in a process of its
own; each round runs all of them once and the next round starts with another one. Only ratios within a round
are quoted. The model is the embedded one, or a folder with a small Llama-shaped one as safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout
import floor
import sequences
import summary

from luthier.model.load import locate
from luthier.recipe.schema import EMBEDDED_MODEL, ModelSpec

HERE = Path(__file__).resolve().parent
WORKERS = {
    "luthier": "luthier_sft.py",
    "llamafactory": "llama_factory.py",
    "trl": "trl_sft.py",
    "trl_packing": "trl_sft.py",
    "trainer": "plain_trainer.py",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=EMBEDDED_MODEL, help="folder with safetensors weights and tokenizer"
    )
    parser.add_argument(
        "--data", type=Path, default=checkout.REPOSITORY.parent / "shared" / "data", help="data folder"
    )
    parser.add_argument("--dataset", default="alpaca_en_demo", help="name in the folder's dataset_info.json")
    parser.add_argument("--contenders", nargs="+", choices=WORKERS, help="all whose environment is given")
    parser.add_argument("--lf-python", help="Python that has LLaMA-Factory, which is left out otherwise")
    parser.add_argument("--trl-python", default=sys.executable, help="Python that has TRL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each contender in a round")
    parser.add_argument("--warmup", type=int, default=1, help="first steps that are not timed")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--pack-length", type=int, default=1024, help="block length of TRL's packing")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--launcher", default="", help="put before every worker's command, e.g. 'taskset -c 0,1'"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "sft_cpu.json")
    options = parser.parse_args()
    options.contenders = options.contenders or [
        name for name in WORKERS if name != "llamafactory" or options.lf_python
    ]
    if "llamafactory" in options.contenders and not options.lf_python:
        parser.error("llamafactory needs --lf-python")
    if not (options.data / "dataset_info.json").is_file():
        parser.error(f"{options.data} has no dataset_info.json: give --data")
    options.model = Path(locate(ModelSpec(path=options.model)).path)
    return options


def build_job(options: argparse.Namespace) -> dict[str, Any]:
    """What all workers are told. Sizes for the matrix products are those of the mean step."""
    rows = sequences.load(options.model, options.data, options.dataset, options.steps * options.rows_per_step)
    tokens = sum(len(row["input_ids"]) for row in rows) // options.steps
    targets = sum(map(sequences.supervised, rows)) // options.steps
    decoder = floor.Decoder.from_config(
        json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    )
    return {
        "model": str(options.model.resolve()),
        "data": str(options.data.resolve()),
        "dataset": options.dataset,
        "rows": rows,
        "max_length": max(len(row["input_ids"]) for row in rows),
        "steps": options.steps,
        "warmup": options.warmup,
        "rows_per_step": options.rows_per_step,
        "pack_length": options.pack_length,
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "lr": 1e-4,
        "seed": 42,
        "threads": options.threads,
        "products": floor.products(decoder, tokens, targets),
    }


def flops_per_token(job: dict[str, Any], model: Path) -> tuple[float, dict[str, float]]:
    """Matrix-product operations for each real token of the timed steps, and their parts."""
    timed = job["rows"][job["warmup"] * job["rows_per_step"] :]
    decoder = floor.Decoder.from_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    lengths = [len(row["input_ids"]) for row in timed]
    parts = floor.step_flops(decoder, lengths, sum(map(sequences.supervised, timed)), job["rank"])
    return sum(parts.values()) / sum(lengths), parts


def run_worker(options: argparse.Namespace, job: dict[str, Any], name: str) -> dict[str, Any]:
    """Run one contender in a process of its own and return the JSON line it prints.

    Raises SystemExit with the worker's last lines where it fails.
    """
    python = {"llamafactory": options.lf_python, "trl": options.trl_python, "trl_packing": options.trl_python}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "MKL_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(checkout.REPOSITORY / "src"),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(
            json.dumps({**job, "contender": name, "output": str(Path(folder) / "output")}), encoding="utf-8"
        )
        command = [
            *shlex.split(options.launcher),
            python.get(name, sys.executable),
            str(HERE / "workers" / WORKERS[name]),
            str(path),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"contender":'):
            measured: dict[str, Any] = json.loads(line)
            return measured
    raise SystemExit(f"{name} failed ({done.returncode}):\n" + "\n".join(done.stderr.splitlines()[-25:]))


def main() -> None:
    options = parse()
    job = build_job(options)
    per_token, parts = flops_per_token(job, options.model)
    settings = {key: value for key, value in job.items() if key not in ("rows", "products", "model", "data")}
    rounds: list[summary.Round] = []
    result: dict[str, Any] = {}
    for number in range(options.rounds):
        turn = number % len(options.contenders)
        measured: summary.Round = {}
        for name in [*options.contenders[turn:], *options.contenders[:turn]]:
            measured[name] = run_worker(options, job, name)
            print(f"round {number + 1}: {name} {summary.speed(measured[name]):.0f} tokens/s", flush=True)
        rounds.append(measured)
        result = {
            "settings": settings,
            "flops_of_timed_steps": parts,
            **summary.summarise(rounds, options.contenders, per_token),
            "rounds": rounds,
        }
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    summary.show(result)


if __name__ == "__main__":
    main()
