"""`luthier predict`: rows of a data set in, answers line by line out, and what they are worth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import luthier
from luthier.answering import open_model
from luthier.cli import app
from luthier.measures.text import CORPUS_METRICS, ROW_METRICS, ComputeMetrics
from luthier.predicting.questions import Question, Source, Unusable, read_questions
from luthier.predicting.record import LINES_NAME, RESULTS_NAME
from luthier.recipe.load import load_recipe
from luthier.run import train
from luthier.types import CheckpointError, DataError, ModelError, RecipeError
from tests.tiny import chat_model, chat_tokenizer, write_alpaca, write_pairs

NAMES = (*ROW_METRICS, *CORPUS_METRICS)
WORDS = ("red", "blue", "green", "black", "white", "brown")
MAX = "generation.max_new_tokens=6"


def write_words(file: Path, words: tuple[str, ...] = WORDS) -> None:
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in words]
    file.write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt half of its held-out rows, with its data and its base."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("predict")
    chat_model(folder / "model")
    write_words(folder / "rows.json", WORDS[:3] * 4)
    write_words(folder / "held.json")
    (folder / "dataset_info.json").write_text(
        json.dumps({"learnt": {"file_name": "rows.json"}, "held": {"file_name": "held.json"}}),
        encoding="utf-8",
    )
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": ["learnt"],
            "eval": ["held"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
        },
        "method": {"type": "full"},
        "optim": {"type": "adamw", "lr": 0.01, "schedule": "constant"},
        "generation": {"max_new_tokens": 8},
        "train": {
            "rows_per_device": 12,
            "max_steps": 40,
            "save_every": None,
            "plots": False,
            "output": str(folder / "run"),
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree), encoding="utf-8")
    train(tree, quiet=True)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return folder / "run"


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / LINES_NAME).read_text(encoding="utf-8").splitlines()]


def test_a_run_directory_is_enough(run: Path) -> None:
    result = luthier.predict(run, quiet=True)
    assert result.output == run / "predictions"
    written = lines(result.output)
    assert [line["label"] for line in written] == list(WORDS)
    assert [line["index"] for line in written] == list(range(6))
    assert written[0]["prompt"] == "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n"
    assert [line["predict"] for line in written[:3]] == list(WORDS[:3])
    assert {line["finish"] for line in written} <= {"stop", "length"} and written[0]["finish"] == "stop"
    assert written[0]["tokens"] == len("red")
    results = json.loads((result.output / RESULTS_NAME).read_text(encoding="utf-8"))
    assert results["rows"] == 6
    assert results["predict_exact_match"] == pytest.approx(
        100 * sum(line["predict"] == line["label"] for line in written) / 6, abs=1e-4
    )
    assert 40 < results["predict_exact_match"] < 100
    expected = ComputeMetrics()([line["predict"] for line in written], [line["label"] for line in written])
    for name in NAMES:
        assert results[f"predict_{name}"] == pytest.approx(expected[name], abs=1e-4)
        low, high = results["intervals"][name]
        assert (
            0 <= low <= results[f"predict_{name}"] + 1e-3
            and results[f"predict_{name}"] - 1e-3 <= high <= 100.0001
        )
    assert results["predict_tokens_per_second"] > 0
    assert all(one.predict == one.label for one in result.best) and not any(
        one.predict == one.label for one in result.worst
    )


def test_answers_are_those_of_transformers(run: Path) -> None:
    """One by one, greedily, from the ids of the tokenizer's own chat template."""
    tokenizer, model = chat_tokenizer(), AutoModelForCausalLM.from_pretrained(run).eval()
    for line in lines(luthier.predict(run, quiet=True).output):
        messages = [{"role": "user", "content": f"Say {line['label']}."}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
        assert line["predict"] == tokenizer.decode(
            ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
        )


def test_the_command_line_says_the_same(folder: Path, run: Path, tmp_path: Path) -> None:
    words = ["predict", str(run), "--data", "held", "--output", str(tmp_path / "out"), "--json", MAX]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["output"] == str(tmp_path / "out") and told["rows"] == 6
    done = CliRunner().invoke(app, [word for word in words if word != "--json"])
    assert done.exit_code == 0, done.output
    for text in ("worst", "best", "rouge-l", "95 % interval", "6 rows (", "tokens/s"):
        assert text in done.stdout


@pytest.mark.parametrize("named", ["learnt", "rows.json", "a file"])
def test_data_is_a_name_or_a_file(folder: Path, run: Path, tmp_path: Path, named: str) -> None:
    other = tmp_path / "asked.jsonl"
    other.write_text(
        '{"question": "Say red.", "answer": "red"}\n{"question": "Say blue.", "answer": "blue"}\n'
    )
    name = str(other) if named == "a file" else named
    result = luthier.predict(run, [MAX], data=[name], output=tmp_path / "out", max_samples=2, quiet=True)
    assert [one.label for one in result.predictions] == ["red", "blue"]
    assert {one.dataset for one in result.predictions} == {
        "asked" if named == "a file" else named.removesuffix(".json")
    }


def test_several_data_sets_are_measured_together_and_alone(run: Path, tmp_path: Path) -> None:
    result = luthier.predict(
        run, [MAX], data=["learnt", "held"], output=tmp_path / "out", max_samples=6, quiet=True
    )
    assert [one.row for one in result.predictions] == [*range(6)] * 2
    assert [one.index for one in result.predictions] == [*range(12)]
    each = result.metrics["datasets"]
    assert each["learnt"]["predict_exact_match"] == 100
    mean = (100 + each["held"]["predict_exact_match"]) / 2
    assert result.metrics["predict_exact_match"] == pytest.approx(mean, abs=1e-3)


KILLED = """
import os, signal, sys
import luthier
from luthier.predicting.record import PredictionRecord

add, wanted = PredictionRecord.add, int(sys.argv[4])

def dies(record, prediction):
    if len(record.done) == wanted:
        record._stream.write(prediction.line()[:25])  # half a line, as a full buffer would leave it
        record._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    add(record, prediction)

PredictionRecord.add = dies
luthier.predict(sys.argv[1], sys.argv[5:], data=[sys.argv[2]], output=sys.argv[3], quiet=True)
"""


def test_a_killed_process_loses_only_what_was_under_way(folder: Path, run: Path, tmp_path: Path) -> None:
    """Two kills, each with a torn line; then the end is the same as without, drawn tokens included."""
    write_alpaca(tmp_path / "counts.json", 20)
    drawn = [MAX, "generation.temperature=4.0", "generation.rows=3"]
    data, output = str(tmp_path / "counts.json"), tmp_path / "out"
    for done in (5, 11):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(run), data, str(output), str(done), *drawn],
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        content = (output / LINES_NAME).read_bytes()
        assert content.count(b"\n") == done and not content.endswith(b"\n")
    before = {line["index"]: line for line in map(json.loads, content.splitlines()[:-1])}
    resumed = luthier.predict(run, drawn, data=[data], output=output, quiet=True)
    assert resumed.metrics["predicted_before"] == 11
    whole = luthier.predict(run, drawn, data=[data], output=tmp_path / "whole", quiet=True)
    assert lines(output) == lines(tmp_path / "whole")
    assert all(lines(output)[index] == line for index, line in before.items())
    assert len({one.predict for one in whole.predictions}) > 10, "every row draws its own tokens"
    named = set(NAMES) | {"rows", "intervals"}
    assert all(resumed.metrics.get(name) == whole.metrics.get(name) for name in named)


