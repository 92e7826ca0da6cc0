"""Runs of `luthier train` in several processes of this machine, below the refusal of more than one.

The processes speak over gloo on the CPU, as torchrun would have started them.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing

Fault = Callable[[], None]
"""Breaks the product inside of each process before it runs."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    rank: int, count: int, port: int, recipes: Sequence[Mapping[str, Any]], fault: Fault | None, out: str
) -> None:
    """One process: every recipe in turn; what is raised is written down as the other processes see theirs."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    import luthier.run
    from luthier.types import LuthierError

    luthier.run.require_one_process = lambda hardware: None
    if fault is not None:
        fault()
    said = []
    for recipe in recipes:
        try:
            luthier.run.train(recipe, quiet=True)
            said.append("")
        except LuthierError as error:
            said.append(f"{type(error).__name__}: {error}")
    Path(out, f"said-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    torch.distributed.destroy_process_group()


def train_in_processes(
    recipes: Sequence[Mapping[str, Any]], folder: Path, count: int = 2, fault: Fault | None = None
) -> list[list[str]]:
    """Run the recipes one after the other; of each process what each run raised, or an empty text."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _work, (count, _free_port(), recipes, fault, str(folder)), nprocs=count, start_method="spawn"
    )
    return [json.loads((folder / f"said-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
