"""`luthier selfcheck` holds on an honest build, and each planted fault makes it fail and name the right claim."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from luthier.cli import app
from luthier.data import encode
from luthier.methods.lora import Lora
from luthier.model import attention, kernel
from luthier.selfcheck.verb import CHECKS, selfcheck
from luthier.trainer.trainer import PeftTrainer
from tests.tiny import chat_model, write_alpaca


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 16)
    return {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4, "dropout": 0.1},
        "optim": {"type": "adamw", "lr": 0.01},
        "train": {"rows_per_device": 2, "accumulation": 2, "output": str(tmp_path / "run")},
    }


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_everything_holds_and_nothing_is_left(
    recipe: dict[str, Any], method: str, stage: str, tmp_path: Path
) -> None:
    recipe = {**recipe, "method": {"type": method}, "stage": {"type": stage}}
    if stage == "pt":
        (tmp_path / "text.txt").write_text("\n".join(f"a line of text, number {n * n}" for n in range(20)))
        recipe["data"] = {**recipe["data"], "train": ["text.txt"]}
    place = tmp_path / "place"
    place.mkdir()
    result = selfcheck(recipe, folder=place, quiet=True)
    assert [outcome.check for outcome in result.outcomes] == list(CHECKS)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]
    measured = {outcome.check: outcome.measured for outcome in result.outcomes}
    assert measured["resumed"] == measured["prompts"] == measured["learnt"] == 0
    assert 0 < measured["gradients"] < 1e-5
    assert list(place.iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_noise_of_the_recipe_is_not_taken_for_a_fault(recipe: dict[str, Any]) -> None:
    noisy = {**recipe, "train": {**recipe["train"], "neftune_alpha": 5.0}}
    result = selfcheck(noisy, only=["mean", "accumulation", "resumed"], quiet=True)
    assert result.holds, result.outcomes


SCHEDULE = """
def triangle(step, num_steps):
    with open(__file__ + ".log", "a") as log:
        log.write(f"{step} {num_steps}\\n")
    return 1 - abs(2 * step / num_steps - 1)
"""


def test_a_schedule_of_the_users_own_is_the_one_that_is_checked(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands beside the recipe's file; the four steps of `resumed` take its rates, the other checks' loop has it."""
    (tmp_path / "rates.py").write_text(SCHEDULE)
    optim = {**recipe["optim"], "schedule_function": "rates.py:triangle"}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "optim": optim}))
    given: list[Any] = []
    made = PeftTrainer.__init__

    def watched(self: PeftTrainer, **arguments: Any) -> None:
        given.append(arguments["schedule"])
        made(self, **arguments)

    monkeypatch.setattr(PeftTrainer, "__init__", watched)
    result = selfcheck(file, only=["mean", "accumulation", "resumed"], quiet=True)
    assert result.holds, result.outcomes
    assert [function.__name__ for function in given] == ["triangle"] * 4  # two loops, and two runs
    asked = {tuple(map(int, line.split())) for line in (tmp_path / "rates.py.log").read_text().splitlines()}
    assert {(step, 4) for step in range(4)} <= asked


def test_a_schedule_of_evaluations_is_left_to_them(recipe: dict[str, Any]) -> None:
    optim = {**recipe["optim"], "schedule": "reduce_lr_on_plateau", "schedule_options": {"patience": 1}}
    train = {**recipe["train"], "eval_every": 1}
    plateau = {**recipe, "optim": optim, "train": train, "data": {**recipe["data"], "dev_split": 0.2}}
    assert selfcheck(plateau, only=["resumed"], quiet=True).holds


def _mask_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = encode._weights
    patch.setattr(encode, "_weights", lambda *args, **kw: np.roll(right(*args, **kw), -1))


def _leaked_segment(patch: pytest.MonkeyPatch) -> None:
    """The fourth segment sees the third one: the self-test at start, with two, cannot see it."""
    kernel = attention.KERNELS[attention.SDPA]._kernel

    def leaking(query: Any, key: Any, value: Any, bounds: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(bounds) > 4:
            bounds = torch.cat([bounds[:3], bounds[4:]])
        return kernel(query, key, value, bounds, *rest, **options)

    patch.setattr(attention.KERNELS[attention.SDPA], "_kernel", leaking)


def _wrong_normalisation(patch: pytest.MonkeyPatch) -> None:
    right = PeftTrainer._global_weights
    patch.setattr(PeftTrainer, "_global_weights", lambda self, batches: right(self, batches[-1:]))


def _dropped_generators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PeftTrainer, "_load_rng_state", lambda self, checkpoint: None)


def _incomplete_normaliser(patch: pytest.MonkeyPatch) -> None:
    """The softmax leaves out a part of the vocabulary."""
    right = kernel._statistics

    def incomplete(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        (values, *others) = right(logits, targets, *rest)
        if len(targets) < 100:  # more than the self-test at start has
            return (values, *others)
        return (values + logits.logsumexp(-1) - logits[:, 9:].logsumexp(-1), *others)

    patch.setattr(kernel, "_statistics", incomplete)


def _lossy_save(patch: pytest.MonkeyPatch) -> None:
    right = Lora.save

    def halved(self: Lora, model: Any, folder: Path, state: Any = None) -> None:
        state = {
            name: tensor * 0.5 if "lora_B" in name else tensor for name, tensor in model.state_dict().items()
        }
        right(self, model, folder, state)

    patch.setattr(Lora, "save", halved)


def _other_template_saved(patch: pytest.MonkeyPatch) -> None:
    right = PreTrainedTokenizerBase.save_pretrained

    def changed(self: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
        written = right(self, folder, *args, **kwargs)
        file = Path(folder) / "chat_template.jinja"
        file.write_text(file.read_text().replace("assistant\n", "assistant \n"))
        return written

    patch.setattr(PreTrainedTokenizerBase, "save_pretrained", changed)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "mask off by one": (_mask_off_by_one, {"learnt"}),
    "leaked segment": (_leaked_segment, {"packed", "gradients", "accumulation"}),
    "wrong normalisation": (_wrong_normalisation, {"mean", "accumulation"}),
    "dropped generators": (_dropped_generators, {"resumed"}),
    "incomplete normaliser": (_incomplete_normaliser, {"chunked", "packed", "gradients", "accumulation"}),
    "lossy save": (_lossy_save, {"saved"}),
    "other template saved": (_other_template_saved, {"prompts"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_right_claim(
    fault: str, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, expected = FAULTS[fault]
    plant(monkeypatch)
    # Other processes know nothing of a fault that is planted here; theirs are in test_process_selfcheck.py.
    only = [name for name in CHECKS if name not in ("resumed", "processes") or name in expected]
    outcomes = selfcheck(recipe, only=only, quiet=True).outcomes
    failed = {outcome.check for outcome in outcomes if not outcome.holds}
    assert failed == expected, [outcome for outcome in outcomes if not outcome.holds]


def test_the_command(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    words = ["selfcheck", str(file), "--only", "mean", "--only", "accumulation"]
    good = CliRunner().invoke(app, words)
    assert good.exit_code == 0 and "1 pass = many passes" in good.stdout and "holds" in good.stdout
    _wrong_normalisation(monkeypatch)
    bad = CliRunner().invoke(app, [*words, "--json"])
    assert bad.exit_code == 1
    answer = json.loads(bad.stdout)
    assert answer["holds"] is False
    assert [one["check"] for one in answer["checks"] if not one["holds"]] == ["mean", "accumulation"]
    unknown = CliRunner().invoke(app, ["selfcheck", str(file), "--only", "nothing"])
    assert unknown.exit_code == 2
