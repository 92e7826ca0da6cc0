"""Runs that add tokens: what is saved is what was trained, wherever it is loaded, continued or resumed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import luthier
from luthier.methods.lora import Lora, load_adapter
from luthier.model.vocabulary import extend_tokenizer, read_record, resize_embeddings
from luthier.recipe.schema import LoraSpec, TrainSpec, VocabularySpec
from luthier.types import CheckpointError, ModelError
from tests.tiny import chat_model, write_alpaca

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
VOCABULARY = {"add": ["<calc>"], "add_special": ["<|user|>", "<|bot|>"], "descriptions": {"<calc>": "count"}}
TIES = {"untied": {}, "tied": {"tie_word_embeddings": True}}
NEW = ("<calc>", "<|user|>", "<|bot|>")


def recipe_in(folder: Path, base: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A recipe whose template and rows use three tokens that the base does not have."""
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = [
        {"instruction": f"Count <calc> to {n}, <|bot|>.", "output": f"<calc> {' '.join(map(str, range(n)))}"}
        for n in range(2, 14)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "other.json").write_text(json.dumps(rows[::3]))
    return {
        "model": {"path": str(base), "vocabulary": VOCABULARY},
        "data": {
            "train": ["rows.json"],
            "eval": ["other.json"],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "template": str(folder / "template.jinja"),
        },
        "method": method,
        "optim": {"type": "adamw", "lr": 0.02},
        "train": {"rows_per_device": 4, "epochs": 2, "plots": False, "output": str(folder / "run"), **train},
    }


@pytest.fixture(scope="module", params=TIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp(request.param), **TIES[request.param])


def ids_of(tokenizer: Any) -> list[int]:
    messages = [
        {"role": "user", "content": "Count <calc> to 5."},
        {"role": "assistant", "content": "<calc> 0 1 2 3 4"},
    ]
    return tokenizer.apply_chat_template(messages, return_dict=False)


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def plain(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base)


def merged(base: Path, run: Path) -> PreTrainedModel:
    model = plain(base)
    record = read_record(run)
    assert record is not None
    return Lora(LoraSpec(), resize_embeddings(model, record)).merged(model, str(run))


