"""Processes that divide a model among them (`parallel: fsdp2`) are one process: losses, weights, files.

All runs in two processes are made once, in one pair of them; the other half of each comparison runs here.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.model.load import locate
from luthier.recipe.schema import ModelSpec
from luthier.trainer.checkpoint import list_checkpoints, verify
from luthier.types import CheckpointError
from tests import processes
from tests.online import logged
from tests.tiny import FEEDBACK_COLUMNS, PAIR_COLUMNS, chat_model, write_alpaca, write_feedback, write_pairs

SGD = {"type": "sgd", "lr": 0.1, "momentum": 0.9, "schedule": "constant"}
ADAM = {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1}
LORA = {"type": "lora", "rank": 4, "targets": "all-linear"}
STEPS = 4
FURTHER = {"sgd": 2e-6}
"""How far weights of two runs may be apart, as a part of the largest movement. Gradients are the same but for the order
of their sums, which is a relative error of some float32 roundings (6e-8). What Adam divides by the gradient's own size
has other errors where that is small; 1e-3 stands for it."""


@dataclass(frozen=True)
class Case:
    """What a run is made of, beside what all are. `rounded` is how far, relatively, numbers may be apart where sums or
    16 bits round more than the others."""

    stage: dict[str, Any] = field(default_factory=lambda: {"type": "sft"})
    method: dict[str, Any] = field(default_factory=lambda: {"type": "full"})
    optim: dict[str, Any] = field(default_factory=lambda: SGD)
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    rounded: float = 0.0


SHORT: dict[str, Case] = {
    # Gradients are clipped to a norm of 1, which all of them have; passes are unequal in number.
    "sft": Case(train={"save_every": 2}),
    "sft-lora": Case(method=LORA, optim=ADAM, train={"save_every": 2}),
    "pt-tied": Case(stage={"type": "pt"}, optim=ADAM, family="llama-tied"),
    "dpo": Case(stage={"type": "dpo"}),
    "dpo-lora": Case(stage={"type": "dpo"}, method=LORA, optim=ADAM),
    "rm": Case(stage={"type": "rm"}, optim=ADAM),
    "rm-lora": Case(stage={"type": "rm"}, method=LORA),
    "best": Case(optim={**SGD, "lr": 3.0}, train={"eval_every": 1, "save_every": 1, "load_best": True}),
    "offload": Case(optim=ADAM, parallel={"cpu_offload": True}),
    "in-parts": Case(optim=ADAM, parallel={"state": "sharded"}, train={"save_every": 2}),
    "bfloat16": Case(parallel={"param_dtype": "bfloat16", "reduce_dtype": "float32"}, rounded=5e-3),
}
LONG: dict[str, Case] = {
    "sft-adamw": Case(optim=ADAM),
    "lora-sgd": Case(method=LORA),
    "not-clipped": Case(optim={**SGD, "lr": 0.02, "max_grad_norm": 1e9}),
    "layers-kept": Case(stage={"type": "dpo"}, parallel={"reshard_after_forward": False}),
    "reduced-once": Case(parallel={"reduce_each_pass": False}),
    "dpo-other": Case(stage={"type": "dpo", "reference": {"path": "qwen3"}}, family="qwen3"),
    "checkpointed": Case(model={"gradient_checkpointing": True}),
    "checkpointed-lora": Case(model={"gradient_checkpointing": True}, method=LORA),
    "freeze": Case(method={"type": "freeze", "layers": 1}, model={"gradient_checkpointing": True}),
    "llama_pro": Case(method={"type": "llama_pro", "blocks": 2}),
    "mixture": Case(family="qwen3-moe"),
    "gemma3": Case(family="gemma3-window"),
    "fp16": Case(train={"precision": "fp16"}, rounded=2e-3),
    "bf16": Case(train={"precision": "bf16"}, rounded=1e-2),
    "lion": Case(optim={"type": "lion", "lr": 1e-3}),
    "schedule-free": Case(optim={"type": "schedule_free", "lr": 1e-2}, train={"eval_every": 1}),
    # SmolLM2. The norm that its gradients are divided by is a sum of 135 million squares, itself rounded by 1e-5.
    "real": Case(family="embedded", train={"max_steps": 2, "eval_every": None}, rounded=2e-4),
    "oft": Case(method={"type": "oft", "block_size": 8}, optim=ADAM),
    "vera": Case(method={"type": "vera"}, optim=ADAM),
    "ia3": Case(method={"type": "ia3"}, optim=ADAM),
    "miss": Case(method={"type": "miss", "rank": 8}, optim=ADAM),
    **{
        f"lora-{name}": Case(method={**LORA, **more}, optim=ADAM)
        for name, more in {
            "dora": {"dora": True},
            "pissa": {"init": "pissa"},
            "matrices": {"modules_to_save": ["embed_tokens", "lm_head"]},
            "rows": {"trainable_tokens": [5, 6, 40]},
            "plus": {"lora_plus_ratio": 4},
            "fa": {"freeze_a": True},
        }.items()
    },
}
CASES = SHORT | LONG
RESUMED = ("sft", "sft-lora", "in-parts")


def recipe(folder: Path, name: str) -> dict[str, Any]:
    """The recipe of one process; all files that it names are written into `folder`."""
    case, kind = CASES[name], str(CASES[name].stage["type"])
    path = folder / case.family
    if case.family != "embedded" and not path.is_dir():
        chat_model(path, case.family)
    data: dict[str, Any] = {"file_name": str(folder / f"{kind}.json")}
    write = {"dpo": write_pairs, "rm": write_pairs, "kto": write_feedback}.get(kind, write_alpaca)
    write(folder / f"{kind}.json", 40)
    data |= {write_pairs: PAIR_COLUMNS, write_feedback: FEEDBACK_COLUMNS}.get(write, {})
    train = {"epochs": 4, "max_steps": STEPS, "tokens_per_batch": 700, "tokens_per_pass": 96, "log_every": 1}
    if kind == "rm":  # two passes of two processes
        train["tokens_per_pass"] = 400
    train |= {"save_every": None, "plots": False, "eval_every": 2, "output": str(folder / "one" / name)}
    stage = copy.deepcopy(case.stage)
    if isinstance(other := stage.get("reference"), dict):
        other["path"] = str(chat_model(folder / "other", other["path"], initializer_range=0.05))
    return {
        "model": {"path": "embedded" if case.family == "embedded" else str(path), **case.model},
        "data": {"train": [data], "dev_split": 8, "max_length": 96, "cache": str(folder / "cache")},
        "stage": stage,
        "method": case.method,
        "optim": case.optim,
        "train": {**train, **case.train},
    }


def divided(base: Mapping[str, Any], output: Path, name: str) -> dict[str, Any]:
    found = copy.deepcopy(dict(base))
    found["train"]["output"] = str(output)
    return found | {"parallel": {"type": "fsdp2", **CASES[name].parallel}}


def goes_on(base: Mapping[str, Any], run: Path, output: Path) -> dict[str, Any]:
    """The recipe in a run directory that was left after the run's first checkpoint."""
    checkpoint = list_checkpoints(run)[0]
    output.mkdir(parents=True)
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(run / name, output / name)
    shutil.copytree(checkpoint, output / checkpoint.name)
    found = copy.deepcopy(dict(base))
    found["train"] |= {"output": str(output), "resume": "auto"}
    return found


