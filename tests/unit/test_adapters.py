"""LoRA's relatives against PEFT and the papers' formulas; adapters of other kinds; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.nn import functional

from luthier.methods import build_method
from luthier.methods.llama_pro import expand
from luthier.methods.lora import lora_layers
from luthier.model.reference import AdaptersOff, StartingPoint
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import (
    FreezeSpec,
    Ia3Spec,
    LlamaProSpec,
    LoraSpec,
    MissSpec,
    OftSpec,
    PeftSpec,
    VeraSpec,
)
from luthier.references import build_reference
from luthier.types import CheckpointError, ModelError, RecipeError
from tests.tiny import FAMILIES, VOCAB, tiny_model
from tests.training import CPU, recipe_of

IDS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def learn(model: nn.Module, steps: int = 3, groups: Any = None, lr: float = 0.05) -> None:
    """Some steps of plain gradient descent on the same rows."""
    optimizer = torch.optim.SGD(groups or [p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---- starting from the weight's factors -----------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_from_factors_trains_as_pefts_does(init: Any, rslora: bool) -> None:
    """PEFT takes the factors off the base; here the base stays and the function is the same, before and after."""
    ours = build_method(LoraSpec(rank=4, init=init, rslora=rslora)).apply(tiny_model("llama")).train()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=rslora,
        init_lora_weights=init,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(tiny_model("llama"), config).train()
    ours_by_name = dict(ours.named_parameters())
    trained = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all(torch.equal(ours_by_name[name], theirs.get_parameter(name)) for name in trained)
    start = logits(ours)
    torch.testing.assert_close(logits(theirs), start, rtol=0, atol=1e-4)
    for model in (ours, theirs):
        learn(model.train())
    assert (logits(ours) - start).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-3)


def test_pissa_takes_the_largest_singular_values() -> None:
    model = build_method(LoraSpec(rank=4, init="pissa", targets=("q_proj",))).apply(tiny_model("llama"))
    for layer in lora_layers(model).values():
        values = torch.linalg.svdvals(layer.base_layer.weight)
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(torch.linalg.svdvals(product)[:4], values[:4], rtol=1e-4, atol=1e-5)
        rest = torch.linalg.svdvals(layer.base_layer.weight - product)
        torch.testing.assert_close(rest[: len(values) - 4], values[4:], rtol=1e-4, atol=1e-4)


def test_the_fast_svd_is_near_the_exact_one() -> None:
    errors = {}
    for iterations in (None, 1, 16):
        torch.manual_seed(0)
        spec = LoraSpec(rank=4, init="pissa", init_iterations=iterations, targets=("q_proj",))
        (layer, *_) = lora_layers(build_method(spec).apply(tiny_model("llama"))).values()
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        errors[iterations] = float((layer.base_layer.weight - product).norm())
    assert errors[None] <= errors[16] * (1 + 1e-5) < errors[1]
    assert errors[16] < 1.01 * errors[None]


def test_what_is_saved_is_a_plain_lora(tmp_path: Path) -> None:
    spec = LoraSpec(rank=4, init="pissa", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6.0})
    method = build_method(spec)
    model = method.apply(tiny_model("llama"))
    shake(model)
    method.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q_proj": 4}, {"q_proj": 12.0})
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    base, plain = (
        tiny_model("llama", "sdpa"),
        PeftModel.from_pretrained(tiny_model("llama", "sdpa"), str(tmp_path)),
    )
    for name, parameter in base.named_parameters():
        stem, _, last = name.rpartition(".")
        wrapped = [f"base_model.model.{stem}.base_layer.{last}", f"base_model.model.{name}"]
        (place,) = [key for key in wrapped if key in dict(plain.named_parameters())]
        assert torch.equal(plain.get_parameter(place), parameter)


def test_a_checkpoint_of_another_rank_is_refused(tmp_path: Path) -> None:
    plain, pissa = build_method(LoraSpec(rank=4)), build_method(LoraSpec(rank=4, init="pissa"))
    plain.save(plain.apply(tiny_model("llama")), tmp_path)
    with pytest.raises(CheckpointError, match=r"has rank 4, and with method\.init it is twice 4"):
        pissa.load(pissa.apply(tiny_model("llama")), tmp_path)


# ---- rates, frozen halves, references -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LoraSpec(rank=4), LoraSpec(rank=4, dora=True)], ids=["lora", "dora"])
def test_lora_plus_groups_equal_pefts(spec: LoraSpec) -> None:
    """Rates of every parameter are those of PEFT's optimizer, from the code of the paper's authors."""
    spec = spec.model_copy(
        update={
            "targets": ("q_proj", "embed_tokens"),
            "lora_plus_ratio": 16.0,
            "lora_plus_embedding_lr": 1e-6,
        }
    )
    method = build_method(spec)
    model = method.apply(tiny_model("llama"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = method.parameter_groups(model, 0.0, 1e-4)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-6
    )
    ours = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    # PEFT gives A of an embedding the embedding's rate too; the paper's code, and this, B alone.
    expected = {
        names[id(p)]: 1e-4 if "embedding_A" in names[id(p)] else group["lr"]
        for group in theirs.param_groups
        for p in group["params"]
    }
    assert ours == pytest.approx(expected)
    assert sorted(set(ours.values())) == pytest.approx([1e-6, 1e-4, 16e-4])
    assert groups[0]["lr"] == 1e-4  # the one that is logged


def test_lora_plus_moves_b_by_its_ratio() -> None:
    moved = {}
    for ratio in (None, 8.0):
        torch.manual_seed(0)
        method = build_method(LoraSpec(rank=4, lora_plus_ratio=ratio))
        model = method.apply(tiny_model("llama"))
        shake(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        learn(model.train(), 1, method.parameter_groups(model, 0.0, 0.01), lr=0.01)
        moved[ratio] = {name: model.get_parameter(name) - value for name, value in before.items()}
    for name, change in moved[None].items():
        factor = 8.0 if ".lora_B." in name else 1.0
        torch.testing.assert_close(moved[8.0][name], factor * change, rtol=1e-3, atol=1e-6)


def test_rates_reach_the_optimizer_of_a_run(tmp_path: Path) -> None:
    from tests.tiny import random_samples
    from tests.training import trainer_of

    method = {"type": "lora", "rank": 4, "lora_plus_ratio": 4.0}
    recipe = recipe_of(
        tmp_path,
        method=method,
        optim={"lr": 1e-3, "schedule": "constant"},
        train={"max_steps": 1, "rows_per_device": 2},
    )
    trainer = trainer_of(recipe, tiny_model("llama"), random_samples([7, 9]))
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 4e-3}


def test_lora_fa_holds_a_still_after_a_reference() -> None:
    """PEFT would let A train once the adapters are on again."""
    model = build_method(LoraSpec(rank=4, freeze_a=True)).apply(tiny_model("llama"))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".lora_B.default" in name for name in trains)
    with AdaptersOff(model).active(model):
        pass
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ({"type": "lora", "init": "pissa", "rank": 4}, AdaptersOff),
        ({"type": "oft", "block_size": 8}, AdaptersOff),
        ({"type": "lora", "bias": "all", "rank": 4}, StartingPoint),
        ({"type": "llama_pro", "blocks": 1}, StartingPoint),
    ],
)
def test_the_reference_is_the_untouched_model(method: dict[str, Any], kind: type, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, method=method, stage={"type": "dpo"})
    model = build_method(recipe.method).apply(tiny_model("qwen2"))
    reference = build_reference(recipe, CPU, model)
    assert type(reference) is kind
    shake(model)
    with reference.active(model) as frozen:
        assert torch.equal(logits(frozen), logits(tiny_model("qwen2")))


def test_base_as_reference_of_an_adapter_with_biases_is_refused(tmp_path: Path) -> None:
    method = build_method(LoraSpec(rank=4, bias="lora_only"))
    method.save(method.apply(tiny_model("qwen2")), tmp_path / "first")
    recipe = recipe_of(
        tmp_path,
        method={"type": "lora", "adapters": [str(tmp_path / "first")]},
        stage={"type": "dpo", "reference": "base"},
    )
    model = build_method(recipe.method).apply(tiny_model("qwen2"))
    with pytest.raises(ModelError, match="changes biases of the base"):
        build_reference(recipe, CPU, model)


# ---- DoRA and fused layers ------------------------------------------------------------------------------------


def test_dora_is_the_papers_formula() -> None:
    model = build_method(LoraSpec(rank=4, dora=True, targets=("q_proj",))).apply(tiny_model("llama"))
    shake(model)
    layer = next(iter(lora_layers(model).values()))
    weight = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    magnitude = layer.lora_magnitude_vector["default"].weight
    x = torch.randn(3, 32)
    expected = functional.linear(x, magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True))
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4, dora=True),
        LoraSpec(rank=4, freeze_a=True),
        LoraSpec(rank=4, dropout=0.3),
        LoraSpec(rank=4, init="pissa", dropout=0.3),
    ],
    ids=["dora", "fa", "dropout", "pissa-dropout"],
)
def test_only_plain_lora_is_fused(spec: LoraSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the fused product was taken")

    monkeypatch.setattr("luthier.methods.fused._LoraProduct.apply", refuse)
    learn(build_method(spec).apply(tiny_model("llama")).train(), 1)
    for plain in (LoraSpec(rank=4), LoraSpec(rank=4, rslora=True), LoraSpec(rank=4, init="pissa")):
        with pytest.raises(AssertionError, match="fused product"):
            learn(build_method(plain).apply(tiny_model("llama")).train(), 1)


# ---- block expansion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_new_blocks_are_the_identity(family: str, blocks: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    expected = logits(model)
    method = build_method(LlamaProSpec(blocks=blocks))
    method.apply(model)
    assert torch.equal(logits(model), expected)
    assert model.config.num_hidden_layers == 2 + blocks
    method.save(model, tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="luthier_segments")
    assert torch.equal(logits(again), expected)
    # An expanded model is not expanded once more where the recipe says so: the same blocks train.
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    build_method(LlamaProSpec(blocks=blocks, expand=False)).apply(again)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == names


def test_generation_with_a_cache_counts_the_new_layers() -> None:
    model = tiny_model("llama", "sdpa")
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS[:1], **options)
    expand(model, 2)
    assert torch.equal(model.generate(IDS[:1], **options), expected)


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"method.blocks=3 does not divide the model's 2 layers; choose from \[1, 2\]"
    ):
        build_method(LlamaProSpec(blocks=3)).apply(tiny_model("llama"))


def test_blocks_that_are_no_identity_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.methods.llama_pro.OUTPUTS", ("o_proj",))
    with pytest.raises(ModelError, match="is not the same function"):
        build_method(LlamaProSpec(blocks=1)).apply(tiny_model("llama"))


def test_freeze_is_not_expanded() -> None:
    model = build_method(FreezeSpec(layers=1)).apply(tiny_model("llama"))
    assert model.config.num_hidden_layers == 2


# ---- other kinds ----------------------------------------------------------------------------------------------

OTHERS = [
    OftSpec(block_size=8),
    VeraSpec(rank=8),
    Ia3Spec(),
    MissSpec(rank=4),
    PeftSpec(config={"peft_type": "loha", "r": 4}),
    PeftSpec(config={"peft_type": "TINYLORA"}),
    PeftSpec(config={"peft_type": "UNILORA"}),
]


@pytest.mark.parametrize(
    "spec", OTHERS, ids=lambda spec: str(getattr(spec, "config", {}).get("peft_type", spec.type))
)
def test_other_kinds_continue_and_stack(spec: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = build_method(spec)
    model = method.apply(tiny_model("llama"))
    shake(model)
    expected = logits(model)
    method.save(model, tmp_path)
    torch.manual_seed(9)
    going_on = build_method(spec.model_copy(update={"adapters": (str(tmp_path),)})).apply(tiny_model("llama"))
    torch.testing.assert_close(logits(going_on), expected, rtol=0, atol=1e-5)
    assert any(p.requires_grad for p in going_on.parameters())
    new = LoraSpec(rank=4, adapters=(str(tmp_path),), create_new_adapter=True)
    stacked = build_method(new).apply(tiny_model("llama"))
    torch.testing.assert_close(logits(stacked), expected, rtol=0, atol=1e-3)
    assert all(".lora_" in name for name, p in stacked.named_parameters() if p.requires_grad)


def test_an_adapter_with_missing_weights_is_found(tmp_path: Path) -> None:
    """Of any kind: PEFT would leave them as they were drawn."""
    from safetensors.torch import load_file, save_file

    method = build_method(OftSpec(block_size=8))
    method.save(method.apply(tiny_model("llama")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit the adapter: missing \["):
        method.load(method.apply(tiny_model("llama")), tmp_path)
    with pytest.raises(ModelError, match="1 of this model's adapted layers have no weights in it"):
        build_method(OftSpec(block_size=8, adapters=(str(tmp_path),))).apply(tiny_model("llama"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHAA"}, r"peft_type='LOHAA' \(did you mean LOHA\?\); choose from"),
        ({"peft_type": "LOHA", "rnak": 4, "r": 4}, r"method.config.rnak is no field of LoHaConfig"),
        (
            {"peft_type": "LOHA", "alpa": 4},
            r"method.config.alpa is no field of LoHaConfig \(did you mean alpha\?\)",
        ),
        ({"peft_type": "LOHA", "inference_mode": True}, "inference_mode is set by the run; remove it"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "learnt tokens before a sequence"),
        ({"peft_type": "LORA"}, "it has a form of its own; write method: {type: lora}"),
        ({"peft_type": "ADALORA"}, "it needs a call after every step"),
        ({"peft_type": "BOFT", "boft_block_size": 0}, "method does not make a BOFTConfig"),
    ],
)
def test_what_peft_does_not_take_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_method(PeftSpec(config=config))


def test_a_recipe_with_an_unknown_field_fails_before_its_data(tmp_path: Path) -> None:
    import luthier

    with pytest.raises(RecipeError, match="did you mean alpha"):
        luthier.train(
            {
                "model": {"path": str(tmp_path / "nowhere")},
                "data": {"train": ["nothing.json"]},
                "method": {"type": "peft", "config": {"peft_type": "LOHA", "alpa": 1}},
                "train": {"output": str(tmp_path / "run")},
            },
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LoraSpec(layers=(2,)), r"method\.layers: no layer 2; the model has 0 to 1"),
        (
            LoraSpec(rank_pattern={"qq_proj": 2}),
            r"method\.rank_pattern: 'qq_proj' is the name of no adapted layer",
        ),
        (
            LoraSpec(init="pissa", rank=40),
            r"method\.init=pissa: the rank is 40, and the weight of .* has at most",
        ),
        (LoraSpec(init="olora", targets=("embed_tokens",)), "takes factors of plain linear weights"),
        (LoraSpec(trainable_tokens=(VOCAB,)), r"method\.trainable_tokens: the model has tokens 0 to 96"),
        (
            LoraSpec(target_parameters=("mlp.nothing",)),
            r"method\.target_parameters: the model has no parameter 'mlp\.nothing'",
        ),
        (OftSpec(block_size=7), r"method\.targets='all-linear'"),
        (MissSpec(rank=640), r"method\.targets='all-linear'.*must be less than or equal to in_features"),
        (OftSpec(targets=("wq",), block_size=8), r"method\.targets: the model has no module \['wq'\]"),
    ],
)
def test_what_a_model_does_not_take_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_method(spec).apply(tiny_model("llama"))


def test_new_tokens_of_a_tied_model_need_lora() -> None:
    vocabulary = VocabularyChange(added=("<a>",), ids=(VOCAB - 1,), num_before=VOCAB - 1, num_tokens=VOCAB)
    with pytest.raises(ModelError, match="only method: lora trains rows of it"):
        build_method(OftSpec(block_size=8), vocabulary).apply(tiny_model("llama-tied"))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"init": "pissa", "dora": True}, "both take the weight apart"),
        ({"init_iterations": 3}, "init_iterations belongs to init: pissa"),
        ({"init": "orthogonal", "rank": 3}, "give an even rank"),
        ({"lora_plus_embedding_lr": 1e-6}, "belongs to lora_plus_ratio"),
        ({"layers_pattern": "h"}, "layers is empty"),
        ({"layers": [1], "targets": ".*q_proj"}, "an expression names its layers itself"),
        ({"init": "gaussian", "target_parameters": ["x"]}, "takes init: default alone"),
        ({"dora": True, "adapters": ["a"]}, "dora is chosen when an adapter is made"),
        ({"type": "oft", "blocks": 4}, "set the other to 0"),
        ({"type": "ia3", "targets": ["k_proj"]}, "give targets and feedforward together"),
        ({"type": "peft", "config": {"r": 4}}, "config needs peft_type"),
    ],
)
def test_fields_that_do_not_go_together(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe({"model": {"path": "m"}, "data": {"train": ["a"]}, "method": {"type": "lora", **method}})
