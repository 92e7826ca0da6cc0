"""`luthier check`: what it says is what `train` then does, and what it refuses is what `train` refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from tests.tiny import chat_model, write_alpaca


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose segments cannot be isolated."""
    from transformers import BloomConfig, BloomForCausalLM

    from tests.tiny import chat_tokenizer

    folder = tmp_path_factory.mktemp("bloom")
    tokenizer = chat_tokenizer()
    BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    write_alpaca(tmp_path / "rows.json", 24)
    write_alpaca(tmp_path / "other.json", 6)
    return {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 4},
        "train": {"rows_per_device": 4, "epochs": 2, "output": str(tmp_path / "run"), "plots": False},
    }


def changed(recipe: dict[str, Any], **sections: Any) -> dict[str, Any]:
    tree = {name: dict(value) for name, value in recipe.items()}
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return tree


def written(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def checked(file: Path, *words: str, status: int = 0) -> dict[str, Any]:
    result = run("check", file, "--json", *words)
    assert result.exit_code == status, result.stderr
    tree = json.loads(result.stdout)
    assert isinstance(tree, dict)
    return tree


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts}


# --------------------------------------------------------------------------------------------------
# What is said


def test_what_it_says_is_what_training_does(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, changed(recipe, data={"eval": ["other.json"]}))
    before = files(tmp_path)
    said = checked(file)
    assert files(tmp_path) == before, "check writes nothing but the caches"
    result = luthier.train(file, quiet=True)
    manifest = json.loads((result.output / "run.json").read_text(encoding="utf-8"))
    log = (result.output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert said["ok"] is True
    assert said["problems"] == []
    assert said["parameters"]["all"] == manifest["parameters"]
    keys = manifest["reports"][0].keys()
    assert [{key: one[key] for key in keys} for one in said["datasets"]] == manifest["reports"]
    assert [one["part"] for one in said["datasets"]] == ["training", "evaluation"]
    assert sum(said["datasets"][0]["histogram"]["counts"]) == said["datasets"][0]["samples"] == 24
    assert said["schedule"]["steps"] == json.loads(log[-1])["total_steps"] == 12
    assert said["schedule"]["steps_per_epoch"] == 6
    assert said["schedule"]["tokens_per_epoch"] == said["datasets"][0]["tokens"]
    assert said["schedule"]["tokens_per_epoch"] * 2 == result.metrics["train_tokens"]
    assert said["schedule"]["padding_share"] == 0
    assert said["memory"]["parts"]["gradients" if "gradients" in said["memory"]["parts"] else "weights"] > 0
    assert said["memory"]["total"] == sum(said["memory"]["parts"].values())
    assert said["memory"]["fits"] is True
    assert said["probe"]["seconds_per_epoch"] > 0
    assert said["probe"]["seconds"] == pytest.approx(2 * said["probe"]["seconds_per_epoch"])


def test_weights_and_optimizer_are_exact(recipe: dict[str, Any], tmp_path: Path) -> None:
    said = checked(written(tmp_path, recipe), "--no-probe", "train.save_every=null")
    assert said["probe"] is None
    counts, parts = said["parameters"]["all"], said["memory"]["parts"]
    # AdamW keeps two moments, and a count for each of the two adapter matrices of 2 x 7 layers.
    assert parts["optimizer"] == 8 * counts["trainable"] + 4 * 2 * 14
    assert parts["weights"] - 4 * counts["total"] == 2 * 4 * 4  # rotary's frequencies, in two buffers
    assert "checkpoint" not in parts
    saving = checked(written(tmp_path, recipe), "--no-probe")["memory"]["parts"]
    assert saving["checkpoint"] == parts["optimizer"] + 4 * counts["trainable"]


def test_samples_are_the_tokens_that_are_trained(recipe: dict[str, Any], tmp_path: Path) -> None:
    said = checked(written(tmp_path, recipe), "--no-probe", "--samples", "2")
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [sample["row"] for sample in said["samples"]] == [0, 12]
    for sample in said["samples"]:
        row = rows[sample["row"]]
        text = "".join(token["text"] for token in sample["tokens"])
        assert text == (
            f"<|im_start|>user↵{row['instruction']}<|im_end|>↵<|im_start|>assistant↵{row['output']}<|im_end|>↵"
        )
        learnt = "".join(token["text"] for token in sample["tokens"] if token["learnt"])
        assert learnt == row["output"] + "<|im_end|>"
    assert checked(written(tmp_path, recipe), "--no-probe", "--samples", "0")["samples"] == []


def test_origins_are_terse_or_whole(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, recipe)
    terse = {one["key"]: one for one in checked(file, "--no-probe", "optim.lr=0.01")["recipe"]}
    assert terse["optim.lr"] == {"key": "optim.lr", "value": 0.01, "origin": "command line"}
    line = 1 + file.read_text(encoding="utf-8").splitlines().index("  rank: 4")
    assert terse["method.rank"] == {"key": "method.rank", "value": 4, "origin": f"recipe.yaml:{line}"}
    assert terse["train.precision"]["origin"] == "hardware"
    assert "train.seed" not in terse
    whole = {one["key"]: one for one in checked(file, "--no-probe", "--all")["recipe"]}
    assert whole["train.seed"] == {"key": "train.seed", "value": 42, "origin": "default"}
    assert whole.keys() > terse.keys() - {"optim.lr"}


def test_a_llamafactory_file_is_checked_as_it_is(model: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "rows.json"}}', encoding="utf-8")
    flat = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "mine", "dataset_dir": str(tmp_path), "template": "qwen", "cutoff_len": 256, "lora_rank": 4,
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2,
    }  # fmt: skip
    file = tmp_path / "flat.yaml"
    file.write_text(yaml.safe_dump(flat, sort_keys=False), encoding="utf-8")
    said = checked(file, "--no-probe", f"data.cache={tmp_path / 'cache'}")
    origins = {one["key"]: one["origin"] for one in said["recipe"]}
    assert origins["method.rank"] == "translated from lora_rank (line 9)"
    assert said["schedule"]["steps_per_epoch"] == 12