@dataclass
class Runs:
    """Where the runs of one and of several processes are."""

    folder: Path
    recipes: dict[str, dict[str, Any]]

    def one(self, name: str) -> Path:
        return self.folder / "one" / name

    def two(self, name: str) -> Path:
        return self.folder / "two" / name


FAULTS: dict[str, processes.Change] = {"sft": processes.local_weights, "dpo": processes.reference_that_stays}


def make(folder: Path, names: Iterable[str], resumed: Iterable[str] = (), faults: Iterable[str] = ()) -> Runs:
    """All runs of these cases; `resumed` names those that two processes go on with where one has left them, `faults`
    those that are made once more with a fault."""
    recipes = {name: recipe(folder, name) for name in names}
    runs = Runs(folder, recipes)
    for base in recipes.values():
        luthier.train(base, quiet=True)
    made: list[tuple[dict[str, Any], processes.Change | None]] = []
    made += [(divided(base, runs.two(name), name), None) for name, base in recipes.items()]
    made += [(divided(recipes[name], runs.two(f"{name}-fault"), name), FAULTS[name]) for name in faults]
    for name in resumed:
        output = runs.two(f"{name}-resumed")
        made.append((divided(goes_on(recipes[name], runs.one(name), output), output, name), None))
    said = processes.train_in_processes(made, folder / "said")
    assert [text for texts in said for text in texts if text] == []
    return runs


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make(tmp_path_factory.mktemp("short"), SHORT, RESUMED, FAULTS)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make(tmp_path_factory.mktemp("long"), LONG)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(run.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def start(base: Mapping[str, Any]) -> Path:
    """The folder that training began from."""
    return Path(locate(ModelSpec(path=base["model"]["path"])).path)


def furthest(found: Path, expected: Path, begun: Path, part: float) -> float:
    """How far weights of two runs are apart: 1 is `part` of the largest movement, and two roundings of the weight."""
    one, two, before = weights(found), weights(expected), weights(begun)
    assert one.keys() == two.keys()
    moved = max(float((two[name] - before.get(name, torch.zeros(()))).abs().max()) for name in two)
    assert moved > 1e-3
    apart = [(one[name] - two[name]).abs() / (part * moved + 2**-22 * two[name].abs()) for name in two]
    return max(float(ratio.max()) for ratio in apart)


def assert_same(found: Path, runs: Runs, name: str) -> None:
    """Numbers of the log, and weights, are those of one process."""
    case, expected = CASES[name], runs.one(name)
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted) > runs.recipes[name]["train"]["max_steps"]
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for key, value in other.items():
            if key not in ("tokens", "total_flos"):  # passes that teach nothing count
                assert line[key] == pytest.approx(value, rel=case.rounded or 1e-4, abs=1e-6), (key, line)
    part = case.rounded or FURTHER.get(case.optim["type"], 2e-4)
    assert furthest(found, expected, start(runs.recipes[name]), part) < 1
    record = json.loads((found / "run.json").read_text(encoding="utf-8"))["parallel"]
    assert record["processes"] == 1 or record == {"type": "fsdp2", "processes": 2, "wrapped": "FSDPModule"}


