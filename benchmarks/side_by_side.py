"""Contenders in processes of their own, round by round: what every CPU benchmark does in one way."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout
import summary

from luthier.model.load import locate
from luthier.recipe.schema import EMBEDDED_MODEL, ModelSpec

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Contender:
    """A script under `workers/`, the option that names its Python (None: this one), and what its job adds."""

    script: str
    python: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


Contenders = Mapping[str, Contender]


def parser(description: str | None, contenders: Contenders, *, dataset: str, steps: int, results: str) -> Any:
    """The options that all these benchmarks share."""
    built = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument(
        "--model", default=EMBEDDED_MODEL, help="folder with safetensors weights and tokenizer"
    )
    built.add_argument(
        "--data", type=Path, default=checkout.REPOSITORY.parent / "shared" / "data", help="data folder"
    )
    built.add_argument("--dataset", default=dataset, help="name in the folder's dataset_info.json")
    built.add_argument("--contenders", nargs="+", choices=contenders, help="all whose environment is given")
    built.add_argument("--lf-python", help="Python that has LLaMA-Factory, which is left out otherwise")
    built.add_argument("--trl-python", default=sys.executable, help="Python that has TRL")
    built.add_argument("--rounds", type=int, default=3)
    built.add_argument(
        "--steps", type=int, default=steps, help="optimizer steps of each contender in a round"
    )
    built.add_argument("--warmup", type=int, default=1, help="first steps that are not timed")
    built.add_argument("--rank", type=int, default=8)
    built.add_argument("--threads", type=int, default=2)
    built.add_argument(
        "--launcher", default="", help="put before every worker's command, e.g. 'taskset -c 0,1'"
    )
    built.add_argument("--results", type=Path, default=HERE / "results" / results)
    return built


def parse(built: argparse.ArgumentParser, contenders: Contenders) -> argparse.Namespace:
    """Read the command line; exits with a message where a folder or an environment is missing."""
    options = built.parse_args()
    options.contenders = options.contenders or [
        name for name, one in contenders.items() if _python(options, one)
    ]
    for name in options.contenders:
        if not _python(options, contenders[name]):
            built.error(f"{name} needs --{str(contenders[name].python).replace('_', '-')}")
    if not (options.data / "dataset_info.json").is_file():
        built.error(f"{options.data} has no dataset_info.json: give --data")
    if options.steps <= options.warmup:
        built.error(f"--steps {options.steps}: no step is left after {options.warmup} of warm-up")
    options.model = Path(locate(ModelSpec(path=options.model)).path)
    return options


def job_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all workers are told, whatever the stage."""
    return {
        "model": str(options.model.resolve()),
        "data": str(options.data.resolve()),
        "dataset": options.dataset,
        "steps": options.steps,
        "warmup": options.warmup,
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "lr": 1e-4,
        "seed": 42,
        "threads": options.threads,
    }


def rounds_of(
    options: argparse.Namespace,
    job: Mapping[str, Any],
    contenders: Contenders,
    speed: Callable[[dict[str, Any]], float],
) -> Iterator[summary.Round]:
    """Measure round after round; each begins with the contender after the one that the last began with."""
    for number in range(options.rounds):
        turn = number % len(options.contenders)
        measured: summary.Round = {}
        for name in [*options.contenders[turn:], *options.contenders[:turn]]:
            measured[name] = run(options, {**job, **contenders[name].settings}, name, contenders[name])
            print(f"round {number + 1}: {name} {speed(measured[name]):.0f} tokens/s", flush=True)
        yield measured


def write(result: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _python(options: argparse.Namespace, contender: Contender) -> str | None:
    if contender.python is None:
        return sys.executable
    chosen: str | None = getattr(options, contender.python)
    return chosen


def run(
    options: argparse.Namespace, job: Mapping[str, Any], name: str, contender: Contender
) -> dict[str, Any]:
    """Run one contender in a process of its own and return the JSON line it prints.

    Raises SystemExit with the worker's last lines where it fails.
    """
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
            str(_python(options, contender)),
            str(HERE / "workers" / contender.script),
            str(path),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"contender":'):
            measured: dict[str, Any] = json.loads(line)
            return measured
    raise SystemExit(f"{name} failed ({done.returncode}):\n" + "\n".join(done.stderr.splitlines()[-25:]))
