"""Reward modelling from a recipe to a folder that plain transformers and PEFT read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from luthier.run import train
from luthier.types import RecipeError
from tests.reward import HELD_OUT, PAIRS, plain_scores, reward_recipe, write_pairs
from tests.tiny import chat_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "lora": {"type": "lora", "rank": 4},
}
WEIGHTS = {"full": "model.safetensors", "freeze": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture(scope="module", params=METHODS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, float]]:
    """A run of six steps with a checkpoint at each second one, for each method."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    recipe = reward_recipe(folder, METHODS[request.param], save_every=2, eval_every=2)
    return request.param, folder, train(recipe, quiet=True).metrics


Finished = tuple[str, Path, dict[str, float]]


def log(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def reloaded(method: str, folder: Path) -> Any:
    """The model as a stranger loads it: no Luthier."""
    run = folder / "run"
    if method != "lora":
        return AutoModelForSequenceClassification.from_pretrained(run).eval()
    return AutoPeftModelForSequenceClassification.from_pretrained(run, num_labels=1).eval()


def test_it_learns_and_says_so(finished: Finished) -> None:
    _, folder, metrics = finished
    losses = log(folder / "run", "loss")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert losses[0] == pytest.approx(0.69, abs=0.2)
    assert metrics["eval_loss"] < 0.6 and metrics["eval_accuracy"] > 0.5
    apart = metrics["eval_rewards/chosen"] - metrics["eval_rewards/rejected"]
    assert metrics["eval_rewards/margins"] == pytest.approx(apart, abs=1e-5)
    assert not any("perplexity" in name for name in metrics)
    assert len(log(folder / "run", "eval_accuracy")) == 3  # at 2, 4 and 6, which is the end
    assert "accuracy" in [*json.loads((folder / "run" / "trainer_log.jsonl").read_text().splitlines()[0])]


def test_plain_transformers_gives_the_evaluated_scores(finished: Finished) -> None:
    """Loss, accuracy and rewards of the run's last evaluation, from the saved folder and the held-out rows alone."""
    method, folder, metrics = finished
    rows = json.loads((folder / "pairs.json").read_text())
    held_out = torch.from_numpy(np.random.default_rng(42).permutation(PAIRS))[:HELD_OUT]
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    model = reloaded(method, folder)
    scores = plain_scores(model, tokenizer, [rows[i] for i in held_out.tolist()])
    apart = scores[:, 0] - scores[:, 1]
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(scores[:, 0].mean()), abs=2e-5)
    assert metrics["eval_rewards/rejected"] == pytest.approx(float(scores[:, 1].mean()), abs=2e-5)
    assert metrics["eval_loss"] == pytest.approx(float(torch.nn.functional.softplus(-apart).mean()), abs=2e-5)
    assert metrics["eval_accuracy"] == pytest.approx(float((apart > 0).float().mean()))
    assert model.config.pad_token_id == tokenizer.pad_token_id
    if method == "lora":
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
        attached = PeftModel.from_pretrained(base, folder / "run").eval()
        again = plain_scores(attached, tokenizer, [rows[i] for i in held_out.tolist()])
        torch.testing.assert_close(again, scores)


def test_the_head_lies_beside_it_for_ppo(finished: Finished) -> None:
    method, folder, _ = finished
    written = load_file(folder / "run" / "value_head.safetensors")["v_head.summary.weight"]
    name = "base_model.model.score.weight" if method == "lora" else "score.weight"
    assert torch.equal(written, load_file(folder / "run" / WEIGHTS[method])[name])
    manifest = json.loads((folder / "run" / "run.json").read_text())
    assert "value_head.safetensors" in manifest["files"]
    assert manifest["rows"]["self_test"]["flat"]["reach"] == 0


def test_the_card_says_how_to_score(finished: Finished) -> None:
    _, folder, _ = finished
    card = (folder / "run" / "README.md").read_text()
    assert (
        "pipeline_tag: text-classification" in card and "## Scoring" in card and "| eval_accuracy |" in card
    )