def said_about_padding(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What transformers logs about padding while the model answers two prompts, given their ids alone."""
    caplog.clear()
    transformers_logging.set_verbosity_warning()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        batch = tokenizer(["Count", "Count to 3"], padding=True, return_tensors="pt")
        found = model.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False)
    finally:
        logger.removeHandler(caplog.handler)
    masked = {key: batch[key] for key in ("input_ids", "attention_mask")}
    same = torch.equal(found, model.generate(**masked, max_new_tokens=3, do_sample=False))
    said = [record.message for record in caplog.records if "pad" in record.message.lower()]
    assert same or said, "without a word, the padding was taken for what it is"
    return said


def test_lora_is_resumed_loaded_and_merged(base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, base, {"type": "lora", "rank": 4, "dropout": 0.1}, save_every=2)
    straight = luthier.train(recipe, quiet=True)
    run = straight.output
    manifest = json.loads((run / "run.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run)
    new = [tokenizer.convert_tokens_to_ids(token) for token in NEW]
    old_size = len(AutoTokenizer.from_pretrained(base))
    assert new == [old_size, old_size + 1, old_size + 2]
    assert manifest["vocabulary"]["ids"] == new and "vocabulary.json" in manifest["files"]
    ids = ids_of(tokenizer)
    assert set(new) <= set(ids)

    checkpoint = run / "checkpoint-2"
    assert read_record(checkpoint) == read_record(run)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(run / name, resumed / name)
    shutil.copytree(checkpoint, resumed / checkpoint.name)
    luthier.train(recipe, [f"train.output={resumed}", "train.resume=auto"], quiet=True)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (run, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = [name for name in expected if "trainable_tokens_delta" in name]
    tied = plain(base).config.tie_word_embeddings
    assert [tuple(expected[name].shape) for name in rows] == [(3, 32)] * (1 if tied else 2)

    loaded = load_adapter(plain(base), run)
    one = merged(base, run)
    torch.testing.assert_close(logits(one, ids), logits(loaded, ids), rtol=1e-4, atol=1e-5)
    one.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(plain(tmp_path / "merged"), ids), logits(loaded, ids), rtol=1e-4, atol=1e-5
    )

    # A user's own `<|bot|>` stayed text: the merged model evaluates as the run did, from its folder alone.
    alone = {**recipe, "model": {"path": str(tmp_path / "merged")}, "method": {"type": "full"}}
    again = luthier.train(alone, [f"train.output={tmp_path / 'again'}", "train.eval_only=true"], quiet=True)
    assert again.metrics["eval_loss"] == pytest.approx(straight.metrics["eval_loss"], rel=1e-5)


def test_adapters_bring_their_tokens_into_the_next_run(base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, base, {"type": "lora", "rank": 4})
    first = luthier.train(recipe, quiet=True)
    silent = {**recipe, "model": {"path": str(base)}}
    method = {"type": "lora", "rank": 4, "adapters": [str(first.output)]}

    for name, model in (("named", recipe["model"]), ("silent", silent["model"])):
        continued = {**recipe, "model": model, "method": method}
        numbers = luthier.train(
            continued, [f"train.output={tmp_path / name}", "train.eval_only=true"], quiet=True
        ).metrics
        assert numbers["eval_loss"] == pytest.approx(first.metrics["eval_loss"], rel=1e-5)

    stacked = {**silent, "method": method | {"create_new_adapter": True}}
    second = luthier.train(stacked, [f"train.output={tmp_path / 'second'}", "train.seed=3"], quiet=True)
    assert second.metrics["eval_loss"] < first.metrics["eval_loss"]
    assert read_record(second.output) == read_record(first.output)
    both = {**silent, "method": method | {"adapters": [str(first.output), str(second.output)]}}
    numbers = luthier.train(
        both, [f"train.output={tmp_path / 'both'}", "train.eval_only=true"], quiet=True
    ).metrics
    assert numbers["eval_loss"] == pytest.approx(second.metrics["eval_loss"], rel=1e-5)

    other = {**recipe, "model": {"path": str(base), "vocabulary": {"add": ["<other>"]}}, "method": method}
    with pytest.raises(ModelError, match=r"model\.vocabulary names the new tokens '<other>'"):
        luthier.train(other, [f"train.output={tmp_path / 'other'}"], quiet=True)
    assert not (tmp_path / "other").exists()


def test_full_saves_an_ordinary_model(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its folder needs nothing of us: plain transformers loads it and generates without a word of warning."""
    recipe = recipe_in(tmp_path, base, {"type": "full"}, save_every=2)
    recipe["model"]["vocabulary"] = VOCABULARY | {"pad_token": "<|pad2|>"}
    result = luthier.train(recipe, ["optim.lr=0.002"], quiet=True)
    run = result.output
    tokenizer, model = AutoTokenizer.from_pretrained(run, padding_side="left"), plain(run)
    size = len(AutoTokenizer.from_pretrained(base))
    assert tokenizer.pad_token == "<|pad2|>" and tokenizer.pad_token_id == size + 3
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 320
    assert model.generation_config.pad_token_id == model.config.pad_token_id == size + 3
    assert said_about_padding(model, tokenizer, caplog) == []
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    assert said_about_padding(model, tokenizer, caplog), "what the saved pad token avoids"

    again = {**recipe, "model": {"path": str(run)}, "data": recipe["data"]}
    numbers = luthier.train(again, [f"train.output={tmp_path / 'again'}", "train.eval_only=true"], quiet=True)
    assert numbers.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(run / name, resumed / name)
    shutil.copytree(run / "checkpoint-2", resumed / "checkpoint-2")
    options = ["optim.lr=0.002", f"train.output={resumed}", "train.resume=auto"]
    luthier.train(recipe, options, quiet=True)
    expected, found = (load_file(folder / "model.safetensors") for folder in (run, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    changed = {**recipe, "model": {"path": str(base)}}
    changed["data"] = recipe["data"] | {"template": None}
    with pytest.raises(CheckpointError, match="has the shape"):
        shutil.rmtree(resumed / "checkpoint-6", ignore_errors=True)
        shutil.rmtree(resumed / "checkpoint-4", ignore_errors=True)
        luthier.train(changed, [*options, "train.allow_changes=true"], quiet=True)


def test_freeze_learns_the_new_rows(base: Path, tmp_path: Path) -> None:
    run = luthier.train(recipe_in(tmp_path, base, {"type": "freeze", "layers": 1}), quiet=True).output
    trained = load_file(run / "model.safetensors")["model.embed_tokens.weight"]
    assert read_record(run) is None, "a whole model holds its rows itself"
    tokenizer, model = AutoTokenizer.from_pretrained(base), plain(base)
    change = extend_tokenizer(tokenizer, VocabularySpec(**VOCABULARY), seed=TrainSpec().seed)
    resize_embeddings(model, change)
    start = model.get_input_embeddings().weight
    assert trained.shape == start.shape == (320, 32)
    assert all(not torch.equal(trained[index], start[index]) for index in change.ids)


@pytest.mark.slow
def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """The real tied model: two new special tokens learnt in eight steps, and the same function from disk."""
    write_alpaca(tmp_path / "short.json", 4)
    recipe = recipe_in(tmp_path, smollm2, {"type": "lora", "rank": 4}, max_steps=8, log_every=1)
    recipe["model"]["vocabulary"] = {"add_special": ["<|user|>", "<|bot|>"]}
    recipe["optim"]["lr"] = 0.003
    result = luthier.train(recipe, quiet=True)
    run = result.output
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    rows = load_file(run / "adapter_model.safetensors")
    (name,) = (name for name in rows if ".lora_" not in name)
    assert rows[name].shape == (2, 576)
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = ids_of(tokenizer)
    assert {49152, 49153} <= set(ids)
    loaded = load_adapter(plain(smollm2), run)
    assert loaded.config.vocab_size == 49216
    expected = logits(loaded, ids)
    torch.testing.assert_close(logits(merged(smollm2, run), ids), expected, rtol=1e-3, atol=1e-3)
    method = {"type": "lora", "rank": 4, "adapters": [str(run)]}
    again = {**recipe, "model": {"path": str(smollm2)}, "method": method}
    numbers = luthier.train(again, [f"train.output={tmp_path / 'again'}", "train.eval_only=true"], quiet=True)
    assert numbers.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
