"""Runs of `luthier train` in several processes of this machine.

The processes speak over gloo on the CPU, and know of each other what torchrun would have told them.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]

Change = Callable[[int], AbstractContextManager[Any]]
"""What holds inside of each process, which is told its number, while it trains."""
HANGS = 120
"""Seconds that one run may take before a process shows where it waits, and ends."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    rank: int, count: int, port: int, runs: Sequence[tuple[Mapping[str, Any], Change | None]], out: str
) -> None:
    """One process: every run in turn, and what it raises, as a person would read it."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from luthier import run
    from luthier.types import LuthierError

    said = []
    for recipe, change in runs:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            with nullcontext() if change is None else change(rank):
                run.train(recipe, quiet=True)
            said.append("")
        except (LuthierError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")
    faulthandler.cancel_dump_traceback_later()
    Path(out, f"said-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    torch.distributed.destroy_process_group()


def train_in_processes(
    runs: Sequence[tuple[Mapping[str, Any], Change | None]], folder: Path, count: int = 2
) -> list[list[str]]:
    """Train one recipe after the other, each under its change; of each process what each run raised, or an empty
    text."""
    folder.mkdir(parents=True, exist_ok=True)
    work = (count, _free_port(), runs, str(folder))
    start_processes(_work, work, nprocs=count, start_method="spawn")  # type: ignore[no-untyped-call]
    return [json.loads((folder / f"said-{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


# --------------------------------------------------------------------------------------------------
# Changes


def local_whitening(rank: int) -> AbstractContextManager[Any]:
    """Advantages are whitened by the statistics of half of the rollout."""
    from luthier.stages import ppo

    whiten = ppo.whiten  # type: ignore[attr-defined]

    def own(values: torch.Tensor, total: Any, **more: Any) -> torch.Tensor:
        half = torch.arange(len(values)) < len(values) // 2
        return whiten(values, total, **(more | {"mask": half if rank == 0 else ~half}))

    return patch.object(ppo, "whiten", own)


def local_weights(rank: int) -> AbstractContextManager[Any]:
    """Sums are divided by the weight of this process's passes, and averaged."""
    from luthier.trainer.trainer import PeftTrainer

    def own(self: PeftTrainer, batches: Sequence[Any]) -> dict[str, torch.Tensor]:
        weights = [self.stage.weight(batch) for batch in batches]
        return {name: sum(one[name] for one in weights) * self.args.world_size for name in weights[0]}  # type: ignore[misc]

    return patch.object(PeftTrainer, "_global_weights", own)


def reference_that_stays(rank: int) -> AbstractContextManager[Any]:
    """Parts of the weights that training began with are not put in their place."""
    from luthier.model import reference

    return patch.object(reference, "_exchange", lambda one, other: None)


def own_seeds(rank: int) -> AbstractContextManager[Any]:
    """Each process answers with seeds of its own."""
    from luthier.trainer import rollouts

    seeded = rollouts.answer_seed
    return patch.object(rollouts, "answer_seed", lambda seed, *rest: seeded(seed + rank, *rest))


def signal_in_third_update(rank: int) -> AbstractContextManager[Any]:
    """A signal reaches the second process alone."""
    from luthier.trainer.rollouts import Rollouts

    updated = Rollouts.updated

    def interrupted(self: Rollouts, metrics: Any) -> Any:
        if rank == 1 and self._update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return updated(self, metrics)

    return patch.object(Rollouts, "updated", interrupted)


def signal_in_second_rollout(rank: int) -> AbstractContextManager[Any]:
    """A signal reaches the second process alone, while it samples and the first one has done so."""
    from luthier.online import LiveSampler

    call = LiveSampler.__call__

    def interrupted(self: LiveSampler, asked: Any, *, interruptible: bool) -> Any:
        if rank == 1 and interruptible:
            self.rounds = getattr(self, "rounds", 0) + 1  # type: ignore[attr-defined]
            if self.rounds == 2:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGTERM)
        return call(self, asked, interruptible=interruptible)

    return patch.object(LiveSampler, "__call__", interrupted)