def test_a_resumed_run_ends_with_the_same_bits(finished: Finished) -> None:
    method, folder, metrics = finished
    again = folder / "again"
    if again.exists():
        shutil.rmtree(again)
    again.mkdir()
    shutil.copytree(folder / "run" / "checkpoint-2", again / "checkpoint-2")
    recipe = reward_recipe(
        folder, METHODS[method], save_every=2, eval_every=2, output=str(again), resume="auto"
    )
    resumed = train(recipe, quiet=True).metrics
    for name, weight in load_file(folder / "run" / WEIGHTS[method]).items():
        assert torch.equal(weight, load_file(again / WEIGHTS[method])[name]), name
    assert resumed["eval_loss"] == metrics["eval_loss"]
    assert log(again, "loss") == log(folder / "run", "loss")[2:]


def test_the_best_model_brings_its_head_back(finished: Finished) -> None:
    """Whichever way the rejected answers' scores go, the better end of it is not the last: the run must end with the
    model of an earlier evaluation, head and all."""
    method, folder, _ = finished
    output = folder / "best"
    values = log(folder / "run", "eval_rewards/rejected")[:3]
    greater = max(values) != values[-1]
    best = max(values) if greater else min(values)
    step = 2 * (values.index(best) + 1)
    assert step < 6
    wanted = {"load_best": True, "best_metric": "rewards/rejected", "greater_is_better": greater}
    recipe = reward_recipe(
        folder, METHODS[method], save_every=2, eval_every=2, output=str(output), overwrite=True, **wanted
    )
    metrics = train(recipe, quiet=True).metrics
    assert json.loads((output / "trainer_state.json").read_text())["best_global_step"] == step
    kept, last = load_file(output / WEIGHTS[method]), load_file(output / "checkpoint-6" / WEIGHTS[method])
    for name, weight in load_file(output / f"checkpoint-{step}" / WEIGHTS[method]).items():
        assert torch.equal(weight, kept[name]), name
    heads = [name for name in kept if "score" in name]
    assert len(heads) == 1 and not torch.equal(last[heads[0]], kept[heads[0]])
    assert metrics["eval_rewards/rejected"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_padding_that_ends_rows_does_not_move_the_score(method: str, tmp_path: Path) -> None:
    """A template without a newline ends rows with the token that most tokenizers pad with; transformers would then
    read the token before. Another one is chosen, and saved with the tokenizer and with a whole model. An adapter's
    base keeps its own config, so there the padding is the caller's to give."""
    recipe = reward_recipe(tmp_path, METHODS[method])
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor")
    tokenizer.save_pretrained(tmp_path / "base")
    metrics = train(recipe, quiet=True).metrics
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = reloaded(method, tmp_path)
    if method == "lora":
        model.config.pad_token_id = saved.pad_token_id
    assert saved.pad_token_id == model.config.pad_token_id != saved.eos_token_id
    rows = json.loads((tmp_path / "pairs.json").read_text())
    held_out = np.random.default_rng(42).permutation(PAIRS)[:HELD_OUT].tolist()
    scores = plain_scores(model, saved, [rows[i] for i in held_out])
    assert metrics["eval_rewards/rejected"] == pytest.approx(float(scores[:, 1].mean()), abs=2e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(scores[:, 0].mean()), abs=2e-5)
    # And this is what it guards against.
    model.config.pad_token_id = saved.eos_token_id
    trapped = plain_scores(model, saved, [rows[i] for i in held_out])
    assert float((trapped - scores).abs().max()) > 1e-3


def test_a_reward_adapter_is_continued_from_where_it_was(tmp_path: Path) -> None:
    metrics = train(reward_recipe(tmp_path, METHODS["lora"]), quiet=True).metrics
    continued = {**METHODS["lora"], "adapters": [str(tmp_path / "run")]}
    recipe = reward_recipe(tmp_path, continued, output=str(tmp_path / "more"), eval_only=True)
    assert train(recipe, quiet=True).metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_token_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.metrics does not go with stage: rm"):
        train(reward_recipe(tmp_path, METHODS["lora"], metrics=["accuracy"]), quiet=True)


@pytest.mark.parametrize("method", METHODS)
def test_new_tokens_go_with_a_reward_model(method: str, tmp_path: Path) -> None:
    recipe = reward_recipe(tmp_path, METHODS[method])
    recipe["model"]["vocabulary"] = {"add": ["Count"], "pad_token": "<|blank|>"}
    metrics = train(recipe, quiet=True).metrics
    assert metrics["eval_loss"] < 0.69
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert (
        tokenizer.pad_token == "<|blank|>"
        and len(tokenizer("Count", add_special_tokens=False)["input_ids"]) == 1
    )
    if method == "lora":
        return  # plain PEFT grows the embeddings by its own rule; luthier score puts the recorded rows back
    rows = json.loads((tmp_path / "pairs.json").read_text())
    held_out = np.random.default_rng(42).permutation(PAIRS)[:HELD_OUT].tolist()
    scores = plain_scores(reloaded(method, tmp_path), tokenizer, [rows[i] for i in held_out])
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(scores[:, 0].mean()), abs=2e-5)


