"""Adapters on quantized bases as one plain model: the weights that the base stands for, and what was added to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import luthier
from luthier.methods.lora import load_adapter
from luthier.model.load import load_model, locate
from luthier.model.quantized_layers import dequantized, quantized_layers
from luthier.recipe.load import load_recipe
from luthier.trained import dequantize, load
from luthier.types import CheckpointError, ExportError, ModelError
from tests.tiny import chat_model, chat_tokenizer, write_alpaca

NF4: dict[str, Any] = {"type": "bitsandbytes", "bits": 4}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "int8": {"type": "bitsandbytes", "bits": 8},
    "torchao int8": {"type": "torchao", "name": "int8_weight_only"},
    "torchao float8": {"type": "torchao", "name": "float8_weight_only"},
    "hqq": {"type": "hqq", "bits": 4, "group_size": 16},
}
TEXT = "<|im_start|>user\nCount to 7.<|im_end|>\n<|im_start|>assistant\n1 2 3 4 5 6 7<|im_end|>\n"
TOKENS = {"add": ["<calc>"], "add_special": ["<|note|>"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    # Rows of whole blocks of 64 weights.
    return chat_model(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128, head_dim=16)


def recipe_in(folder: Path, base: Path, kind: dict[str, Any] | None, **sections: Any) -> dict[str, Any]:
    write_alpaca(folder / "rows.json", 16)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {
            "train": ["rows.json"],
            "dev_split": 4,
            "directory": str(folder),
            "cache": str(folder / "c"),
        },
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 0.02},
        "train": {"rows_per_device": 4, "epochs": 2, "plots": False, "output": str(folder / "run")},
    }
    if kind is not None:
        recipe["model"]["quantization"] = kind
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    return recipe


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        row = torch.tensor([ids])
        return model.eval()(row, attention_mask=torch.ones_like(row)).logits[0].float()


def as_trained(run: Path) -> Any:
    """The adapter of a run on its quantized base, loaded anew as its recipe says."""
    settings = load_recipe(run / "recipe.yaml").recipe
    return load_adapter(load_model(settings.model, locate(settings.model), torch.device("cpu")), run)


def token_ids(folder: Path) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])


@pytest.mark.parametrize("name", KINDS)
def test_the_plain_model_is_what_the_quantized_base_and_the_adapter_stand_for(
    name: str, model: Path, tmp_path: Path
) -> None:
    run = luthier.train(recipe_in(tmp_path, model, KINDS[name]), quiet=True).output
    output = tmp_path / "merged"
    result = luthier.export(run, output=output, dtype="float32", quiet=True)
    report = result.report
    assert report["quantized_base"] and any("quantized" in note for note in report["notes"])
    assert report["deviation"]["kl_mean"] < report["training_moved"]["kl_mean"] / 1000
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    # Each matrix is the dequantized one and the adapter's product.
    live, found = as_trained(run), plain(output).state_dict()
    saved = load_file(run / "adapter_model.safetensors")
    layers = quantized_layers(live.get_base_model())
    names = [one for one in layers if one.endswith("base_layer")]
    assert len(names) == 14
    for one in names:
        short = one.removesuffix(".base_layer")
        a, b = (saved[f"base_model.model.{short}.lora_{side}.weight"] for side in "AB")
        expected = dequantized(layers[one]).float() + 2.0 * b @ a
        torch.testing.assert_close(found[f"{short}.weight"], expected, rtol=0, atol=1e-5)
    ids = token_ids(output)
    torch.testing.assert_close(logits(plain(output), ids), logits(live, ids), rtol=0, atol=2e-2)
    assert not torch.allclose(
        found["model.layers.0.mlp.up_proj.weight"], plain(model).model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize("name", KINDS)
def test_new_tokens_on_a_quantized_base(name: str, model: Path, tmp_path: Path) -> None:
    """Their rows are in matrices that are not quantized: they train, are saved and loaded, and are exported."""
    recipe = recipe_in(
        tmp_path,
        model,
        KINDS[name],
        model={"path": str(model), "vocabulary": TOKENS, "quantization": KINDS[name]},
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        row["output"] = "<calc> " + row["output"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run, output = luthier.train(recipe, quiet=True).output, tmp_path / "merged"
    saved = load_file(run / "adapter_model.safetensors")
    trained = [key for key in saved if "token_adapter" in key or "trainable_tokens" in key]
    assert len(trained) == 2 and all(saved[key].shape == (saved[key].shape[0], 64) for key in trained)
    assert luthier.export(run, output=output, dtype="float32", quiet=True).passed
    tokenizer = AutoTokenizer.from_pretrained(output)
    new = tokenizer.convert_tokens_to_ids(["<calc>", "<|note|>"])
    assert min(new) >= len(chat_tokenizer())
    ids = [*token_ids(output), *new]
    torch.testing.assert_close(logits(plain(output), ids), logits(as_trained(run), ids), rtol=0, atol=2e-2)
    head = plain(output).lm_head.weight
    row = next(saved[key] for key in trained if "lm_head" in key)
    assert any(torch.equal(head[new[0]], one) for one in row)


def test_16_bit_arithmetic_on_a_quantized_base(model: Path, tmp_path: Path) -> None:
    """The bound is measured: bfloat16 moves the model more than float32 does."""
    run = luthier.train(recipe_in(tmp_path, model, NF4, train={"precision": "bf16"}), quiet=True).output
    report = luthier.export(run, output=tmp_path / "merged", quiet=True).report
    assert 0 < report["deviation"]["kl_mean"] < 4 * report["rounding"]["kl_mean"] + 1e-7


def test_several_adapters_on_a_quantized_base_are_added_to_its_plain_weights(
    model: Path, tmp_path: Path
) -> None:
    runs = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        runs.append(luthier.train(recipe_in(folder, model, NF4, train={"seed": seed}), quiet=True).output)
    result = luthier.export(
        model, adapters=[str(run) for run in runs], output=tmp_path / "merged", dtype="float32", quiet=True
    )
    assert result.report["quantized_base"] and result.report["adapters"] == [str(run) for run in runs]
    layer = quantized_layers(as_trained(runs[0]).get_base_model())["model.layers.1.mlp.up_proj.base_layer"]
    expected = dequantized(layer).float()
    for run in runs:
        saved = load_file(run / "adapter_model.safetensors")
        a, b = (saved[f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"] for side in "AB")
        expected = expected + 2.0 * b @ a
    found = plain(tmp_path / "merged").model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    return luthier.train(recipe_in(folder, model, NF4, train={"save_every": 3}), quiet=True).output


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "base.json")


def copied(run: Path, folder: Path, names: tuple[str, ...] = ADAPTER) -> Path:
    """The adapter's own files alone, away from its run."""
    folder.mkdir()
    for name in names:
        shutil.copy(run / name, folder / name)
    return folder


