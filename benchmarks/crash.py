"""kill -9 at random moments of training and of checkpoint writing; each run then resumes by itself.

    python benchmarks/crash.py --kills 50

For each seed a run of a tiny model is started in a process of its own and killed: half of them at a random
time, half a random while after a checkpoint began to be written; written in the foreground and in the
background by turns. It is started again with `train.resume=auto` (and killed again where the seed says so)
until it ends. The final weights, the log's losses and every checkpoint must be those of an uninterrupted run,
bit by bit. Nothing is measured in seconds here; the results file says where each kill struck.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout
import torch
from safetensors.torch import load_file

import luthier
from luthier.trainer.checkpoint import list_checkpoints, verify

sys.path.insert(0, str(checkout.REPOSITORY))
from tests.tiny import chat_model, write_alpaca

STEPS, SAVE_EVERY, ROWS = 24, 2, 96


@dataclass(frozen=True)
class Crash:
    """One seed: where its kills struck, and whether the end was the same."""

    seed: int
    asynchronous: bool
    kills: list[dict[str, Any]]
    weights_equal: bool
    losses_equal: bool
    checkpoints_valid: bool

    @property
    def survived(self) -> bool:
        return self.weights_equal and self.losses_equal and self.checkpoints_valid


def recipe(place: Path, name: str, *, asynchronous: bool) -> dict[str, Any]:
    return {
        "model": {"path": str(place / "model")},
        "data": {"train": ["rows.json"], "directory": str(place), "cache": str(place / "cache")},
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 4,
            "epochs": 1,
            "save_every": SAVE_EVERY,
            "save_total_limit": 3,
            "log_every": 1,
            "plots": False,
            "async_save": asynchronous,
            "resume": "auto",
            "output": str(place / name),
        },
    }


def start(tree: dict[str, Any]) -> int:
    """The run in a child process; forked, because importing torch takes longer than the run."""
    pid = os.fork()
    if pid:
        return pid
    try:
        luthier.train(tree, quiet=True)
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  the child must end here, whatever happens
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def kill_at(pid: int, run: Path, rng: random.Random) -> dict[str, Any] | None:
    """Kill the child at the seed's moment; None where it had ended before."""
    during_write = rng.random() < 0.5
    delay = rng.uniform(0, 0.02)
    writes, steps = rng.randrange(STEPS // SAVE_EVERY), rng.randrange(STEPS - 1)
    seen: set[str] = set()
    while True:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        names = [path.name for path in run.iterdir()] if run.is_dir() else []
        seen |= {name for name in names if name.startswith(".tmp-checkpoint")}
        if len(seen) > writes if during_write else "trainer_log.jsonl" in names and len(losses(run)) >= steps:
            break
        time.sleep(0.0005)
    time.sleep(delay)
    if os.waitpid(pid, os.WNOHANG)[0]:
        return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    names = sorted(path.name for path in run.iterdir())
    return {
        "aimed_at": "a checkpoint being written" if during_write else "any moment",
        "steps_logged": len(losses(run)),
        "half_written": [name for name in names if name.startswith(".")],
        "checkpoints": [path.name for path in list_checkpoints(run)],
    }


def losses(run: Path) -> dict[int, float]:
    file = run / "trainer_log.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    parsed = [json.loads(line) for line in lines]
    return {line["current_steps"]: line["loss"] for line in parsed if "loss" in line}


def crash(place: Path, straight: Path, seed: int) -> Crash:
    """One run that is killed once to three times and resumes by itself."""
    rng = random.Random(seed)
    asynchronous = seed % 2 == 0
    tree = recipe(place, f"run-{seed}", asynchronous=asynchronous)
    run = Path(tree["train"]["output"])
    kills = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        struck = kill_at(start(tree), run, rng)
        if struck is None:
            break
        kills.append(struck)
    if not (run / "run.json").is_file():
        _, status = os.waitpid(start(tree), 0)
        if status:
            return Crash(seed, asynchronous, kills, False, False, False)
    expected, found = load_file(straight / NAME), load_file(run / NAME)
    equal = expected.keys() == found.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    for folder in list_checkpoints(run):
        verify(folder)
    clean = not [path for path in run.iterdir() if path.name.startswith(".")]
    return Crash(seed, asynchronous, kills, equal, losses(run) == losses(straight), clean)


NAME = "adapter_model.safetensors"


def crashes(place: Path, seeds: range) -> list[Crash]:
    """All seeds, on one model and one uninterrupted run."""
    torch.set_num_threads(1)
    chat_model(place / "model")
    write_alpaca(place / "rows.json", ROWS)
    _, status = os.waitpid(start(recipe(place, "straight", asynchronous=False)), 0)
    if status:
        raise RuntimeError("the uninterrupted run failed")
    found = []
    for seed in seeds:
        found.append(crash(place, place / "straight", seed))
        print(
            f"seed {seed}: {len(found[-1].kills)} kills, {'equal' if found[-1].survived else 'NOT EQUAL'}",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill, one seed each")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "crash.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = crashes(Path(place), range(given.kills))
    kills = [kill for one in found for kill in one.kills]
    summary = {
        "runs": len(found),
        "kills": len(kills),
        "kills_with_a_half_written_checkpoint": sum(bool(kill["half_written"]) for kill in kills),
        "runs_that_ended_bitwise_equal": sum(one.survived for one in found),
        "torch": torch.__version__,
        "luthier": luthier.__version__,
    }
    given.results.write_text(
        json.dumps({"summary": summary, "runs": [asdict(one) for one in found]}, indent=1) + "\n"
    )
    print(json.dumps(summary, indent=2))
    if summary["runs_that_ended_bitwise_equal"] < len(found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
