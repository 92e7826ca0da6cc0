"""Quantized layers: what they compute with is what they say, and adapters on them learn as on the same plain weights."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from luthier.methods.fused import fuse_lora
from luthier.methods.groups import count_parameters
from luthier.model import quantization_support, quantize
from luthier.model.load import load_model, locate
from luthier.model.norms import _Float32Norm
from luthier.model.probes import coarsest
from luthier.model.quantize import checkpoint_method, loading_arguments
from luthier.model.quantized_layers import (
    dequantized,
    looked_up,
    measured,
    num_weights,
    quantized_layers,
    stored_bytes,
)
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import ModelSpec, QuantizationSpec
from luthier.types import ModelError, RecipeError
from tiny import chat_model

LINEAR = 14
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of whole blocks of 64 weights."""


def needs(library: str, **spec: object) -> Any:
    absent = util.find_spec(library) is None
    mark = pytest.mark.skipif(absent, reason=f"{library} is not installed")
    return pytest.param(spec, marks=mark, id="-".join(map(str, spec.values())))


# bitsandbytes comes with the tests.
NF4 = {"type": "bitsandbytes", "bits": 4}
INT8 = {"type": "bitsandbytes", "bits": 8}
KINDS = [
    pytest.param(NF4, id="nf4"),
    pytest.param({**NF4, "double": False}, id="nf4-single"),
    pytest.param({**NF4, "quant_type": "fp4"}, id="fp4"),
    pytest.param(INT8, id="int8"),
    needs("torchao", type="torchao", name="int8_weight_only"),
    needs("torchao", type="torchao", name="float8_weight_only"),
    *[needs("hqq", type="hqq", bits=bits, group_size=16) for bits in (8, 6, 5, 4, 3, 2, 1)],
    needs("hqq", type="hqq", bits=4, group_size=16, axis=0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"), "qwen2", **SIZES)  # its projections have biases


def loaded(folder: Path, quantization: dict[str, Any] | None, **changes: Any) -> PreTrainedModel:
    spec = ModelSpec.model_validate(
        {
            "path": str(folder),
            "dtype": "float32",
            "attention": "sdpa",
            "quantization": quantization,
            **changes,
        }
    )
    return load_model(spec, locate(spec), torch.device("cpu"), own_attention=True)


def plain_copy(folder: Path, model: nn.Module) -> PreTrainedModel:
    """The plain model with the weights that the quantized one computes with."""
    plain = loaded(folder, None)
    with torch.no_grad():
        for name, module in quantized_layers(model).items():
            plain.get_submodule(name).weight.copy_(dequantized(module))  # type: ignore[operator, union-attr]
    return plain


def adapted(model: PreTrainedModel) -> PeftModel:
    """LoRA with a B that is not zero, the same for every base."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    found = get_peft_model(model, config)
    assert isinstance(found, PeftModel)
    with torch.no_grad():
        for name, parameter in sorted(found.named_parameters()):
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return found


IDS = torch.tensor([[5, 9, 70, 33, 8, 101, 4, 60, 12]])


def learnt(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient for each weight of the adapter."""
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", KINDS)
def test_loss_and_gradients_are_those_on_the_dequantized_weights(folder: Path, spec: dict[str, Any]) -> None:
    model = loaded(folder, spec)
    assert len(quantized_layers(model)) == LINEAR
    name, layer = next(iter(quantized_layers(model).items()))
    original = loaded(folder, None).get_submodule(name).weight
    assert isinstance(original, Tensor)
    moved = (dequantized(layer) - original).norm() / original.norm()
    bits = spec.get("bits", 8)
    # Of normal weights, 16 to 64 to a scale: 8 bits err by up to 4 %, 4 bits by up to 13 %, 1 bit by most of them.
    assert 0 < moved < (0.04 if bits == 8 else 0.13 if bits >= 4 else 1.0)
    plain = adapted(plain_copy(folder, model))
    loss, gradients = learnt(adapted(model))
    expected, others = learnt(plain)
    assert len(gradients) == 2 * LINEAR and gradients.keys() == others.keys()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[key], rtol=2e-4, atol=2e-6, msg=key)


@pytest.mark.parametrize("spec", KINDS)
def test_head_embeddings_and_norms_stay_plain_and_nothing_trains(folder: Path, spec: dict[str, Any]) -> None:
    model, plain = loaded(folder, spec), loaded(folder, None)
    layers = quantized_layers(model)
    assert not [name for name in layers if "lm_head" in name or "embed" in name]
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("spec", KINDS)
def test_evaluating_does_not_change_what_trains(folder: Path, spec: dict[str, Any]) -> None:
    """On a CPU with bfloat16 kernels bitsandbytes would repack the weights in the first evaluation."""
    model = loaded(folder, spec).train()
    before = model(IDS).logits
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
    assert torch.equal(evaluated, before)
    after = adapted(model.train())
    assert torch.equal(after.get_base_model().lm_head.weight, model.lm_head.weight)  # type: ignore[union-attr]
    with after.disable_adapter():
        assert torch.equal(after(IDS).logits, before)
    _, gradients = learnt(after)
    assert len(gradients) == 2 * LINEAR


def test_the_repacking_is_what_that_test_sees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("this CPU has no bfloat16 kernels, so bitsandbytes repacks nothing")
    model = loaded(folder, {**NF4})
    layer = next(iter(quantized_layers(model).values()))
    x = torch.randn(3, 64)
    before = layer.train()(x)
    layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    with torch.no_grad():
        assert not torch.equal(layer.eval()(x), before)


def test_weights_that_the_library_expands_wrongly_are_refused(tmp_path: Path) -> None:
    """Rows of 32 weights, two to a scale."""
    short = chat_model(tmp_path / "m")
    with pytest.raises(
        ModelError, match=r"4-bit weights of model\.layers\.0\.self_attn\.q_proj \(32 x 32\) to other"
    ):
        loaded(short, NF4)
    assert len(quantized_layers(loaded(short, INT8))) == LINEAR


@pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_layer_that_gradients_do_not_pass_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.TORCHAO_CONFIGS, "int8_weight_only", "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ModelError, match=r"no gradient passes through model\.layers\.0.*\(Int8Tensor\)"):
        loaded(folder, {"type": "torchao"})


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_4_bit_weights_are_the_nearest_of_sixteen(folder: Path, kind: str, double: bool) -> None:
    model = loaded(folder, {**NF4, "quant_type": kind, "double": double})
    name, layer = next(iter(quantized_layers(model).items()))
    original: Any = loaded(folder, None).get_submodule(name).weight
    assert torch.equal(looked_up(layer), dequantized(layer))
    blocks = original.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    code: Any = layer.weight.quant_state.code  # type: ignore[union-attr]
    nearest = code[((blocks / scales)[..., None] - code).abs().argmin(-1)] * scales
    # Scales that are quantized too err by 1 / 254 of the largest of 256 of them.
    torch.testing.assert_close(
        dequantized(layer), nearest.reshape(original.shape), rtol=0.02 * double, atol=1e-8
    )


@pytest.mark.parametrize(
    ("spec", "bytes_each"),
    [
        # a float32 scale for 64 weights; twice quantized: a byte for 64 and a float32 for 256 of these
        ({**NF4, "double": False}, 0.5 + 4 / 64),
        (NF4, 0.5 + 1 / 64 + 4 / (64 * 256)),
        (INT8, 1 + 4 / 128),
    ],
    ids=["nf4", "nf4-double", "int8"],
)
def test_bytes_and_weights_are_counted(tmp_path: Path, spec: dict[str, Any], bytes_each: float) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 32}
    folder = chat_model(tmp_path / "m", "llama", **sizes, num_key_value_heads=4)
    plain, model = loaded(folder, None), loaded(folder, spec)
    inside = LINEAR * 128 * 128
    total = sum(parameter.numel() for parameter in plain.parameters())
    found = measured(model)
    assert found is not None and (found.layers, found.weights, found.total) == (LINEAR, inside, total)
    assert num_weights(model) == total == count_parameters(model).total
    rest = stored_bytes(plain) - 4 * inside
    assert stored_bytes(model) - rest == pytest.approx(bytes_each * inside, rel=0.01)
    assert measured(plain) is None


