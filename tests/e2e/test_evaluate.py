"""`luthier evaluate`: perplexity by exact sums, from folders as users have them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from luthier.cli import app
from luthier.evaluate_verb import evaluate
from luthier.run import train
from luthier.types import DataError, ModelError, RecipeError
from tests.reward import HELD_OUT, PAIRS, reward_recipe
from tests.tiny import chat_model, write_alpaca

METHODS: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora", "rank": 4}}
Trained = tuple[Path, dict[str, float]]


def recipe(folder: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    if not (folder / "base").is_dir():
        chat_model(folder / "base")
        write_alpaca(folder / "rows.json", 20)
        write_alpaca(folder / "held.json", 9)
    data = {"train": [str(folder / "rows.json")], "eval": [str(folder / "held.json")], "dev_split": 4}
    settings = {"rows_per_device": 4, "max_steps": 5, "save_every": None, "plots": False}
    return {
        "model": {"path": str(folder / "base")},
        "data": {**data, "max_length": 96, "cache": str(folder / "cache")},
        "stage": {"type": "sft"},
        "method": method,
        "optim": {"lr": 1e-2},
        "train": {"output": str(folder / "run"), **settings},
        **changes,
    }


@pytest.fixture(scope="module", params=METHODS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    return folder, train(recipe(folder, METHODS[request.param]), quiet=True).metrics


def by_name(found: dict[str, Any], part: str = "perplexity") -> dict[str, Any]:
    return {one["name"]: one for one in found[part]}


def plain_nll(model: Any, ids: list[int], first: int) -> float:
    """sum of -log p of tokens `first` to the end, by transformers alone."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[at - 1, ids[at]]) for at in range(first, len(ids)))


