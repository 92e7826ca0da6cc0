"""Processes that divide every layer's matrices (`parallel: tensor`) are one process: losses, weights, files.

All runs in two processes are made once, in one pair of them; the other half of each comparison runs here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import luthier
from luthier.trainer.checkpoint import list_checkpoints, verify
from tests import processes
from tests.invariant import test_fsdp
from tests.invariant.test_fsdp import ADAM, FURTHER, LORA, SGD, STEPS, Case, Runs, furthest, goes_on, logits
from tests.online import logged

OWN_TOKENIZER = {"vocabulary": {"resize": True}}  # transformers gives Qwen's one token more
SHORT: dict[str, Case] = {
    "sft": Case(train={"save_every": 2}),
    "sft-lora": Case(method=LORA, optim=ADAM, train={"save_every": 2}),
    "pt-tied": Case(stage={"type": "pt"}, family="llama-tied"),
    "dpo": Case(stage={"type": "dpo"}),
    "dpo-lora": Case(stage={"type": "dpo"}, method=LORA, optim=ADAM),
    "rm": Case(stage={"type": "rm"}, optim=ADAM),
    "heads-normed": Case(family="qwen3", model=OWN_TOKENIZER),
    "best": Case(optim={**SGD, "lr": 3.0}, train={"eval_every": 1, "save_every": 1, "load_best": True}),
}
LONG: dict[str, Case] = {
    "rm-lora": Case(stage={"type": "rm"}, method=LORA),
    "kto": Case(stage={"type": "kto"}),
    "asft-lora": Case(stage={"type": "sft", "loss": "asft"}, method=LORA),
    "precomputed": Case(stage={"type": "dpo", "reference": "precompute"}),
    "dpo-other": Case(stage={"type": "dpo", "reference": {"path": "llama"}}),
    "checkpointed": Case(model={"gradient_checkpointing": True}),
    "checkpointed-lora": Case(model={"gradient_checkpointing": True}, method=LORA),
    "padded": Case(model={"rows": "padded"}),
    "neftune": Case(train={"neftune_alpha": 5}),
    "freeze": Case(method={"type": "freeze", "layers": 1}),
    "llama_pro": Case(method={"type": "llama_pro", "blocks": 2}),
    "bf16": Case(train={"precision": "bf16"}, rounded=1e-2),
    "lion": Case(optim={"type": "lion", "lr": 1e-3}),
    "schedule-free": Case(optim={"type": "schedule_free", "lr": 1e-2}, train={"eval_every": 1}),
    "qwen2-biases": Case(method={**LORA, "bias": "all"}, family="qwen2", model=OWN_TOKENIZER),
    **{
        family: Case(family=family)
        for family in ("gemma2-softcap", "gemma3-window", "phi", "phi3", "mistral-window", "granite-scaled")
    },
    **{
        f"lora-{name}": Case(method={**LORA, **more}, optim=ADAM)
        for name, more in {
            "pissa": {"init": "pissa"},
            "matrices": {"modules_to_save": ["embed_tokens", "lm_head"]},
            "rows": {"trainable_tokens": [5, 6, 40]},
            "plus": {"lora_plus_ratio": 4},
            "fa": {"freeze_a": True},
        }.items()
    },
}
CASES = SHORT | LONG
TENSOR = {"type": "tensor"}


def recipe(folder: Path, name: str) -> dict[str, Any]:
    with patch.dict(test_fsdp.CASES, {name: CASES[name]}):
        return test_fsdp.recipe(folder, name)


def divided(base: Mapping[str, Any], output: Path, **spec: Any) -> dict[str, Any]:
    found = copy.deepcopy(dict(base))
    found["train"]["output"] = str(output)
    return found | {"parallel": TENSOR | spec}


def assert_same(found: Path, runs: Runs, name: str, count: int = 2) -> None:
    """Numbers of the log, tokens and operations among them, and weights, are those of one process."""
    case, expected = CASES[name], runs.one(name)
    lines, wanted = logged(found), logged(expected)
    assert len(lines) == len(wanted) > STEPS
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for key, value in other.items():
            if key == "rewards/accuracies" and abs(other["rewards/margins"]) < 1e-6:
                continue  # the answers of a pair are as good as each other, until something is rounded
            assert line[key] == pytest.approx(value, rel=case.rounded or 1e-4, abs=1e-6), (key, line)
    part = case.rounded or FURTHER.get(case.optim["type"], 2e-4)
    assert furthest(found, expected, Path(runs.recipes[name]["model"]["path"]), part) < 1
    record = json.loads((found / "run.json").read_text(encoding="utf-8"))["parallel"]
    assert record["processes"] == count
    if count > 1:  # one has nothing to share with
        assert record == {"type": "tensor", "processes": count, "wrapped": "DTensor"}


# ---- changes -----------------------------------------------------------------------------------------------


@contextmanager
def _recorded(folder: Path, rank: int) -> Iterator[None]:
    from luthier.parallel.tensor import TensorParallel, _own

    divide = TensorParallel.divide

    def seen(self: TensorParallel, model: nn.Module) -> None:
        divide(self, model)
        held = {name: list(_own(parameter).shape) for name, parameter in model.named_parameters()}
        bytes_held = sum(_own(parameter).untyped_storage().nbytes() for parameter in model.parameters())
        (folder / f"held-{rank}.json").write_text(json.dumps({"shapes": held, "bytes": bytes_held}))

    with patch.object(TensorParallel, "divide", seen):
        yield


def recorded(folder: Path, rank: int) -> AbstractContextManager[None]:
    """What this process holds of each parameter is written down."""
    return _recorded(folder, rank)


def own_heads_alone(rank: int) -> AbstractContextManager[Any]:
    """Gradients of norms over heads are not added up."""
    return patch("luthier.parallel.tensor._added_up", lambda gradient, group: gradient)


# ---- runs --------------------------------------------------------------------------------------------------


def make(folder: Path, names: Iterable[str], more: Iterable[Any] = ()) -> tuple[Runs, list[list[str]]]:
    """All runs of these cases, and `more`, which is made from them; of each process what those of `more` raised."""
    recipes = {name: recipe(folder, name) for name in names}
    runs = Runs(folder, recipes)
    for base in recipes.values():
        luthier.train(base, quiet=True)
    made: list[Any] = [(divided(base, runs.two(name)), None) for name, base in recipes.items()]
    made += [one(runs) for one in more]
    said = processes.train_in_processes(made, folder / "said")
    count = len(recipes)
    assert [text for texts in said for text in texts[:count] if text] == []
    return runs, [texts[count:] for texts in said]


def _resumed(name: str, runs: Runs) -> Any:
    output = runs.two(f"{name}-resumed")
    return divided(goes_on(runs.recipes[name], runs.one(name), output), output), None


def _changed(name: str, label: str, change: Any, runs: Runs) -> Any:
    return divided(runs.recipes[name], runs.two(label)), change


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runs, list[list[str]]]:
    folder = tmp_path_factory.mktemp("short")
    return make(
        folder,
        SHORT,
        [
            partial(_resumed, "sft"),
            partial(_resumed, "sft-lora"),
            partial(_changed, "sft", "recorded", partial(recorded, folder)),
            partial(_changed, "heads-normed", "fault-heads", own_heads_alone),
        ],
    )


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make(tmp_path_factory.mktemp("long"), LONG)[0]


@pytest.mark.parametrize("name", SHORT)
def test_two_processes_that_share_layers_are_one(name: str, short: tuple[Runs, Any]) -> None:
    assert_same(short[0].two(name), short[0], name)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_so_they_are_with(name: str, long: Runs) -> None:
    assert_same(long.two(name), long, name)


def test_each_process_holds_half_of_every_matrix_of_a_layer(short: tuple[Runs, Any]) -> None:
    """32 hidden, 48 inner, 4 heads and 2 of keys, of 8 each; embeddings, head and norms are whole."""
    for rank in range(2):
        held = json.loads((short[0].folder / f"held-{rank}.json").read_text())
        halves = {"q_proj": [16, 32], "k_proj": [8, 32], "v_proj": [8, 32], "o_proj": [32, 16]}
        halves |= {"gate_proj": [24, 32], "up_proj": [24, 32], "down_proj": [32, 24]}
        for name, shape in held["shapes"].items():
            module = name.split(".")[-2]
            assert shape == halves.get(module, [259, 32] if "embed" in name or "lm_head" in name else [32])
        numbers = sum(torch.Size(shape).numel() for shape in held["shapes"].values())
        assert held["bytes"] == 4 * numbers  # no part is a view of a whole one


def test_a_plan_that_does_not_suit_is_found_before_it_trains(short: tuple[Runs, list[list[str]]]) -> None:
    for texts in short[1]:
        assert (
            "ModelError: parallel: tensor: divided as its plan says, Qwen3ForCausalLM answers otherwise"
            in texts[3]
        )
        assert [text for number, text in enumerate(texts) if number != 3 and text] == []
    assert not (short[0].two("fault-heads") / "model.safetensors").exists()


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "sft-lora", "pt-tied", "heads-normed"])
def test_what_is_saved_is_loaded_by_plain_libraries(name: str, short: tuple[Runs, Any]) -> None:
    one, two = short[0].one(name), short[0].two(name)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    method = CASES[name].method["type"]
    config = "adapter_config.json" if method == "lora" else "config.json"
    said = [json.loads((run / config).read_text()) for run in (one, two)]
    for values in said:  # a set, in PEFT's hands
        values["target_modules"] = sorted(values.get("target_modules", ()))
    assert said[0] == said[1]
    torch.testing.assert_close(logits(two, method), logits(one, method), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_a_checkpoint_of_two_is_that_of_one(name: str, short: tuple[Runs, Any]) -> None:
    """The same files, and in the optimizer's the same numbers."""
    one, two = (list_checkpoints(run)[0] for run in (short[0].one(name), short[0].two(name)))
    verify(two)
    own = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in two.iterdir()} - own == {path.name for path in one.iterdir()} - own
    found, expected = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (two, one))
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_two_processes_go_on_where_one_has_left(name: str, short: tuple[Runs, Any]) -> None:
    assert_same(short[0].two(f"{name}-resumed"), short[0], name)


