"""`check`, `prepare`, `plot`, `sweep` and the model card of recipes that compare answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from tests.compared import FULL, STAGES
from tests.tiny import chat_model

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, of another size."""
    return chat_model(tmp_path_factory.mktemp("other"), num_hidden_layers=3)


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
    weights = 4 * (2 * 259 * 32 + 3 * layer + 32 + 2 * 4)  # two buffers of rotary's frequencies
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