def conversation_nll(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for row in rows:
        user = {"role": "user", "content": row["instruction"]}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt + row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        first = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        total, count = total + plain_nll(model, ids, first), count + len(ids) - first
    return total, count


def test_a_runs_own_evaluation_comes_back_from_its_folder(trained: Trained) -> None:
    folder, metrics = trained
    found = by_name(evaluate(folder / "run", against="base", quiet=True).report)
    assert list(found) == ["dev", "held"]
    for name, one in found.items():
        assert one["target"]["loss"] == pytest.approx(metrics[f"eval_{name}_loss"], rel=1e-6)
        assert one["target"]["perplexity"] == pytest.approx(metrics[f"eval_{name}_perplexity"], rel=1e-5)
        apart = one["difference"]
        assert apart["unit"] == "nats per token"
        assert apart["value"] == pytest.approx(one["target"]["loss"] - one["against"]["loss"], abs=1e-9)
        low, high = apart["interval"]
        assert low < apart["value"] < high < 0  # it learnt something, on every row
    base = by_name(evaluate(folder / "base", perplexity=[str(folder / "held.json")], quiet=True).report)
    assert base["held"]["target"]["loss"] == pytest.approx(found["held"]["against"]["loss"], rel=1e-6)


def test_conversations_equal_plain_transformers(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    rows = json.loads((folder / "held.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    total, count = conversation_nll(model, tokenizer, rows)
    args = ["evaluate", str(folder / "base"), "--perplexity", str(folder / "held.json"), "--json"]
    reports = []
    for passes in ("1", "100", "100000"):
        done = CliRunner().invoke(app, [*args, "--tokens-per-pass", passes, "-o", str(tmp_path / passes)])
        assert done.exit_code == 0, done.output
        reports.append(json.loads(done.stdout))
        assert json.loads((tmp_path / passes / "evaluate_results.json").read_text()) == reports[-1]
        target = reports[-1]["perplexity"][0]["target"]
        assert target["loss"] == pytest.approx(total / count, rel=1e-5)
        assert target["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert (target["rows"], target["tokens"]) == (len(rows), count)


def test_plain_text_in_windows_equals_plain_transformers(tmp_path: Path) -> None:
    chat_model(tmp_path / "base")
    texts = ["short", "a text of many words, " * 6, "一二三"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "  "])
    (tmp_path / "texts.jsonl").write_text(lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    window, stride, total, count = 40, 15, 0.0, 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        counted = 1
        for start in range(0, len(ids), stride):
            stop = min(start + window, len(ids))
            total += plain_nll(model, ids[start:stop], counted - start)
            counted = stop
            if stop == len(ids):
                break
        count += len(ids) - 1
    how: dict[str, Any] = {"perplexity": [str(tmp_path / "texts.jsonl")], "quiet": True}
    report = evaluate(tmp_path / "base", window=window, stride=stride, **how).report
    assert report["windows"] == {"window": window, "stride": stride}
    target = report["perplexity"][0]["target"]
    num_bytes, num_words = (
        sum(len(text.encode()) for text in texts),
        sum(len(text.split(" ")) for text in texts),
    )
    assert target["tokens"] == count and target["left_out"] == {"empty text": 1}
    assert target["loss"] == pytest.approx(total / count, rel=1e-5)
    assert target["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert target["word_perplexity"] == pytest.approx(math.exp(total / num_words), rel=1e-4)
    # Another stride is another context, and so another number.
    other = evaluate(tmp_path / "base", window=window, stride=39, **how).report["perplexity"][0]["target"]
    assert other["tokens"] == count and abs(other["loss"] - target["loss"]) > 1e-6


def test_what_cannot_be_evaluated_is_refused_in_one_sentence(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    base, held = str(folder / "base"), str(folder / "held.json")
    (tmp_path / "evaluate_results.json").write_text("kept")
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "numbers.jsonl").write_text('{"a": 1}\n')
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, RecipeError, "no evaluation sets of its own; name what to evaluate on"),
        ({"perplexity": ["nowhere.json"]}, DataError, "'nowhere.json' is neither"),
        (
            {"perplexity": [str(tmp_path / "empty.jsonl")]},
            DataError,
            r"no row has a target; empty text \(1\)",
        ),
        ({"perplexity": [str(tmp_path / "bad.jsonl")]}, DataError, "bad.jsonl, line 2"),
        ({"perplexity": [str(tmp_path / "numbers.jsonl")]}, DataError, "numbers.jsonl.*columns"),
        ({"perplexity": [held], "output": tmp_path}, DataError, "exists already.*--overwrite"),
        ({"perplexity": [held], "against": "base"}, RecipeError, "no run says what"),
        ({"perplexity": [held], "window": 300}, RecipeError, "--window 300: the model has positions for 256"),
        (
            {"perplexity": [held], "window": 40, "stride": 40},
            RecipeError,
            "--stride 40: expected .* less than",
        ),
        ({"pairs": [held]}, RecipeError, "is a language model, and pairs are for reward models"),
        ({"tasks_folder": tmp_path}, RecipeError, "name its tasks with --lm-eval"),
        ({"tasks": ["mmlu"]}, DataError, "--task mmlu: expected a benchmark and its split"),
        ({"tasks": ["mmlu_test"], "lang": "fr"}, RecipeError, "--lang fr: choose from en, zh"),
    ]
    for how, kind, message in refused:
        with pytest.raises(kind, match=message):
            evaluate(base, quiet=True, **how)
    assert (tmp_path / "evaluate_results.json").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reward")
    return folder, train(reward_recipe(folder, METHODS["lora"], save_every=3), quiet=True).metrics


def test_a_reward_runs_accuracy(reward_run: Trained) -> None:
    folder, metrics = reward_run
    report = evaluate(folder / "run", against=str(folder / "run" / "checkpoint-3"), quiet=True).report
    (own,) = report["pairs"]
    assert own["name"] == "dev" and own["target"]["rows"] == HELD_OUT
    assert own["target"]["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert own["target"]["mean_margin"] == pytest.approx(metrics["eval_rewards/margins"], abs=1e-5)
    low, high = own["target"]["interval"]
    assert 0 <= low < own["target"]["accuracy"] <= high <= 1
    assert own["difference"]["value"] == pytest.approx(own["target"]["accuracy"] - own["against"]["accuracy"])
    file = str(folder / "pairs.json")
    done = CliRunner().invoke(app, ["evaluate", str(folder / "run"), "--pairs", file])
    assert done.exit_code == 0 and "accuracy" in done.stdout and f"  {PAIRS}  " in done.stdout
    with pytest.raises(RecipeError, match="is a reward model: it has pairs to compare"):
        evaluate(folder / "run", perplexity=[file], quiet=True)
    with pytest.raises(ModelError, match="is a reward model, and this is none"):
        evaluate(folder / "run", against=str(folder / "base"), quiet=True)
