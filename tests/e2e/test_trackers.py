"""Trackers: what each stored, read back from its own files, is what `trainer_log.jsonl` says."""

from __future__ import annotations

import json
import shutil
import socket
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import luthier
from luthier.types import RecipeError
from tests import tracked
from tests.tiny import chat_model, write_alpaca

TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio")
COMPARED = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity", "eval_accuracy")
SECRET = "hf_thisIsNeverWrittenDown"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trackio keeps all runs in one place, which it reads from the environment once."""
    return tmp_path_factory.mktemp("trackio")


@pytest.fixture
def offline(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The variables that keep trackers off the network; what they ask for all the same is in the list."""
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "MLFLOW_TRACKING_URI", "SWANLAB_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(store))
    asked: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local(host: Any) -> bool:
        return isinstance(host, str | bytes) and host in ("localhost", "127.0.0.1", "::1", b"localhost")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not local(address[0]):
            asked.append(address)
            raise OSError("no network in tests")
        connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None and not local(host):
            asked.append(host)
            raise socket.gaierror("no network in tests")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)
    return asked


def recipe(model: Path, folder: Path, tracker: str) -> dict[str, Any]:
    write_alpaca(folder / "rows.json", 24)
    return {
        "model": {"path": str(model), "token": SECRET},
        "data": {
            "train": ["rows.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "dev_split": 6,
        },
        "optim": {"type": "adamw", "lr": 0.02},
        "train": {
            "rows_per_device": 3,
            "epochs": 1,
            "eval_every": 2,
            "save_every": 2,
            "log_every": 1,
            "metrics": ["accuracy"],
            "plots": False,
            "output": str(folder / "run"),
            "report_to": [tracker],
        },
    }


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {
        name: [(line["current_steps"], line[name]) for line in lines if name in line] for name in COMPARED
    }


def as_stored(tracker: str, curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """TensorBoard's scalars are float32."""
    return [(step, float(np.float32(value))) for step, value in curve] if tracker == "tensorboard" else curve


def need(tracker: str) -> None:
    if util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed: pip install {tracker}")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_stored_values_are_the_logged_ones(
    tracker: str,
    model: Path,
    store: Path,
    offline: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(tracker)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = luthier.train(recipe(model, tmp_path, tracker), quiet=True).output
    (curves,) = getattr(tracked, tracker)(run).values()  # one run, its last evaluation included
    expected = logged(run)
    assert len(expected["loss"]) == 6
    assert [step for step, _ in expected["eval_accuracy"]] == [2, 4, 6]
    for name in COMPARED:
        if tracker == "swanlab":  # it keeps the first value of a step
            assert curves[name] == list(dict(reversed(expected[name])).items())[::-1], name
        else:
            assert curves[name] == as_stored(tracker, expected[name]), name
    assert offline == [], "something was looked for in the network"
    assert not list(elsewhere.iterdir()), "something was written into the working directory"
    for file in [*run.rglob("*"), *store.rglob("*")]:
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), f"the token is in {file}"


@pytest.mark.parametrize("tracker", TRACKERS)
def test_resumed_run_goes_on_in_the_same_place(
    tracker: str, model: Path, offline: list[Any], tmp_path: Path
) -> None:
    """The process is killed after step 6; the newest checkpoint that is left is that of step 4."""
    need(tracker)
    settings = recipe(model, tmp_path, tracker)
    run = luthier.train(settings, quiet=True).output
    shutil.rmtree(run / "checkpoint-6")
    luthier.train(settings, ["train.resume=auto"], quiet=True)
    (curves,) = getattr(tracked, tracker)(run).values()
    expected = logged(run)
    assert [step for step, _ in expected["loss"]] == [1, 2, 3, 4, 5, 6]
    for name in COMPARED:
        # A tracker that cannot forget has steps 5 and 6 twice, with the same values: the run is the same.
        assert set(curves[name]) == set(as_stored(tracker, expected[name])), name
    if tracker == "tensorboard":
        assert curves["loss"] == as_stored(tracker, expected["loss"])
    assert offline == []


def test_overwriting_a_run_removes_what_trackers_wrote(
    model: Path, offline: list[Any], tmp_path: Path
) -> None:
    need("tensorboard")
    settings = recipe(model, tmp_path, "tensorboard")
    run = luthier.train(settings, ["train.max_steps=2"], quiet=True).output
    before = {path.name for path in (run / "trackers/tensorboard").iterdir()}
    luthier.train(settings, ["train.max_steps=1", "train.overwrite=true"], quiet=True)
    assert not before & {path.name for path in (run / "trackers/tensorboard").iterdir()}
    (curves,) = tracked.tensorboard(run).values()
    assert [step for step, _ in curves["loss"]] == [1]


def test_a_tracker_s_own_folder_wins(
    model: Path, offline: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    run = luthier.train(recipe(model, tmp_path, "tensorboard"), ["train.max_steps=1"], quiet=True).output
    assert [path.name[:10] for path in (tmp_path / "boards").iterdir()] == ["events.out"]
    assert not (run / "trackers/tensorboard").exists()


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (
            ["tensorbord"],
            [],
            "'tensorbord' is no tracker; did you mean tensorboard? choose from azure_ml, clearml",
        ),
        (["clearml"], [], "clearml: ClearMLCallback requires 'clearml' to be installed"),
        (
            ["tensorboard"],
            ["model.token=hf_abc"],
            "model.token: trackers keep the command line, and the token with it; set HF_TOKEN instead",
        ),
    ],
)
def test_refused_before_anything_is_written(
    names: list[str], changes: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    settings = recipe(model, tmp_path, "tensorboard")
    settings["train"]["report_to"] = names
    with pytest.raises(RecipeError) as error:
        luthier.train(settings, changes, quiet=True)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_library_is_an_error_with_its_installation(
    tracker: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == tracker else found(name, *rest)
    )
    with pytest.raises(RecipeError) as error:
        luthier.train(recipe(model, tmp_path, tracker), quiet=True)
    assert str(error.value) == (
        f"train.report_to: {tracker} needs the package {tracker}, which is not installed: pip install {tracker}"
    )
    assert not (tmp_path / "run").exists()
