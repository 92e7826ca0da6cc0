"""Starts the workers of this machine and watches them, over torch's elastic agent (the one under torchrun)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
    registry as rendezvous_registry,
)
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)

from luthier.launch.failures import Failure, find_failure
from luthier.launch.handover import Outcome, outcomes
from luthier.launch.placement import Placement
from luthier.types import ProcessFailed, RunInterrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SHUTDOWN = 10
"""Seconds between asking a worker to end and killing it, on a second signal."""

_KEEP_ALIVE, _MISSED = 2, 3
"""Every so many seconds a machine says that it is there; it counts as gone after so many were missed."""


class StoppedNow(BaseException):
    """A signal that leaves nothing to wait for."""


class Workers(LocalElasticAgent):
    """The workers of this machine, started again after a failure that may pass, as often as the recipe says."""

    def __init__(self, spec: WorkerSpec, folder: Path, timeout: int, say: Callable[[str], None]) -> None:
        others = dict.fromkeys(range(1, spec.local_world_size), Std.ALL)
        logs = DefaultLogsSpecs(log_dir=str(folder / "output"), redirects=others)
        super().__init__(spec, logs, shutdown_timeout=SHUTDOWN)
        self.failure: Failure | None = None
        self.stopping = False
        self._folder, self._timeout, self._say = folder, timeout, say
        self._round = 0

    @property
    def round_folder(self) -> Path:
        """Where the workers of the moment tell how they ended."""
        return self._folder / f"round-{self._round}"

    @property
    def has_first(self) -> bool:
        """Whether process 0, which writes the run directory, is on this machine."""
        return self.get_worker_group().group_rank == 0

    def send(self, number: int) -> bool:
        """Hand a signal to all workers; whether there were any."""
        pids = [worker.id for worker in self.get_worker_group().workers if isinstance(worker.id, int)]
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return bool(pids)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._round += 1
        self.round_folder.mkdir()
        worker_group.spec.args = ("-m", "luthier.launch.worker", str(self._folder), str(self.round_folder))
        started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            exits = {rank: failure.exitcode for rank, failure in result.failures.items()}
            self.failure = find_failure(self.round_folder, exits, self._output(worker_group), self._timeout)
            if self.stopping or not self.failure.may_pass:
                self._remaining_restarts = 0
            elif self._remaining_restarts:
                number = worker_group.spec.max_restarts - self._remaining_restarts + 1
                self._say(
                    f"{self.failure.error}\nstarting again, {number} of {worker_group.spec.max_restarts} times "
                    "(parallel.max_restarts)"
                )
        return result

    def _output(self, worker_group: WorkerGroup) -> dict[int, Path]:
        """What took the errors of each worker but the first one, whose go to the terminal."""
        found: dict[int, Path] = {}
        for worker in worker_group.workers:
            files = (self._folder / "output").glob(f"*/attempt_*/{worker.local_rank}/stderr.log")
            newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
            if newest is not None:
                found[worker.global_rank] = newest
        return found


class Signals:
    """While it is entered, the first signal is handed to the workers, which save and stop; a second one ends them.

    Outside of the main thread signals cannot be handled, and nothing changes.
    """

    def __init__(self, workers: Workers) -> None:
        self.received: signal.Signals | None = None
        self._workers = workers
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, self.received or signal.Signals(number)
        self._workers.stopping = True
        if not (first and self._workers.send(number)):
            raise StoppedNow


def run_workers(
    folder: Path, placement: Placement, run_id: str, restarts: int, timeout: int, say: Callable[[str], None]
) -> tuple[Outcome, bool]:
    """Start the workers, each of which reads `folder`, and wait for their end; how the first of this machine ended, and
    whether process 0 was among them.

    timeout: seconds to wait for the other machines, and for each other. say: told of failures that a new start follows.
    Raises RunInterrupted where a signal stopped them with a checkpoint, the error of the worker that failed first,
    ProcessFailed where one was killed or hung or no other machine came, and KeyboardInterrupt after a second signal.
    """
    with _environment():
        _be_quiet()
        handler = _rendezvous(placement, run_id, timeout)
        spec = WorkerSpec(
            role="luthier",
            local_world_size=placement.processes,
            entrypoint=sys.executable,
            rdzv_handler=handler,
            max_restarts=restarts,
            monitor_interval=0.1,
            local_addr=placement.address,
            **_master(placement),
        )
        workers = Workers(spec, folder, timeout, say)
        try:
            with Signals(workers) as signals:
                result = workers.run()
        except StoppedNow:
            _ended_by(signals.received)
        except RendezvousError as error:
            raise _not_met(error, workers, placement, timeout) from error
        finally:
            handler.shutdown()
    if result is None or result.is_failed():
        if signals.received is not None:
            _ended_by(signals.received)
        assert workers.failure is not None
        raise workers.failure.error
    told = outcomes(workers.round_folder)
    for outcome in told:
        if outcome.kind == "RunInterrupted":
            raise RunInterrupted(outcome.text)
    return min(told, key=lambda outcome: outcome.rank), workers.has_first


def _ended_by(number: signal.Signals | None) -> None:
    """End as a single process does that a signal reaches before or after training."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise KeyboardInterrupt


def _rendezvous(placement: Placement, run_id: str, timeout: int) -> RendezvousHandler:
    """Raises ProcessFailed where nobody listens at the endpoint."""
    fixed = placement.meeting.master is not None
    settings: dict[str, Any] = {"timeout": timeout}
    if fixed:
        settings["rank"] = placement.meeting.node_rank
    else:
        settings |= {"join_timeout": timeout, "last_call_timeout": 1}
        settings |= {"keep_alive_interval": _KEEP_ALIVE, "keep_alive_max_attempt": _MISSED}
        if placement.nodes == 1:
            settings["is_host"] = True
    parameters = RendezvousParameters(
        backend="static" if fixed else "c10d",
        endpoint=placement.endpoint,
        run_id=run_id,
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        local_addr=placement.address,
        **settings,
    )
    try:
        return rendezvous_registry.get_rendezvous_handler(parameters)
    except RendezvousError as error:
        raise ProcessFailed(
            f"nobody answers at {placement.endpoint} (--rendezvous): its machine has to be started, and reachable there"
        ) from error


def _master(placement: Placement) -> dict[str, Any]:
    if placement.meeting.master is None:
        return {}
    host, _, port = placement.meeting.master.rpartition(":")
    return {"master_addr": host, "master_port": int(port)}


def _not_met(error: RendezvousError, workers: Workers, placement: Placement, timeout: int) -> Exception:
    """What to raise where the machines do not come together, first or again."""
    before = f"{workers.failure.error}\n" if workers.failure is not None else ""
    if isinstance(error, RendezvousClosedError):
        return ProcessFailed(f"{before}another machine has ended the run: its launcher says why")
    if isinstance(error, RendezvousTimeoutError):
        return ProcessFailed(
            f"{before}not all of the {placement.nodes} machines came to {placement.endpoint} within {timeout} s "
            "(parallel.timeout)"
        )
    return ProcessFailed(f"{before}the machine at {placement.endpoint} is gone: {error}")


@contextmanager
def _environment() -> Iterator[None]:
    """What torch reads from the environment alone.

    Each start of the workers gets a store of its own: in one that is kept, they would find what the last ones wrote.
    Signals are `Signals`'s.
    """
    ours = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": ""}
    before = {name: os.environ.get(name) for name in ours}
    os.environ |= ours
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _be_quiet() -> None:
    """The agent's log speaks of its own parts; what went wrong is said by `failures`. LOGLEVEL brings it back."""
    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
