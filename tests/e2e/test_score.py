"""`luthier score`: the numbers of a run's evaluation, row by row, from its folder and a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from luthier.cli import app
from luthier.methods import build_method
from luthier.recipe.schema import LoraSpec
from luthier.run import train
from luthier.score import score_file, score_text
from luthier.types import DataError, ModelError
from tests.reward import HELD_OUT, PAIRS, plain_scores, reward_recipe
from tests.tiny import chat_model, chat_tokenizer, tiny_model

METHODS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "rank": 4}}
Finished = tuple[Path, dict[str, float]]


@pytest.fixture(scope="module", params=METHODS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    return folder, train(reward_recipe(folder, METHODS[request.param], save_every=3), quiet=True).metrics


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that no run of Luthier wrote: weights, config and tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_runs_scores_are_those_of_its_evaluation(finished: Finished, tmp_path: Path) -> None:
    folder, metrics = finished
    done = CliRunner().invoke(app, ["score", str(folder / "run"), str(folder / "pairs.json")])
    assert done.exit_code == 0, done.output
    found = lines(done.stdout)
    assert [row["index"] for row in found] == list(range(PAIRS))
    held_out = np.random.default_rng(42).permutation(PAIRS)[:HELD_OUT]
    for name in ("chosen", "rejected"):
        mean = np.mean([found[i][f"score_{name}"] for i in held_out])
        assert mean == pytest.approx(metrics[f"eval_rewards/{name}"], abs=1e-5)
    right = np.mean([found[i]["score_chosen"] > found[i]["score_rejected"] for i in held_out])
    assert right == pytest.approx(metrics["eval_accuracy"])
    summary = json.loads(done.stderr)
    assert summary["rows"] == PAIRS and summary["not_scored"] == 0
    every = [row["score_chosen"] > row["score_rejected"] for row in found]
    assert summary["accuracy"] == pytest.approx(np.mean(every))
    # A checkpoint of the run is a reward model too, and says something else than the run's end.
    early = score_file(folder / "run" / "checkpoint-3", folder / "pairs.json")
    assert early.rows[0].scores[0] != pytest.approx(found[0]["score_chosen"], abs=1e-3)
    # The file is written whole or not at all, and never over another.
    output = tmp_path / "new" / "scores.jsonl"
    words = ["score", str(folder / "run"), str(folder / "pairs.json"), "--output", str(output)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert lines(output.read_text()) == found
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists already" in again.stderr
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
    assert [path.name for path in output.parent.iterdir()] == ["scores.jsonl"]


def test_one_answer_has_the_score_of_its_row(finished: Finished) -> None:
    folder, _ = finished
    rows = json.loads((folder / "pairs.json").read_text())
    expected = score_file(folder / "run", folder / "pairs.json").rows[5].scores
    words = ["score", str(folder / "run"), "--prompt", rows[5]["instruction"], "--text", rows[5]["rejected"]]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert lines(done.stdout) == [{"index": 0, "score": pytest.approx(expected[1], abs=1e-5)}]


def test_a_plain_reward_model_gives_what_transformers_gives(
    full: Path, finished: Finished, tmp_path: Path
) -> None:
    """Pairs and single answers, in every form of a row and of a file."""
    folder, _ = finished
    rows = json.loads((folder / "pairs.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(full).eval()
    expected = plain_scores(model, AutoTokenizer.from_pretrained(full), rows)
    pairs = score_file(full, folder / "pairs.json")
    torch.testing.assert_close(
        torch.tensor([row.scores for row in pairs.rows]), expected, atol=2e-5, rtol=1e-5
    )

    def asked(row: dict[str, str]) -> dict[str, str]:
        return {"role": "user", "content": row["instruction"]}

    def said(row: dict[str, str], name: str) -> dict[str, str]:
        return {"role": "assistant", "content": row[name]}

    forms: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": row["instruction"], "input": "", "output": row["chosen"]} for row in rows],
        "prompt": [{"prompt": row["instruction"], "response": row["chosen"]} for row in rows],
        "openai": [{"messages": [asked(row), said(row, "chosen")]} for row in rows],
        "sharegpt": [
            {
                "conversations": [
                    {"from": "human", "value": row["instruction"]},
                    {"from": "gpt", "value": row["chosen"]},
                ]
            }
            for row in rows
        ],
        "chats": [
            {"chosen": [asked(row), said(row, "chosen")], "rejected": [asked(row), said(row, "rejected")]}
            for row in rows
        ],
        "continued": [
            {"prompt": [asked(row)], "chosen": [said(row, "chosen")], "rejected": [said(row, "rejected")]}
            for row in rows
        ],
    }
    for name, form in forms.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in form))
        found = torch.tensor([row.scores for row in score_file(full, file).rows])
        wanted = expected if name in ("chats", "continued") else expected[:, :1]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5, msg=name)
    pq.write_table(pa.Table.from_pylist(forms["prompt"]), tmp_path / "rows.parquet")
    found = torch.tensor([row.scores for row in score_file(full, tmp_path / "rows.parquet").rows])
    torch.testing.assert_close(found, expected[:, :1], atol=2e-5, rtol=1e-5)


def test_rows_that_cannot_be_scored_say_why(full: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "response": ""},
        {"prompt": "Hi", "response": "long " * 200},
        {"prompt": "Hi", "response": None},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    found = score_file(full, file, max_length=100)
    said = [row.to_dict() for row in found.rows]
    assert [row["score"] is None for row in said] == [False, True, True, True]
    assert [row.get("reason") for row in said[1:]] == ["empty answer", "longer than max_length", "no answer"]
    assert found.summary() == {"rows": 1, "not_scored": 3, "mean_score": said[0]["score"]}
    with pytest.raises(DataError, match="cannot be scored: longer than max_length"):
        score_text(full, "Hi", "long " * 200, max_length=100)


def test_adapters_below_an_adapter_and_new_tokens_come_back(tmp_path: Path) -> None:
    """A reward adapter on top of a merged one, trained with new tokens: its folder names both."""
    language = tmp_path / "language"
    recipe = reward_recipe(tmp_path, METHODS["lora"])
    method = build_method(LoraSpec(rank=2))
    model = method.apply(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    method.save(model, language)
    recipe["method"] = {**METHODS["lora"], "adapters": [str(language)], "create_new_adapter": True}
    recipe["model"]["vocabulary"] = {"add": ["Count"]}
    metrics = train(recipe, quiet=True).metrics
    found = score_file(tmp_path / "run", tmp_path / "pairs.json").rows
    held_out = np.random.default_rng(42).permutation(PAIRS)[:HELD_OUT]
    mean = np.mean([found[i].scores[0] for i in held_out])
    assert mean == pytest.approx(metrics["eval_rewards/chosen"], abs=1e-5)


def test_what_is_no_reward_model_is_named(tmp_path: Path, full: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": "Hi", "response": "Hello"}]))
    with pytest.raises(ModelError, match="no such folder"):
        score_file(tmp_path / "nothing", file)
    with pytest.raises(ModelError, match="no reward model but a LlamaForCausalLM"):
        score_file(chat_model(tmp_path / "language"), file)
    method = build_method(LoraSpec(rank=2))
    method.save(method.apply(tiny_model("llama")), tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter of a language model"):
        score_file(tmp_path / "adapter", file)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_labels=3
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    chat_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        score_file(tmp_path / "three", file)
    run = tmp_path / "sft"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: {path: x}\ndata: {train: [y]}\nstage: {type: sft}\n")
    with pytest.raises(ModelError, match="run of stage sft"):
        score_file(run, file)
    with pytest.raises(DataError, match="does not exist"):
        score_file(full, tmp_path / "absent.json")
    (tmp_path / "odd.json").write_text(json.dumps([{"a": "Hi", "b": "Hello"}]))
    with pytest.raises(DataError, match="no answers in its columns"):
        score_file(full, tmp_path / "odd.json")


@pytest.mark.parametrize(
    "words", [[], ["rows.json", "--text", "x"], ["--prompt", "x"], ["--text", "x"]], ids=" ".join
)
def test_a_file_or_a_text(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["score", "model", *words])
    assert done.exit_code == 2 and "give a FILE with rows, or --prompt and --text" in done.stderr
