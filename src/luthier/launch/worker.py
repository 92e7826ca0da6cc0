"""One of several processes: `python -m luthier.launch.worker FOLDER ROUND`, started by the agent of its machine.

It reads the resolved recipe from FOLDER, trains, and writes to ROUND how it ended. It ends itself where the launcher is
gone, and where another process of its machine has failed and it does not notice within `GRACE` seconds.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from luthier.launch.handover import Handover, Outcome, outcomes, stack_file
from luthier.types import LuthierError, RunInterrupted

GRACE = 10.0
"""Seconds that a worker has to end by itself once another one of its machine has failed."""

_POLL = 0.5


def main() -> int:
    """0 also for a run that a signal stopped with a checkpoint: nothing is to be started again."""
    folder, round_folder = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    threading.Thread(target=_watch, args=(os.getppid(), round_folder, rank), daemon=True).start()
    try:
        handover = Handover.read(folder)
        # Both are read when torch is imported.
        os.environ.setdefault("OMP_NUM_THREADS", str(handover.threads))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        metrics = _train(handover)
    except RunInterrupted as stop:
        Outcome(rank, "RunInterrupted", str(stop), luthier=True).write(round_folder)
        return 0
    except LuthierError as error:
        Outcome(rank, type(error).__name__, str(error), luthier=True, trace=traceback.format_exc()).write(
            round_folder
        )
        return 1
    except Exception as error:  # noqa: BLE001  the launcher shows it
        Outcome(rank, type(error).__name__, str(error), trace=traceback.format_exc()).write(round_folder)
        return 1
    Outcome(rank, metrics=metrics).write(round_folder)
    return 0


def _train(handover: Handover) -> dict[str, float]:
    from luthier.environment import detect_hardware
    from luthier.run import train_resolved
    from luthier.show import quiet_libraries

    quiet_libraries()
    result = train_resolved(handover.loaded, detect_hardware(), quiet=handover.quiet)
    return {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}


def _watch(launcher: int, round_folder: Path, rank: int) -> None:
    while True:
        time.sleep(_POLL)
        if os.getppid() != launcher:
            os._exit(1)
        failed = [
            outcome for outcome in outcomes(round_folder) if outcome.kind not in (None, "RunInterrupted")
        ]
        if failed and time.time() - failed[0].at > GRACE:
            with stack_file(round_folder, rank).open("w", encoding="utf-8") as stream:
                faulthandler.dump_traceback(stream)
            os._exit(1)


def end() -> None:
    """Leave in order: who has told how it ended waits for nobody's threads."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules and status == 0:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    raise SystemExit(status)


if __name__ == "__main__":
    end()