def test_a_finished_prediction_answers_nothing_again(run: Path, tmp_path: Path) -> None:
    first = luthier.predict(run, quiet=True, output=tmp_path)
    when = (tmp_path / LINES_NAME).read_bytes()
    again = luthier.predict(run, quiet=True, output=tmp_path)
    assert again.metrics["predicted_before"] == 6 and again.metrics["predict_tokens_per_second"] == 0
    assert (tmp_path / LINES_NAME).read_bytes() == when
    assert again.metrics["intervals"] == first.metrics["intervals"]


def test_another_prediction_is_refused_instead_of_mixed(folder: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    luthier.predict(run, [MAX], output=out, quiet=True)
    before = (out / LINES_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=r"generation\.temperature was 0\.0 and is 0\.5"):
        luthier.predict(run, [MAX, "generation.temperature=0.5"], output=out, quiet=True)
    with pytest.raises(CheckpointError, match="holds another prediction: data"):
        luthier.predict(run, [MAX], data=["learnt"], output=out, quiet=True)
    with pytest.raises(CheckpointError, match=r"model\.base"):
        luthier.predict(folder / "model", [MAX], data=[str(folder / "held.json")], output=out, quiet=True)
    assert (out / LINES_NAME).read_bytes() == before
    other = luthier.predict(
        run, [MAX], data=["learnt"], output=out, overwrite=True, max_samples=2, quiet=True
    )
    assert len(lines(out)) == 2 == len(other.predictions)


def test_the_difference_to_the_base_has_its_interval(folder: Path, run: Path, tmp_path: Path) -> None:
    file = str(folder / "held.json")
    base = luthier.predict(folder / "model", [MAX], data=[file], output=tmp_path / "base", quiet=True)
    tuned = luthier.predict(
        run, [MAX], data=[file], output=tmp_path / "tuned", compare=tmp_path / "base", quiet=True
    )
    compared = tuned.metrics["compare"]
    for name in NAMES:
        gain = tuned.metrics[f"predict_{name}"] - base.metrics[f"predict_{name}"]
        assert compared["differences"][name] == pytest.approx(gain, abs=2e-4)
        low, high = compared["intervals"][name]
        assert low - 1e-4 <= gain <= high + 1e-4
    assert compared["differences"]["exact_match"] > 0
    itself = luthier.predict(
        run, [MAX], data=[file], output=tmp_path / "tuned", compare=tmp_path / "tuned", quiet=True
    )
    assert all(bounds == [0, 0] for bounds in itself.metrics["compare"]["intervals"].values())


def test_a_comparison_with_other_rows_is_refused_before_anything_is_answered(
    run: Path, tmp_path: Path
) -> None:
    luthier.predict(run, [MAX], data=["learnt"], output=tmp_path / "other", max_samples=6, quiet=True)
    with pytest.raises(DataError, match="row 3 has another prompt there"):
        luthier.predict(run, [MAX], output=tmp_path / "out", compare=tmp_path / "other", quiet=True)
    assert not (tmp_path / "out").exists()


def test_held_out_rows_are_those_of_the_evaluation(folder: Path, tmp_path: Path) -> None:
    write_alpaca(tmp_path / "counts.json", 20)
    tree = json.loads((folder / "recipe.yaml").read_text(encoding="utf-8"))
    tree["data"] |= {
        "train": [str(tmp_path / "counts.json")],
        "eval": [],
        "dev_split": 0.3,
        "max_samples": 15,
    }
    tree["train"] |= {"max_steps": 1, "output": str(tmp_path / "run"), "generate_at_eval": {}}
    metrics = train(tree, quiet=True).metrics
    result = luthier.predict(tmp_path / "run", quiet=True)
    assert len(result.predictions) == 5 and {one.dataset for one in result.predictions} == {"dev"}
    for name in NAMES:
        assert result.metrics[f"predict_{name}"] == pytest.approx(metrics[f"eval_{name}"], abs=1e-4)


def test_rows_that_cannot_be_answered_are_counted_and_named(run: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}]},
        {"messages": [{"role": "user", "content": "Nobody answers."}]},
        {"messages": [{"role": "user", "content": "long " * 80}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "Say blue."}, {"role": "assistant", "content": "blue"}]},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = luthier.predict(run, [MAX], data=[file], output=tmp_path / "out", quiet=True)
    assert [(one.index, one.label) for one in result.predictions] == [(0, "red"), (3, "blue")]
    assert "<|im_start|>assistant\nb<|im_end|>" in result.predictions[1].prompt
    left = result.metrics["not_answered"]
    assert [one["row"] for one in left] == [1, 2]
    assert "no answer to compare with" in left[0]["reason"] and "context of 256" in left[1]["reason"]


