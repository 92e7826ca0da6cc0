"""Training on a stream: the same as on a table, stopped and killed, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.check.check import check
from luthier.data.stream_preview import _sampled
from luthier.trainer.checkpoint import newest_valid
from luthier.types import CheckpointError, DataError, RecipeError
from tests.tiny import chat_model

STEPS = 9

KILLED = """
import os, signal, sys
import luthier
from luthier.trainer.trainer import PeftTrainer

step = PeftTrainer.training_step

def dies(self, *args, **kwargs):
    if self.state.global_step == 5:
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

PeftTrainer.training_step = dies
luthier.train(sys.argv[1], quiet=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    chat_model(folder / "model")
    for name, count in (("a", 26), ("b", 13)):
        rows = [{"instruction": f"{name} {i}?", "output": f"{name * (1 + i % 5)} {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe_of(folder: Path, output: str, **data: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": ["a.jsonl", "b.jsonl"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "max_length": 128,
            **data,
        },
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {
            "rows_per_device": 3,
            "max_steps": STEPS,
            "save_every": 2,
            "log_every": 1,
            "plots": False,
            "output": str(folder / output),
        },
    }


STREAMED: dict[str, Any] = {
    "stream": {"buffer": 11},
    "packing": True,
    "mix": {"strategy": "interleave", "until": "all"},
}


def logged(run: Path, *keys: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("current_steps", "loss", *keys) if key in line}
        for line in lines
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    torch.set_num_threads(1)  # as the tests do, which come after
    return luthier.train(recipe_of(folder, "whole", **STREAMED), quiet=True).output


def test_unshuffled_it_learns_what_a_table_does(folder: Path) -> None:
    """Buffer 1 and no shuffling: the same losses and the same weights, over the end of an epoch."""
    runs = []
    for name, stream in (("table", None), ("stream", {"buffer": 1})):
        tree = recipe_of(folder, name, shuffle=False, stream=stream)
        tree["train"] |= {"max_steps": 15}
        tree["method"]["dropout"] = (
            0.0  # a loader begins each epoch of a table with a draw from torch's generator
        )
        runs.append(luthier.train(tree, quiet=True).output)
    table, stream = runs
    assert logged(table) == logged(stream)
    weights = [load_file(run / "adapter_model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_it_ends_as_if_it_had_not_been(folder: Path, whole: Path) -> None:
    """kill -9 in the middle of the sixth step; the run goes on from the checkpoint before it."""
    file = folder / "killed.json"
    tree = recipe_of(folder, "killed", **STREAMED)
    file.write_text(json.dumps(tree))
    # One thread, as in this process: another number of them adds in another order.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(file)], env=environment, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    newest, _ = newest_valid(folder / "killed", resumable=True)
    assert newest is not None and newest.name == "checkpoint-4"
    position = json.loads((newest / "loop_state.json").read_text())["stream"]
    assert set(position) == {"rows", "units", "counts"}
    run = luthier.train(tree, ["train.resume=auto", "data.workers=2"], quiet=True).output
    numbers = ("stream_epoch", "stream_rows", "stream_lost")
    assert logged(run, *numbers) == logged(whole, *numbers)
    ends = [load_file(one / "adapter_model.safetensors") for one in (whole, run)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_run_says_what_it_read(whole: Path) -> None:
    stream = json.loads((whole / "run.json").read_text())["stream"]
    assert [report["dataset"] for report in stream["reports"]] == ["a", "b"]
    assert stream["stream_rows"] == sum(report["rows"] for report in stream["reports"]) >= 52
    assert stream["stream_lost"] == 0


def test_rows_from_the_start_are_held_out(folder: Path) -> None:
    tree = recipe_of(folder, "held", stream={"buffer": 4}, dev_split=5)
    result = luthier.train(tree, quiet=True)
    assert result.metrics["eval_loss"] > 0
    (report, _) = json.loads((result.output / "run.json").read_text())["stream"]["reports"]
    assert report["rows"] <= 21 * 2  # five of the 26 rows are in no epoch


def test_epochs_of_a_stream_are_saved(folder: Path) -> None:
    tree = recipe_of(folder, "epochs", stream={"buffer": 4})
    tree["data"]["train"] = ["b.jsonl"]  # 13 rows: five steps
    tree["train"] |= {"save_every": "epoch", "max_steps": 11}
    run = luthier.train(tree, quiet=True).output
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-5",
    ]


def test_check_reads_the_first_rows_alone(folder: Path, tmp_path: Path) -> None:
    """A file whose later rows cannot be read is no trouble before they come."""
    row = json.dumps({"instruction": "one", "output": "two"})
    (tmp_path / "long.jsonl").write_text((row + "\n") * 1500 + "{broken\n")
    tree = recipe_of(folder, "checked", stream={"buffer": 4})
    tree["data"] |= {"train": ["long.jsonl"], "directory": str(tmp_path)}
    found = check(tree, probe=False)
    assert found.ok, found.problems
    assert [(dataset.report.dataset, dataset.report.rows) for dataset in found.datasets] == [("long", 1000)]
    assert any("data.stream: the first 1,000 rows" in note for note in found.notes)
    tree["train"] |= {"rows_per_device": 250, "max_steps": 7, "save_every": 100}
    with pytest.raises(DataError, match=r"long.jsonl, line 1501, column 2: not JSON"):
        luthier.train(tree, quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.max_steps": None}, "data.stream needs train.max_steps"),
        ({"data.dev_split": 0.1}, "data.dev_split: 0.1 is a share"),
        ({"data.mix": {"temperature": 2.0}}, "data.mix.temperature needs the sizes of the sets"),
        (
            {"stage": {"type": "grpo", "rewards": [{"type": "length", "most": 9}]}},
            "data.stream does not go with stage: grpo",
        ),
        (
            {"stage": {"type": "dpo", "reference": "precompute"}},
            "stage.reference: precompute asks the reference",
        ),
        (
            {"data.train": [{"file_name": "a.jsonl", "num_samples": 5}]},
            "data set 'a.jsonl': num_samples draws",
        ),
        (
            {"train.extra": {"dataloader_num_workers": 2}},
            "train.extra.dataloader_num_workers does not go with",
        ),
    ],
)
def test_what_does_not_go_with_a_stream(folder: Path, changes: dict[str, Any], message: str) -> None:
    tree = recipe_of(folder, "refused", stream={"buffer": 4})
    for key, value in changes.items():
        *path, last = key.split(".")
        place = tree
        for name in path:
            place = place[name]
        place[last] = value
    with pytest.raises(RecipeError, match=message):
        luthier.train(tree, quiet=True)


def test_feedback_and_pairs_are_streamed(folder: Path, tmp_path: Path) -> None:
    """kto takes its mismatched answers from the same block, which is all rows here; dpo shares prompts as ever."""
    from tests.tiny import FEEDBACK_COLUMNS, PAIR_COLUMNS, write_feedback, write_pairs

    write_pairs(tmp_path / "pairs.json", 12)
    write_feedback(tmp_path / "labels.json", 12)
    for stage, file, columns in (("dpo", "pairs", PAIR_COLUMNS), ("kto", "labels", FEEDBACK_COLUMNS)):
        runs = []
        for name, stream in (("table", None), ("stream", {"buffer": 1})):
            tree = recipe_of(folder, f"{stage}-{name}", shuffle=False, stream=stream)
            tree["stage"], tree["method"]["dropout"] = {"type": stage}, 0.0
            tree["data"] |= {"train": [{"file_name": f"{file}.json", **columns}], "directory": str(tmp_path)}
            tree["train"] |= {"max_steps": 5}
            runs.append(logged(luthier.train(tree, quiet=True).output))
        assert runs[0] == runs[1]


def test_a_changed_file_is_refused_whatever_was_changed(folder: Path, tmp_path: Path) -> None:
    """Another character in the middle of a file, which keeps its size: the run does not go on with it."""
    text = (folder / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text)
    tree = recipe_of(folder, "changed", stream={"buffer": 4})
    tree["data"] |= {"train": ["b.jsonl"], "directory": str(tmp_path)}
    tree["train"] |= {"max_steps": 6, "output": str(tmp_path / "run")}
    whole = logged(luthier.train(tree, quiet=True).output)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "b.jsonl").write_text(text.replace('"b 6?"', '"b 7?"'))
    with pytest.raises(CheckpointError, match="the training data, or how it becomes tokens, is another"):
        luthier.train(tree, ["train.resume=auto"], quiet=True)
    (tmp_path / "b.jsonl").write_text(text)
    assert logged(luthier.train(tree, ["train.resume=auto"], quiet=True).output) == whole


def test_the_hash_of_a_streamed_file_sees_its_pieces(tmp_path: Path) -> None:
    """Every byte of a file up to 1 MiB; of a larger one the ends and pieces that are spread over all of it."""
    file, small, large = tmp_path / "x", 1 << 20, 40 << 20

    def seen(size: int, at: int) -> bool:
        file.write_bytes(bytes(size))
        before = _sampled(file)
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"x")
        return _sampled(file) != before

    assert all(seen(small, at) for at in (0, 65536, 65537, 500_000, 983_041, small - 1))
    assert all(
        seen(large, at) for at in (0, large // 2, large // 2 + 4095, large * 200 // 256, large - 65536)
    )
    assert not seen(large, large // 2 + 4096)
    before = _sampled(file)
    os.utime(file, (1, 1))
    assert _sampled(file) == before