def test_skipped_modules_and_the_head_stay_plain(folder: Path) -> None:
    names = quantized_layers(loaded(folder, {**NF4, "skip_modules": ["down_proj", "o_proj"]}))
    assert len(names) == LINEAR - 4
    assert not [name for name in names if name.endswith(("down_proj", "o_proj", "lm_head"))]


def test_tied_embeddings_stay_plain(tmp_path: Path) -> None:
    model = loaded(chat_model(tmp_path / "m", "llama-tied", **SIZES), NF4)
    assert len(quantized_layers(model)) == LINEAR
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


def test_norms_of_a_16_bit_base_are_float32_and_nothing_else_is(folder: Path) -> None:
    model = loaded(folder, NF4, dtype="bfloat16")
    norms = [module for module in model.modules() if isinstance(module, _Float32Norm)]
    assert len(norms) == 5 and {module.weight.dtype for module in norms} == {torch.float32}  # type: ignore[attr-defined]
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("spec", KINDS)
def test_no_quantized_layer_is_fused(folder: Path, spec: dict[str, Any]) -> None:
    model = adapted(loaded(folder, spec))
    assert fuse_lora(model) == 0
    assert not [module for module in model.modules() if type(module) is PeftLinear]
    half = adapted(loaded(folder, {**spec, "skip_modules": ["o_proj"]}))
    assert fuse_lora(half) == 2  # what stays plain keeps the fast path


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({**NF4, "compute_dtype": "float32"}, torch.float32),
        ({**NF4, "compute_dtype": "bfloat16"}, torch.bfloat16),
        (INT8, torch.float32),
    ],
)
def test_the_self_test_knows_what_layers_compute_in(
    folder: Path, spec: dict[str, Any], kind: torch.dtype
) -> None:
    assert coarsest(loaded(folder, spec), torch.float32) == kind
    assert coarsest(loaded(folder, None), torch.float32) == torch.float32