def test_a_recipe_margin_holds_where_the_data_has_none(tmp_path: Path) -> None:
    """The first loss of a fresh model: pairs with a margin of their own keep it, the others get the recipe's."""
    recipe = reward_recipe(tmp_path, METHODS["full"], eval_only=True, overwrite=True)
    rows: list[dict[str, Any]] = [*write_pairs(tmp_path / "pairs.json")]
    plain = train(recipe, quiet=True).metrics
    recipe["stage"]["margin"] = 3.0
    assert train(recipe, quiet=True).metrics["eval_loss"] > plain["eval_loss"] + 1
    rows = [{**row, "margin": 0.0} for row in rows]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    recipe["data"]["train"][0]["columns"]["margin"] = "margin"
    assert train(recipe, quiet=True).metrics["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-6)


@pytest.mark.slow
def test_smollm2_learns_real_pairs(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """Eight real pairs: learnt by heart, and the saved adapter gives plain transformers the scores of the run."""
    pairs = json.loads((shared_data / "dpo_en_demo.json").read_text())
    lengths = [
        len(str(pair["conversations"])) + len(str(pair["chosen"])) + len(str(pair["rejected"]))
        for pair in pairs
    ]
    short = sorted(range(len(pairs)), key=lambda i: lengths[i])[:8]
    (tmp_path / "pairs.json").write_text(json.dumps([pairs[i] for i in short]))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    data_set = {
        "file_name": str(tmp_path / "pairs.json"),
        "ranking": True,
        "formatting": "sharegpt",
        "columns": columns,
    }
    metrics = train(
        {
            "model": {"path": str(smollm2)},
            "data": {"train": [data_set], "eval": [{**data_set, "name": "same"}], "max_length": 512},
            "stage": {"type": "rm"},
            "method": {"type": "lora", "rank": 8},
            "optim": {"lr": 1e-3},
            "train": {
                "output": str(tmp_path / "run"),
                "epochs": 5,
                "rows_per_device": 8,
                "save_every": None,
                "plots": False,
            },
        },
        quiet=True,
    ).metrics
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1).eval()
    found = []
    for i in short:
        asked = [{"role": "user", "content": turn["value"]} for turn in pairs[i]["conversations"]]
        assert len(asked) == 1
        chats = [
            [*asked, {"role": "assistant", "content": pairs[i][name]["value"]}]
            for name in ("chosen", "rejected")
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        batch = tokenizer(
            texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            found.append(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
            )
    scores = torch.stack(found)
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(scores[:, 0].mean()), abs=1e-3)
    assert metrics["eval_rewards/rejected"] == pytest.approx(float(scores[:, 1].mean()), abs=1e-3)
