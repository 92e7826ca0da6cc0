"""Which type every weight has, by precision, dtype and method; and that what is said of them is what a run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import luthier
from luthier.assemble import build_model
from luthier.data.collate import flat_batch
from luthier.material import load_tokens
from luthier.model.load import locate
from luthier.model.logprobs import ModelPolicy
from luthier.optim.build import build_optimizer
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import AdamwSpec, Recipe, SgdSpec
from luthier.types import RecipeError
from tests.tiny import chat_model, random_samples, write_alpaca

CPU = Hardware("cpu", "a processor", 2**33, True, 2)
GPU = Hardware("cuda", "a GPU", 2**36, True, 8)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "lora": {"type": "lora", "rank": 4},
}
LF = "model_name_or_path: {model}\ndo_train: true\ndataset: rows\ntemplate: chatml\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


def recipe_of(folder: Path, method: str, hardware: Hardware = CPU, **settings: Any) -> Recipe:
    tree = {
        "model": {"path": str(folder), **settings.get("model", {})},
        "data": {"train": ["a"]},
        "method": METHODS[method],
        "train": settings.get("train", {}),
    }
    return resolve(load_recipe(tree), hardware).recipe


def types_of(recipe: Recipe) -> tuple[set[torch.dtype], set[torch.dtype], nn.Module]:
    """Types of what trains and of what is frozen; matrices and norms alike."""
    source = locate(recipe.model)
    built, _ = build_model(recipe, source, CPU, load_tokens(recipe, source, lambda text: None)[1])
    types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in built.parameters():
        types[parameter.requires_grad].add(parameter.dtype)
    return types[True], types[False], built


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES: list[tuple[str, dict[str, Any], str, set[Any], set[Any]]] = [
    # precision, model, method, what trains, what is frozen
    *((precision, {}, "full", {F32}, set()) for precision in ("fp32", "bf16", "fp16")),
    *((precision, {}, "freeze", {F32}, {F32}) for precision in ("fp32", "bf16", "fp16")),
    *(
        (precision, {}, "lora", {F32}, {F32}) for precision in ("fp32", "bf16", "fp16")
    ),  # on a CPU; a GPU's is below
    ("bf16", {"dtype": "bfloat16"}, "full", {BF16}, set()),
    ("bf16", {"dtype": "bfloat16"}, "freeze", {BF16}, {BF16}),
    ("bf16", {"dtype": "bfloat16"}, "lora", {F32}, {BF16}),
    ("fp16", {"dtype": "float16"}, "lora", {F32}, {F16}),
    ("bf16", {"dtype": "bfloat16", "upcast_layernorm": True}, "lora", {F32}, {BF16, F32}),
    ("bf16", {"dtype": "bfloat16", "upcast_trained": True}, "full", {F32}, set()),
    ("bf16", {"dtype": "bfloat16", "upcast_trained": True}, "freeze", {F32}, {BF16}),
    ("bf16", {"dtype": "bfloat16", "upcast_trained": True}, "lora", {F32}, {BF16}),
    ("fp16", {"dtype": "float16", "upcast_trained": True}, "freeze", {F32}, {F16}),
]


@pytest.mark.parametrize(("precision", "spec", "method", "trains", "frozen"), CASES)
def test_types(
    precision: str, spec: dict[str, Any], method: str, trains: set[Any], frozen: set[Any], model: Path
) -> None:
    """And one step in that arithmetic gives every trained weight a gradient of its own type, near float32's loss."""
    recipe = recipe_of(model, method, model=spec, train={"precision": precision})
    found_trains, found_frozen, built = types_of(recipe)
    assert (found_trains, found_frozen) == (
        trains,
        {F32} if method == "freeze" and not frozen else frozen or found_frozen,
    )
    if method == "full":
        assert found_frozen == set()
    batch = flat_batch(random_samples([9, 14]))
    dtype = {"fp32": None, "bf16": BF16, "fp16": F16}[precision]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logprobs = ModelPolicy(built.train()).logprobs(batch).logprobs
    assert logprobs.dtype == F32
    (-logprobs.mean()).backward()  # type: ignore[no-untyped-call]
    for parameter in built.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
    exact = types_of(recipe_of(model, method, train={"precision": "fp32"}))[2]
    with torch.no_grad():
        expected = ModelPolicy(exact.eval()).logprobs(batch).logprobs
    torch.testing.assert_close(logprobs.detach(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("method", "precision", "dtype"),
    [
        ("full", "bf16", "float32"),
        ("freeze", "bf16", "float32"),
        ("lora", "bf16", "bfloat16"),
        ("full", "fp16", "float32"),
        ("lora", "fp16", "float16"),
        ("lora", "fp32", "float32"),
    ],
)
def test_the_default_on_a_gpu(method: str, precision: str, dtype: str, model: Path) -> None:
    assert recipe_of(model, method, GPU, train={"precision": precision}).model.dtype == dtype


def test_two_types_need_autocast(model: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(
            model, "freeze", model={"dtype": "bfloat16", "upcast_trained": True}, train={"precision": "fp32"}
        )
    assert str(caught.value) == (
        "model.upcast_trained with model.dtype=bfloat16 makes layers of two types, which only autocast brings together; "
        "give train.precision=bf16 or fp16"
    )


@pytest.mark.parametrize(
    ("text", "trains", "frozen"),
    [
        ("bf16: true\nfinetuning_type: full\n", {F32}, set()),
        ("bf16: true\nfinetuning_type: freeze\nfreeze_trainable_layers: 1\n", {F32}, {F32}),
        ("bf16: true\n", {F32}, {F32}),
        ("pure_bf16: true\nfinetuning_type: full\n", {BF16}, set()),
        ("pure_bf16: true\nfinetuning_type: freeze\nfreeze_trainable_layers: 1\n", {BF16}, {BF16}),
        ("pure_bf16: true\n", {F32}, {BF16}),  # PEFT raises adapters there, too
        ("fp16: true\nfinetuning_type: full\n", {F32}, set()),
        ("finetuning_type: full\n", {F32}, set()),
    ],
)
def test_a_llamafactory_file(
    text: str, trains: set[Any], frozen: set[Any], model: Path, tmp_path: Path
) -> None:
    """Weights that train are float32 as there, unless pure_bf16 is asked for."""
    file = tmp_path / "their.yaml"
    file.write_text(LF.format(model=model) + text)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    found_trains, found_frozen, _ = types_of(resolve(load_recipe(file), CPU).recipe)
    assert (found_trains, found_frozen) == (trains, frozen)


def test_log_probabilities_are_of_float32_logits(model: Path) -> None:
    """What `upcast_lmhead_output` asks for there: a 16-bit head's logits are raised before the softmax."""
    recipe = recipe_of(model, "lora", model={"dtype": "bfloat16"}, train={"precision": "bf16"})
    built: Any = types_of(recipe)[2]
    batch = flat_batch(random_samples([9, 14]))
    inner = built.get_base_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        said = ModelPolicy(built.eval()).logprobs(batch).logprobs
        hidden = (
            built.get_base_model()
            .model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                cu_seq_lens_q=batch.cu_seqlens,
                cu_seq_lens_k=batch.cu_seqlens,
                max_length_q=batch.max_length,
                max_length_k=batch.max_length,
                attention_mask=None,
                use_cache=False,
            )
            .last_hidden_state[0]
        )
        taught = batch.targets != -100
        logits = torch.nn.functional.linear(hidden[taught], inner.lm_head.weight)
    assert logits.dtype == BF16
    exact = logits.float().log_softmax(-1).gather(-1, batch.targets[taught][:, None])[:, 0]
    rounded = logits.log_softmax(-1).float().gather(-1, batch.targets[taught][:, None])[:, 0]
    torch.testing.assert_close(said, exact, rtol=0, atol=1e-6)
    assert float((rounded - exact).abs().max()) > 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_with_frozen_weights_in_16_bits(precision: str, model: Path, tmp_path: Path) -> None:
    """The frozen part is the base's, rounded; the trained part moves by less than bfloat16 could; resume is exact; and
    whoever loads the result has its bits."""
    write_alpaca(tmp_path / "rows.json", 16)
    dtype = {"bf16": BF16, "fp16": F16}[precision]
    recipe = {
        "model": {"path": str(model), "dtype": str(dtype).split(".")[1], "upcast_trained": True},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": METHODS["freeze"],
        "optim": {"type": "adamw", "lr": 1e-5, "schedule": "constant", "warmup": 0},
        "train": {
            "precision": precision,
            "max_steps": 4,
            "save_every": 2,
            "rows_per_device": 2,
            "plots": False,
        },
    }
    base = load_file(model / "model.safetensors")
    weights = {}
    for name in ("straight", "again"):
        output = tmp_path / name
        if name == "again":
            (output / "checkpoint-2").parent.mkdir()
            for file in ("recipe.yaml", "trainer_log.jsonl"):
                (output / file).write_bytes((tmp_path / "straight" / file).read_bytes())
            (tmp_path / "straight" / "checkpoint-2").rename(output / "checkpoint-2")
        luthier.train(recipe, [f"train.output={output}", "train.resume=auto"], quiet=True)
        weights[name] = load_file(output / "model.safetensors")
    for key, weight in weights["straight"].items():
        trained = ".layers.1." in key
        assert weight.dtype == (F32 if trained else dtype)
        assert torch.equal(weights["again"][key], weight), key
        if not trained:
            assert torch.equal(weight, base[key].to(dtype))
    moved = (
        weights["straight"]["model.layers.1.mlp.up_proj.weight"]
        - base["model.layers.1.mlp.up_proj.weight"].to(dtype).float()
    )
    assert 0 < float(moved.abs().max()) < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "straight", dtype="auto")
    key = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(loaded.get_parameter(key), weights["straight"][key])


