"""`check`, `selfcheck`, `prepare`, `plot`, `sweep` and the model card of recipes that compare answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.data import collate
from luthier.selfcheck.verb import CHECKS, selfcheck
from luthier.stages import pair_losses
from luthier.types import Batch
from tests.tiny import FEEDBACK_COLUMNS, PAIR_COLUMNS, chat_model, write_feedback, write_pairs

STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"type": "dpo", "beta": 0.5},
    "orpo": {"type": "dpo", "loss": "orpo"},
    "kto": {"type": "kto", "desirable_weight": 2.0},
    "rm": {"type": "rm", "center": 0.01, "margin": 0.2},
}
LORA: dict[str, Any] = {"type": "lora", "rank": 4}
FULL: dict[str, Any] = {"type": "full"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights are large, so that positions and neighbours show in its numbers."""
    return chat_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, of another size."""
    return chat_model(tmp_path_factory.mktemp("other"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are padded."""
    from transformers import BloomConfig, BloomForCausalLM

    from tests.tiny import chat_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("bloom"), chat_tokenizer()
    BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    """Makes the recipe of a stage, with sections changed."""

    def made(name: str, /, **sections: dict[str, Any]) -> dict[str, Any]:
        feedback = name == "kto"
        (write_feedback if feedback else write_pairs)(tmp_path / "rows.json", 16)
        (write_feedback if feedback else write_pairs)(tmp_path / "held_out.json", 6, seed=1)
        columns = FEEDBACK_COLUMNS if feedback else PAIR_COLUMNS
        recipe: dict[str, dict[str, Any]] = {
            "model": {"path": str(model)},
            "data": {
                "train": [{"file_name": "rows.json", **columns}],
                "eval": [{"file_name": "held_out.json", **columns}],
                "directory": str(tmp_path),
                "cache": str(tmp_path / "cache"),
            },
            "stage": STAGES[name],
            "method": LORA,
            "optim": {"type": "adamw", "lr": 0.01},
            "train": {
                "rows_per_device": 2, "accumulation": 2, "max_steps": 4, "log_every": 1,
                "output": str(tmp_path / "run"),
            },
        }  # fmt: skip
        for section, values in sections.items():
            recipe[section] = values if "type" in values else {**recipe[section], **values}
        return recipe

    return made


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def checked(file: Path, *words: str, status: int = 0) -> dict[str, Any]:
    result = run("check", file, "--json", *words)
    assert result.exit_code == status, result.stderr + result.stdout
    tree = json.loads(result.stdout)
    assert isinstance(tree, dict)
    return tree


# --------------------------------------------------------------------------------------------------
# selfcheck