@pytest.mark.parametrize("name", ["sft", "sft-lora"])
def test_one_process_goes_on_where_two_have_left(name: str, short: tuple[Runs, Any], tmp_path: Path) -> None:
    base = goes_on(short[0].recipes[name], short[0].two(name), tmp_path / "run")
    luthier.train(base | {"parallel": TENSOR}, quiet=True)
    assert_same(tmp_path / "run", short[0], name, count=1)


@pytest.mark.long
def test_two_groups_of_two_are_one(short: tuple[Runs, Any], tmp_path: Path) -> None:
    """Rows are divided between groups, matrices within them; the last goes on where one process has left."""
    runs = short[0]
    made: list[Any] = [
        (divided(runs.recipes[name], tmp_path / name, group=2), None)
        for name in ("sft", "sft-lora", "heads-normed")
    ]
    output = tmp_path / "resumed"
    made.append((divided(goes_on(runs.recipes["sft"], runs.one("sft"), output), output, group=2), None))
    said = processes.train_in_processes(made, tmp_path / "said", count=4)
    assert [text for texts in said for text in texts if text] == []
    for name, run in {
        "sft": "sft",
        "sft-lora": "sft-lora",
        "heads-normed": "heads-normed",
        "resumed": "sft",
    }.items():
        lines, wanted = logged(tmp_path / name), logged(runs.one(run))
        for line, other in zip(lines, wanted, strict=True):
            for key in {"loss", "eval_loss", "grad_norm"} & (line.keys() | other.keys()):
                assert line[key] == pytest.approx(other[key], rel=1e-4), (name, key)
        start, part = Path(runs.recipes[run]["model"]["path"]), FURTHER.get(CASES[run].optim["type"], 2e-4)
        assert furthest(tmp_path / name, runs.one(run), start, part) < 1
        record = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["parallel"]
        assert record == {"type": "tensor", "processes": 4, "wrapped": "DTensor"}
