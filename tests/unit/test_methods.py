"""What trains, how it is grouped, and that what is saved gives the same function back."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from luthier.methods import build_method
from luthier.methods.groups import checkpoints_activations, count_parameters
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.logprobs import install_target_forward
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import CheckpointingSpec, FreezeSpec, FullSpec, LoraSpec
from luthier.types import CheckpointError, ModelError, RecipeError
from tests.tiny import FAMILIES, VOCAB, tiny_model

IDS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
HIDDEN, INNER, KV = 32, 48, 16
"""Sizes of the tiny Llama: two layers of four heads of 8, two of them for keys and values."""
ATTENTION = HIDDEN * HIDDEN * 2 + HIDDEN * KV * 2
MLP = 3 * HIDDEN * INNER
LAYER = ATTENTION + MLP + 2 * HIDDEN


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def shake(model: nn.Module, seed: int = 1) -> None:
    """Stands for training: everything that trains moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapter(folder: Path, seed: int, **options: Any) -> Path:
    """A trained adapter on the tiny Llama, saved by PEFT alone."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
    )
    model = get_peft_model(tiny_model("llama"), config)
    shake(model, seed)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


# ---- full and freeze ------------------------------------------------------------------------------------------


def test_full_trains_everything() -> None:
    model = tiny_model("llama").requires_grad_(False)
    build_method(FullSpec()).apply(model)
    count = count_parameters(model)
    assert count.trainable == count.total == 2 * LAYER + 2 * VOCAB * HIDDEN + HIDDEN


def test_tied_weights_count_once() -> None:
    model = build_method(FullSpec()).apply(tiny_model("llama-tied"))
    assert count_parameters(model).total == 2 * LAYER + VOCAB * HIDDEN + HIDDEN


@pytest.mark.parametrize(("layers", "expected"), [(1, {1}), (2, {0, 1}), (-1, {0}), (-2, {0, 1})])
def test_freeze_layers(layers: int, expected: set[int]) -> None:
    model = tiny_model("llama")
    build_method(FreezeSpec(layers=layers)).apply(model)
    names = {name for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    assert trained(model) == {name for name in names if int(name.split(".")[2]) in expected}
    assert count_parameters(model).trainable == len(expected) * LAYER


def test_freeze_named_modules() -> None:
    model = tiny_model("llama")
    build_method(FreezeSpec(layers=1, modules=("self_attn", "up_proj"))).apply(model)
    parts = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.up_proj"]
    assert trained(model) == {f"model.layers.1.{part}.weight" for part in parts}
    assert count_parameters(model).trainable == ATTENTION + HIDDEN * INNER


def test_freeze_extra_modules() -> None:
    model = tiny_model("llama")
    build_method(FreezeSpec(layers=0, extra_modules=("lm_head", "norm"))).apply(model)
    assert trained(model) == {"lm_head.weight", "model.norm.weight"}
    assert count_parameters(model).trainable == VOCAB * HIDDEN + HIDDEN


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze_finds_the_layers_of_every_family(family: str) -> None:
    model = tiny_model(family)
    build_method(FreezeSpec(layers=1)).apply(model)
    assert trained(model)
    assert all(".1." in name for name in trained(model))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FreezeSpec(layers=3), "method.layers=3, but the model has only 2 layers"),
        (FreezeSpec(layers=-3), "method.layers=-3, but the model has only 2 layers"),
        (FreezeSpec(layers=0), "trains nothing"),
        (FreezeSpec(modules=("attention",)), r"no module 'attention' in .*self_attn.* or 'all'"),
        (FreezeSpec(extra_modules=("head",)), r"no module 'head' outside the layers.*lm_head"),
        (FreezeSpec(extra_modules=("mlp",)), "no module 'mlp' outside the layers"),
    ],
)
def test_freeze_errors(spec: FreezeSpec, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_method(spec).apply(tiny_model("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_trains_are_each_others_complement(family: str) -> None:
    """What `trains` alone lets train is what `frozen` alone holds still, in every family."""
    pattern = r"\.1\..*(weight|bias|proj)$"
    only, rest = tiny_model(family), tiny_model(family)
    build_method(FreezeSpec(layers=0, trains=(pattern,))).apply(only)
    build_method(FullSpec(frozen=(pattern,))).apply(rest)
    assert trained(only) and trained(only) == {n for n, _ in only.named_parameters() if re.search(pattern, n)}
    assert trained(rest) == {n for n, _ in rest.named_parameters()} - trained(only)


def test_one_matrix_is_frozen_by_either_name() -> None:
    for name in ("lm_head", "embed_tokens"):
        model = tiny_model("llama-tied")
        build_method(FullSpec(frozen=(name,))).apply(model)
        assert not model.get_input_embeddings().weight.requires_grad
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert count_parameters(model).trainable == 2 * LAYER + HIDDEN


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            FullSpec(frozen=("norm", "self_atn")),
            "method.frozen: 'self_atn' is found in no parameter's name; did you mean self_attn? Names are like "
            "model.embed_tokens.weight and lm_head.weight",
        ),
        (
            FreezeSpec(trains=(r"layers\.7\.",)),
            r"method.trains: 'layers\\.7\\.' is found in no parameter's name; names are like "
            "model.embed_tokens.weight and lm_head.weight",
        ),
        (FullSpec(frozen=(".",)), "method.full trains nothing: frozen names every parameter"),
        (
            FreezeSpec(layers=1, frozen=(r"layers\.1",)),
            "method.freeze trains nothing: layers is 0, extra_modules and trains are empty, or frozen names all of them",
        ),
    ],
)
def test_pattern_errors(spec: FullSpec | FreezeSpec, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        build_method(spec).apply(tiny_model("llama"))
    assert str(caught.value) == message


def test_what_starts_as_noise_is_not_frozen() -> None:
    model = tiny_model("llama")
    change = VocabularyChange(added=("<new>",), ids=(VOCAB - 1,), num_before=VOCAB - 1, num_tokens=VOCAB)
    for spec in (FullSpec(frozen=("embed",)), FreezeSpec(frozen=("embed",))):
        with pytest.raises(ModelError) as caught:
            build_method(spec, change).apply(model)
        assert str(caught.value) == (
            "method.frozen holds model.embed_tokens.weight still, and it has rows that are noise until they train; "
            "narrow the pattern"
        )
    build_method(FullSpec(frozen=("mlp",)), change).apply(model)


def test_a_wrong_expression_is_found_in_the_recipe() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            {"model": {"path": "m"}, "data": {"train": ["a"]}, "method": {"type": "full", "frozen": ["("]}}
        )
    assert str(caught.value) == (
        "method.frozen[0]: '(' is no regular expression: missing ), unterminated subpattern at position 0"
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "spec",
    [FreezeSpec(layers=0, trains=(r"layers\.1\.mlp",)), FullSpec(frozen=("embed_tokens", r"layers\.0"))],
    ids=["trains", "frozen"],
)
def test_checkpointing_reaches_what_patterns_let_train(spec: FullSpec | FreezeSpec, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        if checkpointing:
            checkpoint_layers(model, CheckpointingSpec(reentrant=reentrant))
        build_method(spec).apply(model).train()
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize(
    "spec", [FreezeSpec(layers=1), LoraSpec(targets=("q_proj",))], ids=["freeze", "lora"]
)
def test_gradient_checkpointing_reaches_the_parameters(spec: FreezeSpec | LoraSpec) -> None:
    """The same gradients as without it, though the embeddings below are frozen."""
    results = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            assert checkpoints_activations(model)
        torch.manual_seed(0)
        trained_model = build_method(spec).apply(model).train()
        shake(trained_model)
        trained_model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        results.append({n: p.grad for n, p in trained_model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(results[1][name], gradient)


# ---- LoRA -----------------------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> set[str]:
    return {n.split(".lora_A")[0].split("layers.")[-1] for n in trained(model) if ".lora_A" in n}


def test_all_linear() -> None:
    """Every linear layer but the head; rank x (inputs + outputs) parameters each."""
    model = build_method(LoraSpec(rank=4)).apply(tiny_model("llama"))
    names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    names |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert lora_layers(model) == {f"{layer}.{name}" for layer in (0, 1) for name in names}
    each = 2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KV) + 3 * (HIDDEN + INNER)
    count = count_parameters(model)
    assert count.trainable == 2 * 4 * each
    assert count.total - count.trainable == 2 * LAYER + 2 * VOCAB * HIDDEN + HIDDEN


def test_listed_targets() -> None:
    model = build_method(LoraSpec(rank=4, targets=("q_proj", "lm_head"))).apply(tiny_model("llama"))
    assert count_parameters(model).trainable == 4 * (2 * 2 * HIDDEN + HIDDEN + VOCAB)


def test_regular_expression() -> None:
    model = build_method(LoraSpec(targets=r".*layers\.1\..*\.(k|up)_proj")).apply(tiny_model("llama"))
    assert lora_layers(model) == {"1.self_attn.k_proj", "1.mlp.up_proj"}


def test_modules_to_save() -> None:
    model = build_method(LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",))).apply(
        tiny_model("llama")
    )
    assert count_parameters(model).trainable == 4 * 4 * HIDDEN + VOCAB * HIDDEN
    assert any(name.endswith("lm_head.modules_to_save.default.weight") for name in trained(model))


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (12.0, 3.0)])
def test_scale(alpha: float | None, scale: float) -> None:
    model = build_method(LoraSpec(rank=4, alpha=alpha, targets=("q_proj",))).apply(tiny_model("llama"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": scale}
    shake(model)
    low = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + scale * low).T, rtol=1e-4, atol=1e-4)


def test_new_adapter_changes_nothing() -> None:
    assert torch.equal(
        logits(build_method(LoraSpec()).apply(tiny_model("llama"))), logits(tiny_model("llama"))
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(targets=("q_proj", "wq")), r"method\.targets: the model has no module \['wq'\].*q_proj"),
        (LoraSpec(modules_to_save=("head",)), r"method\.modules_to_save: the model has no module \['head'\]"),
        (LoraSpec(targets=r".*\.wq"), r"method\.targets='\.\*"),
        (LoraSpec(adapters=("/nowhere/at/all",)), "method.adapters: /nowhere/at/all: no such folder"),
    ],
)
def test_lora_errors(spec: LoraSpec, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_method(spec).apply(tiny_model("llama"))


def test_folder_without_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        build_method(LoraSpec(adapters=(str(tmp_path),))).apply(tiny_model("llama"))


def test_continued_adapter(tmp_path: Path) -> None:
    """The function is the adapter's from the first step on, and its own weights train."""
    folder = adapter(tmp_path / "a", 1)
    reference = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
    model = build_method(LoraSpec(adapters=(str(folder),))).apply(tiny_model("llama"))
    assert not torch.allclose(logits(reference), logits(tiny_model("llama")), atol=0.1)
    torch.testing.assert_close(logits(model), logits(reference))
    assert lora_layers(model) == {
        f"{k}.{name}" for k in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert all("lora_" in name for name in trained(model))


@pytest.mark.parametrize("create_new", [False, True])
def test_stacked_adapters(create_new: bool, tmp_path: Path) -> None:
    """All but the last are merged; the last is continued, or merged too and a fresh one put on top."""
    folders = [adapter(tmp_path / str(seed), seed) for seed in (1, 2, 3)]
    merged: Any = tiny_model("llama")
    for folder in folders:
        merged = PeftModel.from_pretrained(merged, str(folder)).merge_and_unload()
    spec = LoraSpec(
        adapters=tuple(map(str, folders)), create_new_adapter=create_new, rank=2, targets=("k_proj",)
    )
    model = build_method(spec).apply(tiny_model("llama"))
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-3, atol=1e-3)
    trains = {"self_attn.k_proj"} if create_new else {"self_attn.q_proj", "mlp.down_proj"}
    assert lora_layers(model) == {f"{k}.{name}" for k in (0, 1) for name in trains}
    assert all("lora_" in name for name in trained(model))
    if not create_new:
        last = load_peft_weights(str(folders[-1]))
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert state.keys() == last.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in last.items())


