"""Why the processes of a run ended: the one that failed first, not those that lost it."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier import errors
from luthier.errors import LuthierError, ProcessFailed
from luthier.launch.handover import Outcome, outcomes, stack_file

_LOST = re.compile(
    r"gloo|NCCL|[Cc]onnection (closed|reset|refused|was)|Broken pipe|ProcessGroup|TCPStore|recvValue|sendBytes",
    re.ASCII,
)
"""What torch says to a process that waits for one that is gone."""

_WAITED = re.compile(r"[Tt]imed out|[Tt]imeout")

_TAIL = 20
"""Lines of a dead worker's output that are shown."""


@dataclass(frozen=True, slots=True)
class Failure:
    """`error` is for the user; `may_pass`: whether it might not come again, if all are started again."""

    error: LuthierError
    may_pass: bool


def find_failure(folder: Path, exits: Mapping[int, int], output: Mapping[int, Path], timeout: int) -> Failure:
    """What ended the workers of this machine.

    folder: of their outcomes. exits: the status of each process that failed, by rank, negative for a signal. output:
    the files that took what they printed. timeout: seconds that they wait for each other.
    """
    told = outcomes(folder)
    failed = [outcome for outcome in told if outcome.kind not in (None, "RunInterrupted")]
    own = [outcome for outcome in failed if not _is_lost(outcome)]
    if own:
        return Failure(_as_error(own[0], failed), not own[0].luthier)
    silent = {
        rank: status for rank, status in exits.items() if rank not in {outcome.rank for outcome in told}
    }
    stacks = {rank: file.read_text() for rank in silent if (file := stack_file(folder, rank)).is_file()}
    killed = {
        rank: status for rank, status in silent.items() if rank not in stacks and status != -signal.SIGTERM
    }
    if killed:
        rank, status = min(killed.items())
        return Failure(ProcessFailed(_death(rank, status, output.get(rank))), may_pass=True)
    if failed and _WAITED.search(failed[0].text):
        return Failure(ProcessFailed(_hang(failed[0], stacks, timeout)), may_pass=True)
    if failed:
        text = (
            f"process {failed[0].rank} lost another one, on another machine: its launcher says why. "
            f"{_first_line(failed[0].text)}"
        )
        return Failure(ProcessFailed(text), may_pass=True)
    return Failure(ProcessFailed("the processes were ended from outside"), may_pass=True)


def _is_lost(outcome: Outcome) -> bool:
    return (
        not outcome.luthier
        and _LOST.search(f"{outcome.text}\n{outcome.trace}") is not None
        and (
            outcome.kind
            in ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError")
        )
    )


def _as_error(outcome: Outcome, failed: Sequence[Outcome]) -> LuthierError:
    alike = all(other.text == outcome.text for other in failed) and len(failed) > 1
    if outcome.luthier:
        kind = getattr(errors, outcome.kind or "", LuthierError)
        named = alike or outcome.text.startswith("process ")
        error: LuthierError = kind.__new__(
            kind, outcome.text if named else f"process {outcome.rank}: {outcome.text}"
        )
        return error
    return ProcessFailed(f"process {outcome.rank} failed.\n{outcome.trace.rstrip()}")


def _death(rank: int, status: int, output: Path | None) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        why = f"was killed by {name}" + (
            "; often the system, when memory is full" if name == "SIGKILL" else ""
        )
    else:
        why = f"ended with status {status}"
    lines = output.read_text(errors="replace").splitlines()[-_TAIL:] if output and output.is_file() else []
    return "\n".join([f"process {rank} {why}", *lines])


def _hang(waited: Outcome, stacks: Mapping[int, str], timeout: int) -> str:
    named = ", ".join(map(str, sorted(stacks))) or "one on another machine"
    lines = [f"process {waited.rank} waited {timeout} s (parallel.timeout) in vain for process {named}"]
    for rank, stack in sorted(stacks.items()):
        lines += [f"process {rank} was here:", stack.rstrip()]
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
