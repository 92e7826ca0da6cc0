"""How many processes a run takes, on which machines, and where these meet."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the machines of a run find each other; nothing is given for a single one.

    rendezvous: HOST:PORT of any of them, with `run_id`, the name of the launch, the same on all. Or master: HOST:PORT
    of machine 0, with `node_rank`, the number of this one.
    """

    rendezvous: str | None = None
    run_id: str | None = None
    master: str | None = None
    node_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """`nodes` machines with `processes` each."""

    processes: int
    nodes: int
    meeting: Meeting

    @property
    def world_size(self) -> int:
        return self.processes * self.nodes

    @property
    def endpoint(self) -> str:
        """HOST:PORT; port 0 is any free one."""
        return self.meeting.rendezvous or self.meeting.master or "localhost:0"

    @property
    def run_id(self) -> str:
        """The name of the launch: a new one where nobody gave any, torchrun's for none where all need the same."""
        if self.meeting.master is not None:
            return "none"
        return self.meeting.run_id or secrets.token_hex(8)

    @property
    def address(self) -> str | None:
        """The name under which others reach this machine; None for what it calls itself."""
        host = self.endpoint.rpartition(":")[0]
        return host if host in LOOPBACK else None


def is_worker() -> bool:
    """Whether this process was started as one of several, by torchrun or its like."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def place(recipe: Recipe, num_gpus: int, meeting: Meeting) -> Placement:
    """The processes of a recipe on a machine with so many visible GPUs. Raises RecipeError for what does not fit."""
    parallel = recipe.parallel
    processes = max(1, num_gpus) if parallel.processes == "auto" else parallel.processes
    if 0 < num_gpus < processes:
        raise RecipeError(
            f"parallel.processes={processes}, and {num_gpus} GPUs are visible: each process drives one; give at most "
            "that many, or auto"
        )
    _check_meeting(meeting, parallel.nodes, parallel.max_restarts)
    return Placement(processes, parallel.nodes, meeting)


def _check_meeting(meeting: Meeting, nodes: int, max_restarts: int) -> None:
    for option, endpoint in (("--rendezvous", meeting.rendezvous), ("--master", meeting.master)):
        host, colon, port = (endpoint or "host:1").rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise RecipeError(f"{option} {endpoint}: write HOST:PORT, for example node-0:29500")
    given = [name for name in ("rendezvous", "run_id", "master", "node_rank") if _given(meeting, name)]
    if nodes == 1 and given not in ([], ["run_id"]):
        raise RecipeError(
            f"--{given[0].replace('_', '-')} is for several machines, and there is one; give --nodes"
        )
    if nodes > 1 and given not in (["rendezvous", "run_id"], ["master", "node_rank"]):
        raise RecipeError(
            f"{nodes} machines need to know where they meet: give each of them --rendezvous HOST:PORT --run-id NAME, "
            "or --master HOST:PORT --node-rank NUMBER; `luthier launch` prints the commands"
        )
    if meeting.node_rank is not None and not 0 <= meeting.node_rank < nodes:
        raise RecipeError(
            f"--node-rank {meeting.node_rank}: the numbers of {nodes} machines are 0 to {nodes - 1}"
        )
    if meeting.master is not None and nodes > 1 and max_restarts > 0:
        raise RecipeError(
            f"parallel.max_restarts={max_restarts}: machines that are started again find each other only with "
            "--rendezvous HOST:PORT --run-id NAME instead of --master"
        )


def _given(meeting: Meeting, name: str) -> bool:
    return getattr(meeting, name) is not None