def test_of_pairs_the_better_answer_is_the_label(run: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.json", 4)
    result = luthier.predict(run, [MAX], data=[tmp_path / "pairs.json"], output=tmp_path / "out", quiet=True)
    pairs = json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))
    assert [one.label for one in result.predictions] == [pair["chosen"] for pair in pairs]


def test_a_recipe_that_only_predicts(folder: Path, tmp_path: Path) -> None:
    tree = {
        "model": {"path": str(folder / "run")},
        "data": {"eval": ["held"], "directory": str(folder)},
        "generation": {"max_new_tokens": 4},
        "train": {"output": str(tmp_path / "out")},
    }
    file = tmp_path / "predict.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    result = luthier.predict(file, ["generation.max_new_tokens=8"], quiet=True, output=tmp_path / "there")
    assert result.metrics["predict_exact_match"] > 40
    assert result.metrics["predict_exact_match"] == luthier.predict(load_recipe(file, ["generation.max_new_tokens=8"], to_export=True).recipe, output=tmp_path / "value", quiet=True).metrics["predict_exact_match"]  # fmt: skip
    with pytest.raises(RecipeError, match="only predicts; run `luthier predict`"):
        luthier.train(file, quiet=True)


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        (["model.dtype=float16"], {}, RecipeError, "predict takes settings of generation and data"),
        (["generation.temprature=1"], {}, RecipeError, "did you mean generation.temperature"),
        ([], {"data": ["nothing"]}, DataError, "neither in .* nor a file"),
        ([], {"data": ["held", "held"]}, DataError, "two data sets are called 'held'"),
        ([], {"compare": "nowhere"}, DataError, "nowhere: no predictions there"),
        ([], {"max_samples": 0}, RecipeError, "max_samples=0 should be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_written(
    run: Path, tmp_path: Path, words: list[str], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        luthier.predict(run, words, output=tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_data_or_folder_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(DataError, match="no data to answer"):
        luthier.predict(folder / "model", quiet=True)
    with pytest.raises(ModelError, match="no such"):
        luthier.predict(folder / "nothing", data=[folder / "held.json"], quiet=True)


def test_the_prompt_is_everything_before_the_last_answer(run: Path, tmp_path: Path) -> None:
    """Its ids are those that training has, up to the answer."""
    from luthier.data.described import describe

    answerer = open_model(run)
    asked = read_questions([describe(run.parent / "held.json")], Source(0))
    assert not [one for one in asked if isinstance(one, Unusable)]
    for one in asked:
        assert isinstance(one, Question)
        encoded = answerer.template.encode(one.conversation)
        assert list(answerer.request(one.prompt).prompt) == encoded.input_ids[: encoded.answers[-1].start]


def test_missing_libraries_are_named_with_their_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name, *rest: None if name == "jieba" else found(name, *rest)
    )
    with pytest.raises(RecipeError, match=r"luthier predict needs jieba, .*pip install 'luthier\[metrics\]'"):
        luthier.predict(run, output=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    tokenizer = chat_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **shape)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_words(tmp_path / "rows.json")
    with pytest.raises(ModelError, match="is a reward model, which scores answers: luthier score"):
        luthier.predict(tmp_path / "model", data=[tmp_path / "rows.json"], quiet=True)


def test_scores_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    """One broken token: rows that meet it end there with `error`, and the results say how many."""
    chat_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    write_words(tmp_path / "rows.json")
    result = luthier.predict(tmp_path / "model", [MAX], data=[tmp_path / "rows.json"], quiet=True)
    assert result.metrics["finish"] == {"error": 6}
    assert result.metrics["bad_scores"] == 6
    assert [(one.predict, one.finish, one.bad_scores) for one in result.predictions] == [("", "error", 1)] * 6


def test_the_memory_ceiling_changes_how_many_and_not_what(folder: Path, run: Path, tmp_path: Path) -> None:
    """Keys and values for one row at a time; two limits, the same answers."""
    from luthier.engine.key_values import bytes_per_token

    model = open_model(run).engine.model
    one_row = 64 * bytes_per_token(model.config, torch.float32) / 2**30  # type: ignore[arg-type]
    narrow = luthier.predict(
        run, [MAX, f"generation.memory_gib={one_row}"], output=tmp_path / "narrow", quiet=True
    )
    wide = luthier.predict(run, [MAX], output=tmp_path / "wide", quiet=True)
    assert [one.predict for one in narrow.predictions] == [one.predict for one in wide.predictions]


@pytest.mark.slow
def test_the_example_answers_with_the_real_model(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    recipe = root / "examples" / "predict" / "orders.yaml"
    words = ["generation.max_new_tokens=8"]
    base = luthier.predict(recipe, words, max_samples=2, output=tmp_path / "base", quiet=True)
    assert [one.prompt.count("<|im_start|>") for one in base.predictions] == [3, 3]  # with the system's own
    assert all(one.predict and one.label.startswith("item=") for one in base.predictions)