# --------------------------------------------------------------------------------------------------
# What works here


def test_env_tries_every_way_and_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    found = quantization_support.tried(cpu)
    assert found.keys() == quantization_support.TRIED.keys()
    for name, state in found.items():
        library = name.split(",")[0]
        if util.find_spec(library) is None:
            assert state == f"pip install 'luthier[{library}]'"
        else:
            assert state == "works"
    monkeypatch.setattr(quantization_support, "SIZE", 32)  # two rows to a scale
    assert quantization_support.tried(cpu)["bitsandbytes, 4 bits nf4"] == (
        "does not work here: it computes with other weights than it stores"
    )
    monkeypatch.setattr(quantization_support, "is_installed", lambda module: False)
    assert set(quantization_support.tried(cpu).values()) == set(quantization_support.INSTALL.values())
    assert quantization_support.files()["awq"] == "pip install gptqmodel"


def test_env_does_not_run_again_what_worked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, file = torch.device("cpu"), tmp_path / "cache" / "quantization.json"
    first, day = quantization_support.recalled(cpu, file)
    assert first == quantization_support.tried(cpu) and day is None
    tries: list[str] = []

    def counted(library: str, build: Any, device: torch.device) -> str:
        tries.append(library)
        return "does not work here: broken"

    monkeypatch.setattr(quantization_support, "_try", counted)
    again, day = quantization_support.recalled(cpu, file)
    assert again == {
        name: state if state == "works" else "does not work here: broken" for name, state in first.items()
    }
    assert tries == [name.split(",")[0] for name, state in first.items() if state != "works"]
    assert day == datetime.date.today().isoformat()
    # What does not work is tried each time; so is everything with other versions, or where the file is damaged.
    others = {"version": lambda name: "0.0.1"}
    for change in ("versions", "damaged", "gone"):
        tries.clear()
        with monkeypatch.context() as patched:
            if change == "versions":
                patched.setattr(quantization_support.metadata, "version", others["version"])
            else:
                file.write_text("{" if change == "damaged" else '{"works": 3}')
            found, day = quantization_support.recalled(cpu, file)
        assert len(tries) == len(first) and day is None
        assert set(found.values()) == {"does not work here: broken"}


def test_env_recalls_without_importing_the_libraries(tmp_path: Path) -> None:
    code = (
        "import sys; from luthier.environment import report; text = report(); "
        "print(sorted({'bitsandbytes', 'torchao', 'hqq'} & sys.modules.keys())); print('recalled from' in text); "
        "print(text[text.index('model.quantization'):].split(os.linesep, 1)[-1])"
    ).replace("import sys;", "import os, sys;")
    environment = os.environ | {"LUTHIER_CACHE": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    told = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        .stdout.splitlines()
        for _ in range(2)
    ]  # fmt: skip
    installed = sorted(name for name in ("bitsandbytes", "hqq", "torchao") if util.find_spec(name))
    assert told[0][:2] == [str(installed), "False"] and told[1][:2] == ["[]", "True"]
    assert told[0][2:] == told[1][2:] and any(line.endswith("works") for line in told[1])


@pytest.mark.skipif(util.find_spec("torchao") is None, reason="torchao is not installed")
def test_env_says_where_no_gradient_passes() -> None:
    build = quantization_support._torchao("Int8DynamicActivationInt8WeightConfig")
    state = quantization_support._try("torchao", build, torch.device("cpu"))
    assert state == "no gradient passes through it here"


