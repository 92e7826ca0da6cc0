"""What starts a run elsewhere: the commands and manifests of torchrun, SLURM, Kubernetes and SkyPilot for a recipe.

All but torchrun's start `luthier train` once on each machine, which prepares the data and then starts the processes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

Kind = Literal["torchrun", "slurm", "kubernetes", "skypilot"]

PORT = 29500
"""torchrun's own."""


@dataclass(frozen=True, slots=True)
class Start:
    """A run to be started.

    recipe: the validated recipe. file, words: as they were given, for the command line. gpu: a GPU's name, for
    SkyPilot; None asks for none at all. image: of a container with Luthier. claim: of the volume that all machines
    share, mounted as /work.
    """

    recipe: Recipe
    file: str
    words: Sequence[str] = ()
    port: int = PORT
    gpu: str | None = "H100"
    image: str = "IMAGE"
    claim: str = "CLAIM"

    @property
    def nodes(self) -> int:
        return self.recipe.parallel.nodes

    @property
    def processes(self) -> int:
        """Those of each machine. Raises RecipeError where that depends on a machine that is not this one."""
        if self.recipe.parallel.processes == "auto":
            raise RecipeError(
                "parallel.processes is auto, and another machine than this one decides it: give --processes, the "
                "number of GPUs of each machine"
            )
        return self.recipe.parallel.processes

    @property
    def name(self) -> str:
        """A name that every cluster accepts: lower case letters, digits and dashes."""
        stem = self.file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or self.file
        return f"luthier-{re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')}"[:50].rstrip("-")

    def train(self) -> list[str]:
        """`luthier train` without where the machines meet."""
        return ["luthier", "train", self.file, *self.words, "--processes", str(self.processes)]


def torchrun(start: Start) -> str:
    """For each machine the same two commands: data first, so that no process waits for another's."""
    parallel = start.recipe.parallel
    count = "gpu" if parallel.processes == "auto" else str(parallel.processes)
    meeting = ["--standalone"]
    if start.nodes > 1:
        meeting = [f"--nnodes={start.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={start.name}"]
    words = ["torchrun", *meeting, f"--nproc-per-node={count}", f"--max-restarts={parallel.max_restarts}"]
    endpoint = f' --rdzv-endpoint="$HEAD:{start.port}"' if start.nodes > 1 else ""
    train = shlex.join(["-m", "luthier.cli", "train", start.file, *start.words])
    lines = [shlex.join(["luthier", "prepare", start.file, *start.words, "--quiet"])]
    if start.nodes > 1:
        lines.insert(0, ': "${HEAD:?the name of the first machine, the same on all}"')
    # A store of its own for every start: see `agent`.
    return "\n".join(
        [*lines, f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {shlex.join(words)}{endpoint} {train}", ""]
    )


def slurm(start: Start) -> str:
    """A script for sbatch. A job that is requeued has the same number, so its run goes on."""
    gpus = [] if start.gpu is None else [f"#SBATCH --gpus-per-node={start.processes}"]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={start.name}",
        f"#SBATCH --nodes={start.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "# Three minutes before the time is over the run saves a checkpoint and stops.",
        "#SBATCH --signal=TERM@180",
        "set -euo pipefail",
    ]
    meeting = ' --run-id "slurm-$SLURM_JOB_ID"'
    if start.nodes > 1:
        lines.append('head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)')
        meeting = f' --nodes {start.nodes} --rendezvous "$head:{start.port}"{meeting}'
    lines += [f"srun --kill-on-bad-exit=1 {shlex.join(start.train())}{meeting}", ""]
    return "\n".join(lines)


def kubernetes(start: Start) -> str:
    """An Indexed Job of one pod for each machine, and the headless Service that gives pod 0 its name."""
    name, command = start.name, start.train()
    documents: list[dict[str, Any]] = []
    pod: dict[str, Any] = {"restartPolicy": "OnFailure"}
    if start.nodes > 1:
        command += ["--nodes", str(start.nodes), "--rendezvous", f"{name}-0.{name}:{start.port}"]
        pod["subdomain"] = name
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name},
                # Pods find each other before they are ready.
                "spec": {
                    "clusterIP": "None",
                    "publishNotReadyAddresses": True,
                    "selector": {"job-name": name},
                },
            }
        )
    container: dict[str, Any] = {
        "name": "luthier",
        "image": start.image,
        "workingDir": "/work",
        "command": [*command, "--run-id", name],
        "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    if start.nodes > 1:
        container["ports"] = [{"containerPort": start.port}]
    if start.gpu is not None:
        container["resources"] = {"limits": {"nvidia.com/gpu": start.processes}}
    pod |= {
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": start.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job = {"completions": start.nodes, "parallelism": start.nodes, "completionMode": "Indexed"}
    documents.append(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {**job, "backoffLimit": start.recipe.parallel.max_restarts, "template": {"spec": pod}},
        }
    )
    return yaml.safe_dump_all(documents, sort_keys=False, width=1000)


def skypilot(start: Start) -> str:
    """A task for `sky launch`; a managed job that is recovered keeps its id, so its run goes on."""
    gpus = {} if start.gpu is None else {"resources": {"accelerators": f"{start.gpu}:{start.processes}"}}
    head = {
        "name": start.name,
        "num_nodes": start.nodes,
        **gpus,
        "workdir": ".",
        "setup": "pip install luthier",
    }
    meeting = ' --run-id "$SKYPILOT_TASK_ID"'
    script = ["set -euo pipefail"]
    if start.nodes > 1:
        script.append('head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)')
        meeting = f' --nodes {start.nodes} --rendezvous "$head:{start.port}"{meeting}'
    script.append(f"{shlex.join(start.train())}{meeting}")
    lines = ["run: |", *(f"  {line}" for line in script), ""]
    return yaml.safe_dump(head, sort_keys=False, width=1000) + "\n".join(lines)


PRINTERS: dict[Kind, Callable[[Start], str]] = {
    "torchrun": torchrun,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "skypilot": skypilot,
}