@pytest.mark.parametrize("which", ["run", "checkpoint-3"])
def test_a_copied_adapter_says_itself_what_it_was_trained_on(which: str, run: Path, tmp_path: Path) -> None:
    saved = run if which == "run" else run / which
    record = json.loads((saved / "base.json").read_text())
    assert record["quantization"]["type"] == "bitsandbytes" and record["quantization"]["bits"] == 4
    assert record["fingerprint"] == json.loads((run / "run.json").read_text())["base"]["fingerprint"]
    adapter = copied(saved, tmp_path / "adapter")
    result = luthier.export(adapter, output=tmp_path / "alone", dtype="float32", quiet=True)
    assert result.report["base"]["said_by"] == "base.json" and result.report["base"]["is_the_trained_one"]
    assert result.report["quantized_base"] and result.report["notes"][0].startswith(
        "base.json beside the adapter"
    )
    luthier.export(saved, output=tmp_path / "whole", dtype="float32", quiet=True)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Put on top of the base by hand it is the same: the base alone is not quantized.
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    by_hand = luthier.export(
        base, adapters=[str(adapter)], output=tmp_path / "by hand", dtype="float32", quiet=True
    )
    assert by_hand.report["quantized_base"]
    found = load_file(tmp_path / "by hand" / "model.safetensors")
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)


def test_a_copied_adapter_without_its_record_takes_the_base_at_its_word(run: Path, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path / "adapter", ADAPTER[:2])
    report = luthier.export(adapter, output=tmp_path / "merged", quiet=True).report
    assert not report["quantized_base"] and report["base"]["said_by"] is None
    assert report["notes"][0].endswith("so the base is taken at its word: its files are not compared with any, and it "
                                       "is loaded as its files are")  # fmt: skip


