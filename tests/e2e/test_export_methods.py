"""Every way to train, exported: the written model, read back by plain transformers, says what the live one said when
its training ended. What the live one said is kept in memory: nothing that was saved has a part in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import luthier
from luthier.methods import METHODS
from luthier.model.value_head import VALUE_HEAD_NAME
from luthier.trained import load
from luthier.trainer.trainer import PeftTrainer
from luthier.types import ExportError
from tests.reward import reward_recipe
from tests.tiny import chat_model, chat_tokenizer, write_alpaca

LORA: dict[str, Any] = {"type": "lora", "rank": 4}
BIAS = {"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj"], "bias": "lora_only"}
CASES: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "llama_pro": {"type": "llama_pro", "blocks": 2},
    "llama_pro mlp": {"type": "llama_pro", "blocks": 1, "modules": ["mlp"]},
    "lora": LORA,
    "rslora": {**LORA, "rslora": True},
    "dora": {**LORA, "dora": True},
    "lora-fa": {**LORA, "freeze_a": True},
    "orthogonal": {**LORA, "init": "orthogonal"},
    "pissa": {**LORA, "init": "pissa"},
    "pissa fast": {**LORA, "init": "pissa", "init_iterations": 4},
    "pissa and head": {**LORA, "init": "pissa", "rslora": True, "modules_to_save": ["lm_head"]},
    "olora": {**LORA, "init": "olora"},
    "patterns": {**LORA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3.0}},
    "tokens": {**LORA, "trainable_tokens": [5, 6, 40]},
    "tokens and head": {**LORA, "trainable_tokens": [5, 40], "modules_to_save": ["lm_head"]},
    "bias": BIAS,
    "oft": {"type": "oft", "block_size": 8},
    "oft exact": {"type": "oft", "block_size": 4, "neumann_terms": None},
    "vera": {"type": "vera", "rank": 8},
    "ia3": {"type": "ia3"},
    "miss": {"type": "miss", "rank": 4},
    "miss bat": {"type": "miss", "rank": 4, "init": "bat"},
    "loha": {"type": "peft", "config": {"peft_type": "LOHA", "r": 4}},
    "hra": {"type": "peft", "config": {"peft_type": "HRA", "r": 4, "target_modules": "all-linear"}},
    "ln_tuning": {"type": "peft", "config": {"peft_type": "LN_TUNING"}},
}
IDS = torch.tensor([[5, 40, 70, 33, 8, 101, 6, 60, 12, 97, 40, 5]])
SPARSE = ("ia3", "vera", "ln_tuning")
"""Few numbers, which a higher rate has to move."""


def recipe_in(folder: Path, base: Path, method: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    write_alpaca(folder / "rows.json", 16)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "train": ["rows.json"],
            "dev_split": 4,
            "directory": str(folder),
            "cache": str(folder / "c"),
        },
        "method": dict(method),
        "optim": {"lr": 0.02},
        "train": {"rows_per_device": 4, "epochs": 2, "plots": False, "output": str(folder / "run")},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    return recipe


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert isinstance(found, Tensor)
    return found.float()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the live model says at the moment in which it is saved for good."""
    said: list[Tensor] = []
    save = PeftTrainer.save_trained

    def saved(self: PeftTrainer, *args: Any, **options: Any) -> None:
        said.append(logits(self.model))
        save(self, *args, **options)

    monkeypatch.setattr(PeftTrainer, "save_trained", saved)
    return said


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bases")
    return {
        "plain": chat_model(folder / "plain"),
        "tied": chat_model(folder / "tied", tie_word_embeddings=True),
        "bias": chat_model(folder / "bias", attention_bias=True),
    }


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("name", CASES)
def test_the_export_is_the_live_model(
    name: str, bases: dict[str, Path], ended: list[Tensor], tmp_path: Path
) -> None:
    base = bases["bias" if name == "bias" else "plain"]
    recipe = recipe_in(tmp_path, base, CASES[name], optim={"lr": 0.2 if name in SPARSE else 0.02})
    run = luthier.train(recipe, quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", quiet=True)
    assert result.passed and len(ended) == 1
    found = logits(plain(tmp_path / "merged"))
    torch.testing.assert_close(found, ended[0], rtol=0, atol=1e-4)
    assert float((found - logits(plain(base))).abs().max()) > 0.02, "the training changed nothing"
    moved = result.report["training_moved"]
    assert moved is None or result.report["deviation"]["kl_mean"] < moved["kl_mean"] / 1000
    # No trace of an adapter: the names are those of the family's own files.
    theirs = plain(base).state_dict().keys()
    with_blocks = "llama_pro" in name
    ours = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert theirs < ours if with_blocks else ours == theirs


def test_every_method_is_exported() -> None:
    assert {case["type"] for case in CASES.values()} == set(METHODS)


EXTENDED = [(base, name) for base in ("plain", "tied") for name in ("lora", "pissa", "full", "freeze")]
"""And OFT, which takes no tied matrices."""


@pytest.mark.parametrize(("base", "name"), [*EXTENDED, ("plain", "oft")])
def test_a_model_whose_vocabulary_was_extended(
    base: str, name: str, bases: dict[str, Path], ended: list[Tensor], tmp_path: Path
) -> None:
    method = dict(CASES[name])
    if name == "freeze":
        method["extra_modules"] = ["embed_tokens", "lm_head"]
    vocabulary = {"add": ["<calc>", "<plot>"], "add_special": ["<|note|>"]}
    model = {"path": str(bases[base]), "vocabulary": vocabulary}
    recipe = recipe_in(tmp_path, bases[base], method, model=model)
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(
        json.dumps([{**row, "output": "<calc>" + row["output"]} for row in rows])
    )
    run = luthier.train(recipe, quiet=True).output
    assert luthier.export(run, output=tmp_path / "merged", quiet=True).passed
    model_, tokenizer = plain(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(model_), ended[0], rtol=0, atol=1e-4)
    new = tokenizer.convert_tokens_to_ids(["<calc>", "<plot>", "<|note|>"])
    assert min(new) >= len(chat_tokenizer()) and model_.config.vocab_size % 64 == 0
    assert tokenizer("a <calc>")["input_ids"][-1] == new[0]
    assert (model_.lm_head.weight is model_.model.embed_tokens.weight) == (base == "tied")


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "oft", "vera", "miss", "full", "freeze"])
def test_a_reward_model_with_its_value_head(name: str, ended: list[Tensor], tmp_path: Path) -> None:
    run = luthier.train(reward_recipe(tmp_path, CASES[name]), quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", quiet=True)
    assert result.passed and result.report["kind"] == "reward"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(logits(model), ended[0], rtol=0, atol=1e-4)
    head = load_file(tmp_path / "merged" / VALUE_HEAD_NAME)["v_head.summary.weight"]
    assert torch.equal(head, model.score.weight)
    assert torch.equal(head, load_file(run / VALUE_HEAD_NAME)["v_head.summary.weight"])


STACKS = {"lora, lora": ("lora", "lora"), "pissa, dora": ("pissa", "dora"), "oft, miss": ("oft", "miss")}


@pytest.mark.parametrize("name", STACKS)
def test_several_adapters(name: str, bases: dict[str, Path], ended: list[Tensor], tmp_path: Path) -> None:
    """The second was trained on top of the first: the live model of its training is what both are together."""
    runs: list[Path] = []
    for number, method in enumerate(STACKS[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        below = {"adapters": [str(run) for run in runs], "create_new_adapter": bool(runs)} if runs else {}
        asked = recipe_in(folder, bases["plain"], {**CASES[method], **below})
        runs.append(luthier.train(asked, quiet=True).output)
    result = luthier.export(runs[-1], output=tmp_path / "merged", quiet=True)
    assert result.report["adapters"] == [str(run) for run in runs]
    found = logits(plain(tmp_path / "merged"))
    torch.testing.assert_close(found, ended[1], rtol=0, atol=1e-4)
    assert float((found - ended[0]).abs().max()) > 0.02


@pytest.mark.parametrize("name", ["pissa", "dora", "oft", "miss", "tokens", "vera"])
def test_a_merge_that_is_a_little_wrong_fails_for_every_kind(
    name: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One matrix of fourteen is a twentieth too large."""
    recipe = recipe_in(tmp_path, bases["plain"], CASES[name], optim={"lr": 0.2 if name in SPARSE else 0.02})
    run = luthier.train(recipe, quiet=True).output
    right = load.merged

    def wrong(model: Any, trained: Any) -> Any:
        made = right(model, trained)
        made.model.layers[1].mlp.down_proj.weight.data *= 1.05
        return made

    monkeypatch.setattr(load, "merged", wrong)
    with pytest.raises(ExportError, match="is not the model that was trained"):
        luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True)
    assert (tmp_path / "merged" / "EXPORT_FAILED").is_file()