# ---- saving and loading ---------------------------------------------------------------------------------------

SAVED = {
    "full": FullSpec(),
    "freeze": FreezeSpec(layers=1, extra_modules=("norm",)),
    "lora": LoraSpec(rank=4),
    "lora-on-head": LoraSpec(rank=4, targets=("q_proj", "lm_head")),
    "lora-saves-head": LoraSpec(rank=4, targets=("q_proj",), modules_to_save=("lm_head",)),
}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded_is_the_same_function(name: str, family: str, tmp_path: Path) -> None:
    spec = SAVED[name]
    if family == "gpt2":
        spec = {"freeze": FreezeSpec(layers=1, extra_modules=("ln_f",))}.get(name, spec)
        if isinstance(spec, LoraSpec) and not isinstance(spec.targets, str):
            spec = spec.model_copy(update={"targets": ("c_attn", *spec.targets[1:])})
    method = build_method(spec)

    def fresh() -> Any:
        torch.manual_seed(0)
        model = method.apply(tiny_model(family))
        install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
        return model

    before = fresh()
    untrained = logits(before)
    shake(before)
    expected = logits(before)
    assert (expected - untrained).abs().max() > 0.1
    method.save(before, tmp_path)
    other = fresh()
    shake(other, seed=7)  # whatever was there is overwritten
    method.load(other, tmp_path)
    assert torch.equal(logits(other), expected)
    # Someone without Luthier gets the same from the folder.
    if isinstance(spec, LoraSpec):
        plain: Any = PeftModel.from_pretrained(tiny_model(family, "sdpa"), str(tmp_path))
    else:
        plain = type(tiny_model(family)).from_pretrained(tmp_path, attn_implementation="sdpa")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_sharded_model_loads(tmp_path: Path) -> None:
    method = build_method(FullSpec())
    model: PreTrainedModel = method.apply(tiny_model("llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    other = tiny_model("llama", seed=5)
    assert not torch.allclose(logits(other), logits(model))
    method.load(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("spec", [FullSpec(), LoraSpec(rank=4)], ids=["full", "lora"])
def test_empty_folder_is_refused(spec: FullSpec | LoraSpec, tmp_path: Path) -> None:
    method = build_method(spec)
    with pytest.raises(CheckpointError, match=r"holds no (model weights|adapter)"):
        method.load(method.apply(tiny_model("llama")), tmp_path)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    full = build_method(FullSpec())
    full.save(tiny_model("qwen2"), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"does not fit the model.*unexpected.*bias"):
        full.load(tiny_model("llama"), tmp_path / "model")
    narrow, wide = build_method(LoraSpec(targets=("q_proj",))), build_method(LoraSpec())
    narrow.save(narrow.apply(tiny_model("llama")), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not fit the adapter: missing \["):
        wide.load(wide.apply(tiny_model("llama")), tmp_path / "adapter")
    wide.save(wide.apply(tiny_model("llama")), tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"unexpected \["):
        narrow.load(narrow.apply(tiny_model("llama")), tmp_path / "wide")


# ---- groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [FullSpec(), FreezeSpec(layers=1), LoraSpec(modules_to_save=("ln_f",))])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "cohere-scaled", "gemma3-window", "opt"])
def test_groups_equal_transformers(family: str, spec: Any, tmp_path: Path) -> None:
    """The same parameters decay as under transformers' own Trainer."""
    if isinstance(spec, LoraSpec) and family != "gpt2":
        spec = LoraSpec()
    method = build_method(spec)
    model = method.apply(tiny_model(family))
    trainer = Trainer(
        model=copy.copy(model),
        args=TrainingArguments(str(tmp_path), weight_decay=0.2, use_cpu=True, report_to=[]),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def described(groups: list[dict[str, Any]]) -> list[tuple[float, list[str]]]:
        return [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups if g["params"]]

    actual = described(method.parameter_groups(model, 0.2, 1e-3))
    assert actual == described(trainer.create_optimizer().param_groups)
    assert sum(len(group) for _, group in actual) == len(trained(model))
    if isinstance(spec, FullSpec):
        assert [decay for decay, _ in actual] == [0.2, 0.0]
