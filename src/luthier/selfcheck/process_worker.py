"""One of the processes of `process_check`: its part of one step of the user's model, and the gradients of the whole.

Started as `python -m luthier.selfcheck.process_worker FOLDER`, with what torchrun tells a process in its environment.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from luthier.environment import detect_hardware
from luthier.selfcheck.bench import Bench
from luthier.selfcheck.step_checks import trainer_of
from luthier.show import quiet_libraries
from luthier.trainer.steps import idle
from luthier.types import LuthierError

RECIPE_NAME = "recipe.pickle"
"""The loaded recipe, written by the process that started this one."""


def said_name(rank: int) -> str:
    """The file with what a process found: its loss, or what went wrong."""
    return f"process-{rank}.json"


def gradients_name(rank: int) -> str:
    return f"process-{rank}.safetensors"


def measure(folder: Path, rank: int, count: int) -> float:
    """Train one step of the rows of the check, of which every `count`-th is this process's, each as a pass of its own;
    write the gradients, and return the loss of the whole step."""
    with (folder / RECIPE_NAME).open("rb") as stream:
        loaded = pickle.load(stream)
    own = folder / f"own-{rank}"
    own.mkdir()
    bench = Bench(loaded, detect_hardware(), own, lambda text: None)
    bench.model  # noqa: B018 - all that draws comes before processes know of each other
    trainer = trainer_of(bench)
    rows = [[sample] for sample in bench.samples[rank::count]]
    rows += [[idle(bench.samples)]] * (-(-len(bench.samples) // count) - len(rows))
    wrapped = trainer.accelerator.prepare_model(bench.model)
    part = trainer.training_step(wrapped, [bench.stage.collate(row) for row in rows])
    loss = float(trainer.accelerator.reduce(part, "sum")) / count
    save_file(bench.gradients(), folder / gradients_name(rank))
    return loss


def main(folder: Path) -> int:
    """Exit status 1 where nothing was measured; the reason is in the file of `said_name` then."""
    quiet_libraries()
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    said: dict[str, float | str]
    try:
        said = {"loss": measure(folder, rank, count)}
    except LuthierError as error:
        said = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the one that waits is told
        traceback.print_exc()
        said = {"error": f"{type(error).__name__}: {error}"}
    (folder / said_name(rank)).write_text(json.dumps(said), encoding="utf-8")
    if torch.distributed.is_initialized() and "loss" in said:
        torch.distributed.destroy_process_group()
    return 0 if "loss" in said else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
