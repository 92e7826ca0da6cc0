"""What `luthier launch` prints: it is run where it can be, and read as its reader would where it cannot."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from luthier.cli import app
from luthier.launch.commands import Start
from luthier.recipe.load import load_recipe
from tests.launching import assert_intact, free_port, launch_recipe, weights


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["launch", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """In a folder whose name a shell must not split."""
    folder = tmp_path / "a b"
    folder.mkdir()
    return launch_recipe(folder, callbacks=[])


TWO = ("--processes", "2", "--nodes", "2")


def train_words(recipe: Path) -> list[str]:
    return ["luthier", "train", str(recipe), "optim.lr=0.5", "--processes", "2", "--nodes", "2"]


def environment(**more: str) -> dict[str, str]:
    bin_folder = str(Path(sys.executable).parent)
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", **more}


@pytest.mark.slow
def test_the_torchrun_command_trains(recipe: Path) -> None:
    text = printed(str(recipe), "train.max_steps=2", "--processes", "2")
    assert text.splitlines() == [
        f"luthier prepare '{recipe}' train.max_steps=2 --quiet",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node=2 --max-restarts=0 "
        f"-m luthier.cli train '{recipe}' train.max_steps=2",
    ]
    done = subprocess.run(["bash", "-euc", text], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_intact(recipe.parent / "run", at_least=2)
    assert weights(recipe.parent / "run")
    assert done.stdout.count("step 2/2 | loss") == 1  # process 0 alone tells


def test_torchrun_on_several_machines(recipe: Path) -> None:
    command = printed(str(recipe), *TWO).splitlines()[-1]
    words = shlex.split(command)
    assert words[1:] == [
        "torchrun",
        *("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=luthier-recipe", "--nproc-per-node=2"),
        *("--max-restarts=0", "--rdzv-endpoint=$HEAD:29500", "-m", "luthier.cli", "train", str(recipe)),
    ]
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words[2:])
    assert (parsed.nnodes, parsed.training_script_args) == ("2", ["train", str(recipe)])


SRUN = """#!/bin/bash
# Runs the command as a task on each of two machines, as srun would.
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = '#!/bin/bash\n[ "$*" = "show hostnames nodes[0-1]" ] && printf "127.0.0.1\\nelsewhere\\n"\n'


@pytest.mark.slow
def test_the_slurm_script_starts_two_machines(recipe: Path, tmp_path: Path) -> None:
    port = free_port()
    words = ("train.max_steps=2", "--processes", "1", "--nodes", "2", "--cpu", "--port", str(port))
    script = tmp_path / "job.sh"
    script.write_text(printed(str(recipe), *words, "--print", "slurm"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (shims / name).write_text(text)
        (shims / name).chmod(0o755)
    slurm = environment(SLURM_JOB_ID="7", SLURM_JOB_NODELIST="nodes[0-1]")
    slurm["PATH"] = f"{shims}{os.pathsep}{slurm['PATH']}"
    done = subprocess.run(["bash", str(script)], env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 machines with 1 process each") == 2
    assert done.stdout.count("step 2/2 | loss") == 1
    assert_intact(recipe.parent / "run", at_least=2)
    assert (recipe.parent / "run" / "launch.json").read_text() == '{"run_id": "slurm-7"}\n'


def test_the_slurm_script_asks_for_what_the_recipe_needs(recipe: Path) -> None:
    lines = printed(str(recipe), "optim.lr=0.5", *TWO, "--print", "slurm").splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=2"} <= set(asked)
    meeting = ["--rendezvous", "$head:29500", "--run-id", "slurm-$SLURM_JOB_ID"]
    assert shlex.split(lines[-1]) == ["srun", "--kill-on-bad-exit=1", *train_words(recipe), *meeting]


def test_the_kubernetes_manifest(recipe: Path) -> None:
    words = (*TWO, "--image", "me/luthier:1", "--claim", "disk", "--print", "kubernetes")
    service, job = yaml.safe_load_all(printed(str(recipe), "optim.lr=0.5", *words))
    name = "luthier-recipe"
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["selector"] == {"job-name": name}  # what Kubernetes writes on a Job's pods
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec: dict[str, Any] = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "OnFailure"
    (container,) = pod["containers"]
    # Pod 0 of an Indexed Job is called NAME-0, below the name of the Service.
    meeting = ["--rendezvous", f"{name}-0.{name}:29500", "--run-id", name]
    assert container["command"] == [*train_words(recipe), *meeting]
    assert container["image"] == "me/luthier:1" and container["ports"] == [{"containerPort": 29500}]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}


def test_the_skypilot_task(recipe: Path) -> None:
    task = yaml.safe_load(printed(str(recipe), "optim.lr=0.5", *TWO, "--gpu", "A100", "--print", "skypilot"))
    assert (task["num_nodes"], task["resources"]) == (2, {"accelerators": "A100:2"})
    assert subprocess.run(["bash", "-nc", task["run"]]).returncode == 0
    meeting = ["--rendezvous", "$head:29500", "--run-id", "$SKYPILOT_TASK_ID"]
    assert shlex.split(task["run"].splitlines()[-1]) == [*train_words(recipe), *meeting]


@pytest.mark.parametrize("kind", ["slurm", "kubernetes", "skypilot"])
def test_a_single_machine_meets_nobody(kind: str, recipe: Path) -> None:
    text = printed(str(recipe), "--processes", "2", "--print", kind)
    assert "--rendezvous" not in text and "--nodes" not in text.replace("#SBATCH --nodes=1", "")
    assert "Service" not in text


def test_another_machines_gpus_are_not_guessed(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["launch", str(recipe), "--print", "slurm"])
    assert result.exit_code == 2 and "give --processes" in result.stderr
    assert "--nproc-per-node=gpu" in printed(str(recipe))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("My Recipe_v2.yaml", "luthier-my-recipe-v2"),
        ("x/y/sft.yaml", "luthier-sft"),
        (f"{'a' * 80}.yaml", None),
    ],
)
def test_names_are_names_everywhere(file: str, name: str | None) -> None:
    recipe = load_recipe({"model": {"path": "tiny"}, "data": {"train": ["made"]}}).recipe
    start = Start(recipe, file)
    assert start.name == (name or f"luthier-{'a' * 42}") and len(start.name) <= 50