def test_a_copied_adapter_refuses_another_base(run: Path, model: Path, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path / "adapter")
    other = chat_model(tmp_path / "other", hidden_size=64, intermediate_size=128, head_dim=16)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is not the base that .*adapter was trained on"):
        luthier.export(adapter, base=str(other), output=tmp_path / "merged", quiet=True)
    moved = shutil.copytree(model, tmp_path / "moved")
    assert luthier.export(adapter, base=str(moved), output=tmp_path / "merged", quiet=True).report[
        "quantized_base"
    ]


def test_a_recipe_with_another_quantization_is_refused(run: Path, model: Path, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path / "adapter")
    for number, source in enumerate((run, adapter)):
        tree = {
            "model": {"path": str(model), "quantization": {**NF4, "quant_type": "fp4"}},
            "method": {"type": "lora", "rank": 4, "adapters": [str(source)]},
            "export": {"output": str(tmp_path / f"merged{number}"), "dtype": "float32"},
        }
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(tree))
        with pytest.raises(ModelError, match=r"not trained on one base.*type: bitsandbytes.*quant_type: fp4"):
            luthier.export(file, quiet=True)
        # The same, or none, is what it was trained with.
        for quantization in (NF4, None):
            tree["model"]["quantization"] = quantization  # type: ignore[index]
            file.write_text(json.dumps(tree))
            result = luthier.export(file, overwrite=True, quiet=True)
            assert result.report["quantized_base"]


def test_adapters_of_different_bases_are_not_added_up(run: Path, model: Path, tmp_path: Path) -> None:
    other = luthier.train(recipe_in(tmp_path, model, None), quiet=True).output
    with pytest.raises(ModelError, match=r"not trained on one base: .* has it quantized .* has it as it is"):
        luthier.export(model, adapters=[str(run), str(other)], output=tmp_path / "merged", quiet=True)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("damage", ["{", '{"version": 9}', '{"version": 1}'])
def test_a_damaged_record_is_refused(damage: str, run: Path, tmp_path: Path) -> None:
    adapter = copied(run, tmp_path / "adapter")
    (adapter / "base.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"base\.json"):
        luthier.export(adapter, output=tmp_path / "merged", quiet=True)


def test_a_stacked_adapter_that_is_copied_needs_those_below_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = luthier.train(recipe_in(tmp_path / "a", model, None), quiet=True).output
    (tmp_path / "b").mkdir()
    method = {"adapters": [str(first)], "create_new_adapter": True}
    second = luthier.train(recipe_in(tmp_path / "b", model, None, method=method), quiet=True).output
    adapter = copied(second, tmp_path / "adapter")
    result = luthier.export(adapter, output=tmp_path / "merged", quiet=True)
    assert result.report["adapters"] == [str(first), str(adapter)]
    first.rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"on top of .*, and .*run is not there; export the base with all adapters"
    ):
        luthier.export(adapter, output=tmp_path / "again", quiet=True)
    words = {"adapters": [str(tmp_path / "moved"), str(adapter)]}
    assert luthier.export(model, output=tmp_path / "again", quiet=True, **words).passed
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "merged"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_wrong_dequantization_is_caught(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer whose weights are those of another scale: what is written is what was merged, and is not the model."""
    right = dequantize.dequantized

    def wrong(layer: Any) -> Tensor:
        weight = right(layer)
        return weight * 1.2 if weight.shape == (128, 64) else weight

    calls = {"number": 0}
    loaded = dequantize.dequantize

    def once(model: Any) -> Any:
        calls["number"] += 1
        if calls["number"] > 1:  # the bound is measured with the right one
            return loaded(model)
        with monkeypatch.context() as patched:
            patched.setattr(dequantize, "dequantized", wrong)
            return loaded(model)

    monkeypatch.setattr(load, "dequantize", once)
    with pytest.raises(ExportError, match="mean KL"):
        luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True)
    assert calls["number"] == 2


def test_a_family_with_transposed_matrices(tmp_path: Path) -> None:
    """GPT-2 keeps its linear layers the other way round; quantized ones become such again."""
    config = GPT2Config(
        vocab_size=len(chat_tokenizer()),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    chat_tokenizer().save_pretrained(base)
    run = luthier.train(recipe_in(tmp_path, base, NF4), quiet=True).output
    assert luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True).report[
        "quantized_base"
    ]
    assert plain(tmp_path / "merged").transformer.h[0].attn.c_attn.weight.shape == (64, 192)