def test_the_text_says_all_parts(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = run("check", written(tmp_path, recipe))
    assert result.exit_code == 0
    titles = [
        line for line in result.stdout.splitlines() if line and not line.startswith((" ", "|", "<", "rows"))
    ]
    for title in ("recipe", "data", "samples", "parameters", "steps", "memory, estimated", "time, measured"):
        assert title in titles
    assert titles[-1] == "nothing that train would refuse was found"
    assert "\x1b" not in result.stdout


# --------------------------------------------------------------------------------------------------
# What is refused


def break_rows(folder: Path) -> None:
    (folder / "rows.json").write_text('[{"instruction": "a", "output": ""}]', encoding="utf-8")


def lose_rows(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    rows[3]["output"] = ""
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def occupy(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text("x", encoding="utf-8")


def strange(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("x", encoding="utf-8")


REFUSALS: dict[str, tuple[str, Any, list[str]]] = {
    "an unknown key": ("recipe", None, ["train.epoch=2"]),
    "rows are lost": ("data", lose_rows, []),
    "nothing to train on": ("data", break_rows, []),
    "no such data": ("data", None, ["data.train=[nothing.json]"]),
    "a run in the way": ("output", occupy, []),
    "overwrite and resume": ("output", occupy, ["train.overwrite=true", "train.resume=auto"]),
    "other files in the way": ("output", strange, []),
    "other files are not overwritten": ("output", strange, ["train.overwrite=true"]),
    "a checkpoint that is not there": ("output", None, ["train.resume=elsewhere/checkpoint-3"]),
    "an argument that does not exist": ("settings", None, ["train.extra={lerning_rate: 1}"]),
    "a tracker that does not exist": ("settings", None, ["train.report_to=[nowhere]"]),
    "a callback that does not exist": ("settings", None, ["train.callbacks=['nowhere:Thing']"]),
    "no such model": ("model", None, ["model.path=./nothing"]),
    "no such target": ("model", None, ["method.targets=[nothing]"]),
    "a kernel for another device": ("model", None, ["model.attention=varlen"]),
    "no such template": ("data", None, ["data.template=nothing"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_it_refuses_what_training_refuses(case: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    part, prepare, words = REFUSALS[case]
    if prepare is not None:
        prepare(tmp_path)
    file = written(tmp_path, recipe)
    before = files(tmp_path)
    said = checked(file, "--no-probe", *words, status=2)
    assert said["ok"] is False
    (problem,) = said["problems"]
    assert problem["part"] == part
    assert files(tmp_path) == before
    refused = run("train", file, *words)
    assert refused.exit_code == 2
    assert refused.stderr.removeprefix("error:").strip() == problem["message"]


def test_several_processes_are_refused(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = checked(written(tmp_path, recipe), "--no-probe", status=2)
    assert [problem["part"] for problem in said["problems"]] == ["processes"]
    assert "2 were started" in said["problems"][0]["message"]


def test_a_model_that_leaks_is_refused_for_flat_rows(
    bloom: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = written(tmp_path, changed(recipe, model={"path": str(bloom), "rows": "flat"}))
    said = checked(file, "--no-probe", status=2)
    (problem,) = said["problems"]
    assert (problem["part"], problem["kind"]) == ("model", "ModelError")
    assert run("train", file).stderr.removeprefix("error:").strip() == problem["message"]


def test_padded_rows_are_named_with_their_share(bloom: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = checked(written(tmp_path, changed(recipe, model={"path": str(bloom)})))
    assert 0 < said["schedule"]["padding_share"] < 0.5
    assert any(note.startswith("rows are padded on the right") for note in said["notes"])
    assert said["schedule"]["longest_pass"] > said["schedule"]["most_tokens"] * 0.9


def test_all_problems_are_found_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    lose_rows(tmp_path)
    occupy(tmp_path)
    (tmp_path / "broken.json").write_text("[{", encoding="utf-8")
    file = written(tmp_path, changed(recipe, data={"train": ["rows.json", "broken.json", "nothing.json"]}))
    words = ["train.extra={lerning_rate: 1}", "method.targets=[nothing]", "train.report_to=[nowhere]"]
    said = checked(file, "--no-probe", *words, status=2)
    found = [problem["part"] for problem in said["problems"]]
    assert sorted(found) == ["data", "data", "data", "model", "output", "settings", "settings"]
    messages = "\n".join(problem["message"] for problem in said["problems"])
    for word in (
        "lerning_rate",
        "nowhere",
        "broken.json",
        "nothing.json",
        "1 of 24 rows lost",
        "method.targets",
    ):
        assert word in messages
    assert [one["dataset"] for one in said["datasets"]] == ["rows"]
    shown = run("check", file, "--no-probe", *words)
    assert shown.exit_code == 2
    assert "train would refuse this recipe (7)" in shown.stdout


def test_a_run_is_not_removed_by_asking(recipe: dict[str, Any], tmp_path: Path) -> None:
    occupy(tmp_path)
    checked(written(tmp_path, recipe), "--no-probe", "train.overwrite=true")
    assert (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8") == "x"


def test_a_resumed_run_must_be_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, recipe)
    luthier.train(file, quiet=True)
    assert checked(file, "--no-probe", "train.resume=auto")["ok"] is True
    said = checked(file, "--no-probe", "train.resume=auto", "optim.lr=0.5", status=2)
    (problem,) = said["problems"]
    assert "optim.lr was" in problem["message"]
    assert run("train", file, "train.resume=auto", "optim.lr=0.5").stderr == f"error: {problem['message']}\n"
    allowed = checked(file, "--no-probe", "train.resume=auto", "optim.lr=0.5", "train.allow_changes=true")
    assert any("optim.lr was" in note for note in allowed["notes"])


def test_a_model_larger_than_the_machine_is_not_loaded(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.check import check
    from luthier.recipe.resolve import Hardware

    monkeypatch.setattr(check, "detect_hardware", lambda: Hardware("cpu", "a watch", 100_000, True, 1))
    found = check.check(written(tmp_path, recipe))
    assert found.parameters == {}
    assert any("the weights alone take" in note and "a watch" in note for note in found.notes)
    monkeypatch.setattr(check, "detect_hardware", lambda: Hardware("cpu", "a phone", 10**6, True, 1))
    found = check.check(written(tmp_path, recipe))
    assert found.memory is not None
    assert not found.memory.fits
    assert found.probe is None
    assert "not probed: the estimated memory does not fit" in found.notes


# --------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """Checks that tags close in order, and collects text and attributes."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(file: Path) -> Page:
    page = Page()
    page.feed(file.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_needs_nothing_else(recipe: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    said = json.loads(run("check", written(tmp_path, recipe), "--json", "--html", target).stdout)
    page = parsed(target)
    text = "".join(page.text)
    source = target.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<script|<link|<img", source)
    assert not {name for name, _ in page.attributes} & {"src", "href"}
    assert page.seen["svg"] == 2, "the memory and one data set"
    assert sum(name == "class" and value == "l" for name, value in page.attributes) == 1 + sum(
        sample["learnt"] for sample in said["samples"]
    )
    for sample in said["samples"]:
        assert "".join(token["text"] for token in sample["tokens"]) in text
    assert f"{said['parameters']['all']['trainable']:,}" in text
    for part in ("Memory", "Data", "Samples", "Parameters", "Steps", "Recipe"):
        assert part in page.text


def test_the_page_escapes_whatever_comes_from_outside(recipe: dict[str, Any], tmp_path: Path) -> None:
    evil = "<script>alert('&quot;')</script>"
    rows = [{"instruction": f"{evil} {n}", "output": f"</span></style>{evil}"} for n in range(9)]
    (tmp_path / "<b>&rows.json").write_text(json.dumps(rows), encoding="utf-8")
    target = tmp_path / "page.html"
    file = written(tmp_path, changed(recipe, data={"train": ["<b>&rows.json"]}))
    result = run("check", file, "--no-probe", "--html", target, "train.extra={<i>: 1}")
    assert result.exit_code == 2
    page = parsed(target)
    assert "script" not in page.seen
    assert "i" not in page.seen or page.seen["i"] == len(
        [1 for _, value in page.attributes if value and "swatch" in value]
    )
    text = "".join(page.text)
    assert evil in text
    assert "train.extra.<i>" in text
    assert "<b>&rows" in text


def test_a_page_of_refusals_alone(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    file = tmp_path / "bad.yaml"
    file.write_text("model: {pat: x}\ndata: {train: [a]}\n", encoding="utf-8")
    assert run("check", file, "--html", target).exit_code == 2
    assert "did you mean" in "".join(parsed(target).text)


def test_a_page_that_cannot_be_written_is_said_before_the_work(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    result = run("check", written(tmp_path, recipe), "--html", tmp_path / "none" / "page.html")
    assert result.exit_code == 2
    assert "--html" in result.stderr
    assert result.stdout == ""