@pytest.mark.parametrize("name", SHORT)
def test_two_processes_that_divide_the_model_are_one(name: str, short: Runs) -> None:
    assert_same(short.two(name), short, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_so_they_are_with(name: str, long: Runs) -> None:
    assert_same(long.two(name), long, name)


def test_an_optimizer_in_parts_is_written_by_every_process(short: Runs) -> None:
    """And hashed: a part that is damaged is found."""
    checkpoint = list_checkpoints(short.two("in-parts"))[0]
    parts = sorted(path.name for path in (checkpoint / "optimizer").glob("*.distcp"))
    assert [name.split("_")[2] for name in parts] == ["0", "1"]
    verify(checkpoint)
    damaged = checkpoint.with_name("damaged")
    shutil.copytree(checkpoint, damaged)
    part = damaged / "optimizer" / parts[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match=parts[1]):
        verify(damaged)


def test_what_was_compared_is_what_was_meant(short: Runs) -> None:
    """Gradients were clipped, processes had passes of unequal number, the best was not the last."""
    lines = logged(short.two("sft"))
    assert all(line["grad_norm"] > 1.5 for line in lines if "grad_norm" in line)
    losses = [line["eval_loss"] for line in logged(short.one("best")) if "eval_loss" in line]
    assert min(losses[:-1]) < losses[-2]  # the last number is of the best weights
    assert losses[-1] == pytest.approx(min(losses))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str, short: Runs) -> None:
    found, expected = short.two(f"{name}-fault"), short.one(name)
    assert furthest(found, expected, start(short.recipes[name]), FURTHER["sgd"]) > 1000


# ---- files -------------------------------------------------------------------------------------------------


def logits(folder: Path, method: str) -> torch.Tensor:
    """Of the plain libraries."""
    kind: Any = AutoPeftModelForCausalLM if method == "lora" else AutoModelForCausalLM
    model = kind.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize("name", ["sft", "sft-lora", "pt-tied"])
def test_what_is_saved_is_loaded_by_plain_libraries(name: str, short: Runs) -> None:
    one, two = short.one(name), short.two(name)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    method = CASES[name].method["type"]
    config = "adapter_config.json" if method == "lora" else "config.json"
    found, expected = (json.loads((run / config).read_text()) for run in (two, one))
    for one_of in (found, expected):
        one_of["target_modules"] = sorted(one_of.get("target_modules", ()))  # a set, in no order
    assert found == expected
    if method == "full":
        assert json.loads((two / config).read_text())["architectures"] == ["LlamaForCausalLM"]
    torch.testing.assert_close(logits(two, method), logits(one, method), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_a_checkpoint_of_two_is_that_of_one(name: str, short: Runs) -> None:
    """The same files, and in the optimizer's the same numbers."""
    one, two = (list_checkpoints(run)[0] for run in (short.one(name), short.two(name)))
    verify(two)
    own = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in two.iterdir()} - own == {path.name for path in one.iterdir()} - own
    found, expected = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (two, one))
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_where_one_has_left(name: str, short: Runs) -> None:
    assert_same(short.two(f"{name}-resumed"), short, name)


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_where_two_have_left(name: str, short: Runs, tmp_path: Path) -> None:
    luthier.train(goes_on(short.recipes[name], short.two(name), tmp_path / "run"), quiet=True)
    assert_same(tmp_path / "run", short, name)


@pytest.mark.slow
def test_three_processes_go_on_where_two_have_left(short: Runs, tmp_path: Path) -> None:
    """Their parts are of unequal size: 32 rows for three."""
    made = []
    for name in RESUMED:
        output = tmp_path / name
        made.append((divided(goes_on(short.recipes[name], short.two(name), output), output, name), None))
    said = processes.train_in_processes(made, tmp_path / "said", count=3)
    assert [text for texts in said for text in texts if text] == []
    for name in RESUMED:
        record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["parallel"]
        assert record == {"type": "fsdp2", "processes": 3, "wrapped": "FSDPModule"}
        part = FURTHER.get(CASES[name].optim["type"], 2e-4)
        assert furthest(tmp_path / name, short.one(name), start(short.recipes[name]), part) < 1