@pytest.mark.parametrize("method", [LORA, FULL], ids=lambda method: str(method["type"]))
@pytest.mark.parametrize("stage", ["dpo", "kto", "rm"])
def test_everything_holds(stage: str, method: dict[str, Any], make: Make, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    recipe = {**make(stage), "method": method}
    result = selfcheck(recipe, folder=place, quiet=True)
    assert [outcome.check for outcome in result.outcomes] == list(CHECKS)
    assert result.holds, [outcome for outcome in result.outcomes if not outcome.holds]
    outcomes = {outcome.check: outcome for outcome in result.outcomes}
    assert outcomes["prompts"].detail == outcomes["learnt"].detail == "16 rows"
    assert outcomes["resumed"].measured == 0 and "tensors" in outcomes["resumed"].detail
    assert 0 < outcomes["gradients"].measured < 1e-5
    assert outcomes["mean"].measured < 1e-5 and " against " in outcomes["mean"].detail
    assert list(place.iterdir()) == []
    if stage == "kto":
        assert outcomes["shared"].detail == "every row has a prompt of its own here"
    else:
        assert 0 < outcomes["shared"].measured < 0.1
        assert " tokens instead of " in outcomes["shared"].detail
    if stage == "rm":
        assert outcomes["chunked"].detail.startswith("a value head")


def test_a_policy_beside_its_own_copy_is_moved_away_from_it(make: Make) -> None:
    """Else every log-ratio would be 0, and a wrong reference could not be seen: the loss would be log 2 anyway."""
    recipe = make("dpo", method=FULL)
    (outcome,) = selfcheck(recipe, only=["mean"], quiet=True).outcomes
    assert outcome.holds
    assert abs(float(outcome.detail.split()[0]) - 0.693147) > 1e-3


def test_what_has_no_formula_here_is_said(make: Make) -> None:
    only = ["mean", "accumulation", "packed"]
    result = selfcheck(make("orpo"), only=only, quiet=True)
    assert result.holds
    outcomes = {outcome.check: outcome for outcome in result.outcomes}
    assert "sigmoid alone" in outcomes["mean"].detail
    assert 0 < outcomes["accumulation"].measured < 1e-5


@pytest.mark.parametrize("loss", ["bco_pair", "aot", "kto_pair"])
def test_a_loss_of_the_whole_step_does_not_depend_on_its_passes(loss: str, make: Make) -> None:
    recipe = make("dpo", stage={"loss": loss})
    (outcome,) = selfcheck(recipe, only=["accumulation"], quiet=True).outcomes
    assert outcome.holds, outcome


def test_a_model_without_shared_prompts_says_why(make: Make, bloom: Path) -> None:
    recipe = make("dpo", model={"path": str(bloom)})
    (outcome,) = selfcheck(recipe, only=["shared"], quiet=True).outcomes
    assert outcome.holds and outcome.detail.startswith("rows are padded")
    (outcome,) = selfcheck(make("dpo", stage={"share_prompts": False}), only=["shared"], quiet=True).outcomes
    assert outcome.holds and "a prompt of its own" in outcome.detail


def _positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    """Branches begin one position after their prompt's end: the self-test at start has batches of its own."""
    right = collate._batch

    def shifted(segments: Any, rows: range, samples: Any) -> Batch:
        moved = [replace(one, start=one.start + (one.parent >= 0)) for one in segments]
        return right(moved, rows, samples)

    patch.setattr(collate, "_batch", shifted)


def _exchanged_parents(patch: pytest.MonkeyPatch) -> None:
    """The branches of a pair continue the prompt of the pair before it."""
    right = collate._batch

    def exchanged(segments: Any, rows: range, samples: Any) -> Batch:
        batch = right(segments, rows, samples)
        shares = batch.parent >= 0
        prompts = int((~shares).sum())
        batch.parent[shares] = (batch.parent[shares] - 1) % prompts
        return batch

    patch.setattr(collate, "_batch", exchanged)


def _rewards_of_the_policy_alone(patch: pytest.MonkeyPatch) -> None:
    """The loss forgets the reference."""
    patch.setattr(pair_losses.Answers, "log_ratio", property(lambda answers: answers.logprobs))


Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[str, Plant, set[str]]] = {
    "positions one too far": ("dpo", _positions_one_too_far, {"shared", "mean"}),
    "exchanged parents": ("dpo", _exchanged_parents, {"shared", "accumulation"}),
    "exchanged parents of a reward model": ("rm", _exchanged_parents, {"shared", "accumulation"}),
    "a forgotten reference": ("dpo", _rewards_of_the_policy_alone, {"mean"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_right_claim(
    fault: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, plant, expected = FAULTS[fault]
    plant(monkeypatch)
    only = [name for name in CHECKS if name != "resumed"]
    outcomes = selfcheck(make(stage), only=only, quiet=True).outcomes
    failed = {outcome.check for outcome in outcomes if not outcome.holds}
    assert failed == expected, [outcome for outcome in outcomes if not outcome.holds]


# --------------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize("stage", STAGES)
def test_what_check_says_is_what_training_does(stage: str, make: Make, tmp_path: Path) -> None:
    file = written(tmp_path, make(stage))
    said = checked(file)
    assert said["ok"] is True
    assert said["probe"]["seconds_per_epoch"] > 0
    result = luthier.train(file, quiet=True)
    manifest = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    assert said["parameters"]["all"] == manifest["parameters"]
    assert sum(said["datasets"][0]["histogram"]["counts"]) == said["datasets"][0]["samples"] == 16
    assert said["datasets"][0]["histogram"]["edges"][-1] > said["datasets"][0]["lengths"]["p100"]
    assert said["schedule"]["steps_per_epoch"] == 4
    assert said["schedule"]["tokens_per_epoch"] == said["datasets"][0]["tokens"]
    if stage != "kto":
        # The prompt once but for its last token, with which each answer begins: one more for each pair.
        assert result.metrics["train_tokens"] == said["datasets"][0]["tokens"] + 16
        assert manifest["rows"]["shares_prompts"] is True
        assert not any("each of its answers" in note for note in said["notes"])
    assert said["parameters"].keys() >= {"embeddings", "attention", "mlp", "adapter"}
    assert ("reference" in said["memory"]["parts"]) is False, "adapters are switched off for it"


def test_a_pair_is_shown_prompt_once(make: Make, tmp_path: Path) -> None:
    file = written(tmp_path, make("dpo"))
    said = checked(file, "--no-probe", "--samples", "2")
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [sample["row"] for sample in said["samples"]] == [0, 8]
    for sample in said["samples"]:
        row = rows[sample["row"]]
        prompt = "".join(token["text"] for token in sample["tokens"])
        assert prompt == f"<|im_start|>user↵{row['instruction']}<|im_end|>↵<|im_start|>assistant↵"
        assert not any(token["learnt"] for token in sample["tokens"])
        assert [answer["name"] for answer in sample["answers"]] == ["chosen", "rejected"]
        for answer in sample["answers"]:
            text = "".join(token["text"] for token in answer["tokens"])
            assert text == row[answer["name"]] + "<|im_end|>"
            assert all(token["learnt"] for token in answer["tokens"])
    longest = max(len(s["tokens"]) + max(len(a["tokens"]) for a in s["answers"]) for s in said["samples"])
    assert longest <= said["datasets"][0]["lengths"]["p100"] < len(said["samples"][0]["tokens"]) + 40
    page = tmp_path / "page.html"
    text = run("check", file, "--no-probe", "--html", page)
    assert text.exit_code == 0
    assert "\n  chosen, " in text.stdout and "\n  rejected, " in text.stdout
    assert page.read_text(encoding="utf-8").count("<h4>rejected ") == 3


def test_feedback_is_shown_by_its_label(make: Make, tmp_path: Path) -> None:
    said = checked(written(tmp_path, make("kto")), "--no-probe", "--samples", "16")
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    shown = {sample["row"]: [answer["name"] for answer in sample["answers"]] for sample in said["samples"]}
    assert shown == {
        place: ["desirable" if row["label"] else "undesirable"] for place, row in enumerate(rows)
    }


def test_the_memory_of_a_reference(make: Make, other_model: Path, tmp_path: Path) -> None:
    words = ["--no-probe", "train.save_every=null"]
    adapters = checked(written(tmp_path, make("dpo")), *words)["memory"]
    assert "reference" not in adapters["parts"]
    other = {"path": str(other_model)}
    file = written(tmp_path, make("dpo", stage={"reference": other}))
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    weights = 4 * (2 * 260 * 32 + 3 * layer + 32 + 2 * 4)  # two buffers of rotary's frequencies
    beside = checked(file, *words)["memory"]
    assert beside["parts"]["reference"] == weights
    file = written(tmp_path, make("dpo", stage={"reference": other | {"precompute": True}}))
    before = checked(file, *words)["memory"]
    assert "reference" not in before["parts"]
    assert before["moments"]["asking the reference"] == sum(
        (before["parts"]["process"], before["parts"]["weights"], weights)
    )
    full = checked(written(tmp_path, make("dpo", method=FULL)), *words)
    assert full["memory"]["parts"]["reference"] == 4 * full["parameters"]["all"]["trainable"]
    orpo = checked(written(tmp_path, make("orpo", method=FULL)), *words)
    assert "reference" not in orpo["memory"]["parts"]


def test_a_reward_model_has_no_logits(make: Make, tmp_path: Path) -> None:
    said = checked(written(tmp_path, make("rm", method=FULL)), "--no-probe")
    assert "logits" not in said["memory"]["parts"]
    assert said["parameters"]["head"] == {"trainable": 32, "total": 32}


def test_a_reference_asked_in_advance_is_not_asked_by_check(make: Make, tmp_path: Path) -> None:
    file = written(tmp_path, make("dpo", stage={"reference": "precompute"}))
    said = checked(file)
    assert any(note.startswith("the probe asks the reference in every pass") for note in said["notes"])
    assert not list((tmp_path / "cache").rglob("*reference*"))
    luthier.train(file, quiet=True)
    assert list((tmp_path / "cache").rglob("*reference*"))


def test_a_reference_that_training_would_refuse(make: Make, tmp_path: Path) -> None:
    odd = chat_model(tmp_path / "odd", vocab_size=300)
    file = written(tmp_path, make("dpo", stage={"reference": {"path": str(odd)}}))
    said = checked(file, "--no-probe", status=2)
    (problem,) = said["problems"]
    refused = run("train", file)
    assert refused.exit_code == 2
    assert refused.stderr.removeprefix("error:").strip() == problem["message"]
    assert "vocabulary" in problem["message"]


def test_prompts_that_are_not_shared_are_named(make: Make, bloom: Path, tmp_path: Path) -> None:
    said = checked(written(tmp_path, make("dpo", model={"path": str(bloom)})))
    assert any("for each of its answers: rows are padded" in note for note in said["notes"])
    assert 0 < said["schedule"]["padding_share"] < 0.5


# --------------------------------------------------------------------------------------------------
# Model card, curves, prepare, sweep


def card_of(output: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (output / "README.md").read_text(encoding="utf-8").split("---", 2)
    return yaml.safe_load(head), body


CARDS = {
    "dpo": (
        ["luthier", "dpo", "lora"],
        "stage `dpo` with loss `sigmoid`, reference `start`",
        "text-generation",
    ),
    "orpo": (["luthier", "dpo", "orpo", "lora"], "stage `dpo` with loss `orpo`,", "text-generation"),
    "kto": (["luthier", "kto", "lora"], "stage `kto` with loss `kto`, reference `start`", "text-generation"),
    "rm": (["luthier", "rm", "reward-model", "lora"], "stage `rm` (one score", "text-classification"),
}


@pytest.mark.parametrize("stage", CARDS)
def test_the_card_and_the_curves_of_a_run(stage: str, make: Make, tmp_path: Path) -> None:
    result = luthier.train(make(stage), quiet=True)
    tags, text, task = CARDS[stage]
    about, body = card_of(result.output)
    assert about["tags"] == tags
    assert about["pipeline_tag"] == task
    assert text in body
    metric = {"kto": "rewards/chosen", "rm": "accuracy"}.get(stage, "rewards/accuracies")
    assert f"| eval_{metric} | {result.metrics[f'eval_{metric}']:.6g} |" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert ("reference" in recipe["stage"]) is (stage in ("dpo", "kto"))
    assert not {"gamma", "discopop_tau", "bco_shift"} & recipe["stage"].keys()
    assert str(tmp_path) not in body
    drawn = {path.name for path in result.output.glob("*.png")}
    file_name = metric.replace("/", "_")
    assert drawn >= {f"training_{file_name}.png", f"training_eval_{file_name}.png", "training_loss.png"}
    picture = tmp_path / "picture.svg"
    shown = run("plot", result.output, "--metric", metric, "--metric", f"eval_{metric}", "--output", picture)
    assert shown.exit_code == 0, shown.stderr
    assert picture.is_file()


def test_a_card_of_several_losses_and_another_reference(
    make: Make, other_model: Path, tmp_path: Path
) -> None:
    stage = {"loss": {"sigmoid": 0.8, "bco_pair": 0.2}, "reference": {"path": str(other_model)}}
    result = luthier.train(make("dpo", stage=stage, train={"plots": False}), quiet=True)
    about, body = card_of(result.output)
    assert about["tags"] == ["luthier", "dpo", "bco_pair", "lora"]
    assert f"with loss 0.8 `sigmoid` + 0.2 `bco_pair`, reference `{other_model.name}`" in body
    assert str(other_model) not in body


def test_runs_with_rewards_are_compared_by_them(make: Make, tmp_path: Path) -> None:
    from luthier.trainer.compare_plots import draw_runs, load_runs, plot_runs

    outputs = [
        luthier.train(
            make("dpo", train={"plots": False}), [f"train.output={tmp_path / name}"], quiet=True
        ).output
        for name in ("a", "b")
    ]
    picture = tmp_path / "both.svg"
    assert plot_runs(outputs, output=picture) == [picture]
    text = picture.read_text(encoding="utf-8")
    for title in ("Training loss", "Evaluation rewards/accuracies", "Training rewards/margins"):
        assert f"<!-- {title} -->" in text
    figure = draw_runs(load_runs(outputs), ["rewards/margins"], "steps")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Training rewards/margins"]


def test_a_line_of_training_shows_the_accuracy(make: Make, tmp_path: Path) -> None:
    result = run("train", written(tmp_path, make("dpo", train={"plots": False})))
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ") and "| loss " in line]
    assert len(lines) == 4
    assert all("| accuracy " in line and "| margin " in line for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_prepare_makes_the_tokens_that_training_uses(stage: str, make: Make, tmp_path: Path) -> None:
    file = written(tmp_path, make(stage))
    said = run("prepare", file)
    assert said.exit_code == 0, said.stderr
    assert "answers in ⟦ ⟧" in said.stdout
    assert ("desirable, " if stage == "kto" else "\nrejected, ") in said.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    assert before
    luthier.train(file, ["train.plots=false"], quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")} == before


@pytest.mark.slow
def test_a_sweep_by_the_accuracy_of_rewards(make: Make, tmp_path: Path) -> None:
    written(tmp_path, make("dpo", train={"plots": False, "eval_every": 2}))
    sweep = {
        "recipe": "recipe.yaml",
        "output": str(tmp_path / "sweep"),
        "metric": "eval_rewards/margins",
        "search": {"type": "grid"},
        "space": {"stage.beta": [0.1, 0.5]},
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    said = run("sweep", file)
    assert said.exit_code == 0, said.stderr + said.stdout
    assert "eval_rewards/margins" in said.stdout
    results = [
        json.loads(path.read_text(encoding="utf-8"))["eval_rewards/margins"]
        for path in sorted((tmp_path / "sweep").rglob("all_results.json"))
    ]
    assert len(results) == 2
    assert f"{max(results):.6g}" in said.stdout