# --------------------------------------------------------------------------------------------------
# What is refused


def test_a_library_that_is_missing_is_named_with_its_install_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "is_installed", lambda module: False)
    with pytest.raises(ModelError, match=r"needs the package hqq.*: pip install 'luthier\[hqq\]'"):
        loaded(folder, {"type": "hqq"})
    with pytest.raises(
        ModelError, match=r"needs the package bitsandbytes.*pip install 'luthier\[bitsandbytes\]'"
    ):
        loaded(folder, NF4)


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "compressed-tensors", "quanto"])
def test_quantized_files_are_recognised(method: str) -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": method, "bits": 4}
    assert checkpoint_method(config) == method
    known = quantize.CHECKPOINTS[method]
    if any(util.find_spec(name.split(".")[0]) is None for name in known.modules):
        with pytest.raises(
            ModelError, match=f"m: its files are quantized with {method}, and .* is not installed: pip"
        ):
            loading_arguments(None, config, torch.device("cpu"), torch.float32, "m", nn.Module)
    spec: Any = TypeAdapter(QuantizationSpec).validate_python(NF4)
    with pytest.raises(ModelError, match=rf"quantized already \({method}\)"):
        loading_arguments(spec, config, torch.device("cpu"), torch.float32, "m", nn.Module)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_files_without_a_backward_pass_are_expanded(method: str) -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": method}
    found = loading_arguments(None, config, torch.device("cpu"), torch.bfloat16, "m", nn.Module)
    assert found["quantization_config"].dequantize is True
    assert found["quantization_config"].quant_method == method


def test_files_of_an_unknown_kind_are_refused() -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = {"quant_method": "eetq"}
    with pytest.raises(ModelError, match=r"m: its files are quantized with eetq, which adapters cannot"):
        loading_arguments(None, config, torch.device("cpu"), torch.float32, "m", nn.Module)


@pytest.mark.skipif(util.find_spec("hqq") is None, reason="hqq is not installed")
def test_groups_that_do_not_fit_are_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"group_size=48 does not divide the 64 inputs of model\.layers\.0"):
        loaded(folder, {"type": "hqq", "group_size": 48})


BASE: dict[str, Any] = {"model": {"path": "m", "quantization": NF4}, "data": {"train": ["a"]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"type": "full"}}, "rounded weights cannot train, and method: full"),
        ({"method": {"type": "freeze"}}, "rounded weights cannot train, and method: freeze"),
        ({"method": {"type": "lora", "adapters": ["a", "b"]}}, "name one adapter"),
        ({"method": {"type": "lora", "adapters": ["a"], "create_new_adapter": True}}, "name one adapter"),
        ({"stage": {"type": "dpo", "reference": {"quantization": NF4}}}, "give reference.path too"),
        (
            {
                "stage": {
                    "type": "dpo",
                    "reference": {"path": "r", "adapters": ["a", "b"], "quantization": NF4},
                }
            },
            "one adapter at most goes on a quantized reference",
        ),
        (
            {"model": {"path": "m", "quantization": {**INT8, "double": False}}},
            "double belongs to bits: 4, not to 8",
        ),
        (
            {"model": {"path": "m", "quantization": {**NF4, "outlier_threshold": 0}}},
            "belongs to bits: 8, not to 4",
        ),
        ({"model": {"path": "m", "quantization": {"type": "bitsandbytes", "bits": 3}}}, "bits"),
    ],
)
def test_what_a_recipe_cannot_ask_for(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(BASE | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_products_are_computed_in_the_precision_of_training(precision: str, kind: str) -> None:
    machine = Hardware("cuda", "GPU", 2**34, True, 4)
    recipe = resolve(load_recipe(BASE | {"train": {"precision": precision}}), machine).recipe
    assert recipe.model.quantization.compute_dtype == kind  # type: ignore[union-attr]
    named = {**BASE, "model": {"path": "m", "quantization": {**NF4, "compute_dtype": "float32"}}}
    kept = resolve(load_recipe(named | {"train": {"precision": precision}}), machine).recipe
    assert kept.model.quantization.compute_dtype == "float32"  # type: ignore[union-attr]
    eight = {**BASE, "model": {"path": "m", "quantization": INT8}}
    assert (
        load_recipe(resolve(load_recipe(eight), machine).recipe.model_dump()).recipe.model.quantization
        is not None
    )