def test_a_step_in_pure_bfloat16(model: Path, tmp_path: Path) -> None:
    """One SGD step is round(w - round(lr g)); weights below 2^8 updates stay; AdamW's states are bfloat16 too."""
    recipe = recipe_of(model, "full", model={"dtype": "bfloat16"}, train={"precision": "bf16"})
    built = types_of(recipe)[2].train()
    batch = flat_batch(random_samples([9, 14]))

    def backward() -> None:
        built.zero_grad()
        with torch.autocast("cpu", dtype=BF16):
            loss = -ModelPolicy(built).logprobs(batch).logprobs.mean()
        loss.backward()  # type: ignore[no-untyped-call]

    backward()
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    steps = {name: p.grad.float() for name, p in built.named_parameters() if p.grad is not None}
    groups = [{"params": list(built.parameters())}]
    build_optimizer(SgdSpec(lr=2.0**-8), groups, built).step()
    kept = moved = 0
    for name, parameter in built.named_parameters():
        expected = (before[name].float() - 2.0**-8 * steps[name]).to(BF16)
        torch.testing.assert_close(parameter.detach(), expected, rtol=2**-8, atol=0)
        asked = steps[name] != 0
        kept += int((asked & (parameter == before[name])).sum())
        moved += int((asked & (parameter != before[name])).sum())
    assert kept > moved > 0  # what the page says: most of a small step is lost
    backward()
    adamw = build_optimizer(AdamwSpec(lr=1e-3), groups, built)
    adamw.step()
    assert {state["exp_avg"].dtype for state in adamw.state.values()} == {BF16}
