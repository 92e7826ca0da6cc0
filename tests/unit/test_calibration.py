"""LoRA that starts from the run's own rows: EVA and CorDA against PEFT and the papers' formulas, in both layouts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from torch import Tensor

from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.methods.lora import Lora, lora_layers
from luthier.model.calibration import Calibration
from luthier.model.logprobs import install_target_forward
from luthier.model.rows import FLAT, Rows
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.schema import LoraSpec
from luthier.types import Batch, ModelError, Sample
from tests.tiny import random_samples, tiny_model

LENGTHS = [9, 14, 7, 11, 8, 12]
SAMPLES = random_samples(LENGTHS, seed=3)


def passes(samples: list[Sample], size: int) -> list[Batch]:
    return [flat_batch(samples[start : start + size]) for start in range(0, len(samples), size)]


def calibration(batches: list[Batch], said: list[str] | None = None) -> Calibration:
    say = (lambda text: None) if said is None else said.append
    return Calibration(batches, torch.device("cpu"), False, None, "method.init", say)


def calibrated(spec: LoraSpec, batches: list[Batch], rows: Rows = FLAT, family: str = "llama") -> PeftModel:
    method = build_method(spec)
    model = method.apply(tiny_model(family, "sdpa" if rows.padded else "luthier_segments"))
    install_target_forward(model.get_base_model(), rows)
    method.calibrate(model, calibration(batches))
    assert isinstance(model, PeftModel)
    return model


def dense(samples: list[Sample]) -> dict[str, Tensor]:
    """The rows beside each other, padded, as plain PEFT takes them."""
    width = max(len(sample) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.from_numpy(sample.input_ids).long()
        mask[row, : len(sample)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def matrices(model: PeftModel) -> dict[str, Tensor]:
    """s B A of every layer: what signs of directions cancel in."""
    return {
        name: layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in lora_layers(model).items()
    }


def directions(model: PeftModel) -> dict[str, Tensor]:
    """A^T A of every layer."""
    return {
        name: layer.lora_A["default"].weight.T @ layer.lora_A["default"].weight
        for name, layer in lora_layers(model).items()
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol * float(value.detach().abs().max()))


# ---- EVA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_is_pefts(rho: float) -> None:
    ours = calibrated(LoraSpec(rank=4, init="eva", eva_rho=rho), passes(SAMPLES, 3))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        init_lora_weights="eva",
        task_type="CAUSAL_LM",
        eva_config=EvaConfig(rho=rho),
    )
    theirs: Any = get_peft_model(tiny_model("llama", "sdpa"), config)
    rows = [dense(SAMPLES[:3]), dense(SAMPLES[3:])]
    initialize_lora_eva_weights(theirs, rows, show_progress_bar=False)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].alpha_pattern == theirs.peft_config["default"].alpha_pattern
    assert bool(ours.peft_config["default"].rank_pattern) is (rho > 1)
    assert_close(directions(ours), directions(theirs), 1e-3)
    for layer in lora_layers(ours).values():
        assert not layer.lora_B["default"].weight.any()
        assert layer.scaling["default"] == 2.0  # whatever the rank
    assert ours.peft_config["default"].init_lora_weights is True  # a plain LoRA, wherever it is loaded


def test_eva_takes_the_directions_in_which_the_inputs_spread() -> None:
    """On one pass: the largest right singular vectors of the centred inputs of a layer."""
    model = calibrated(LoraSpec(rank=4, init="eva", eva_rho=1.0), passes(SAMPLES, 6))
    for name, inputs_TI in inputs_of_layers(model).items():
        assert inputs_TI.shape[0] == sum(LENGTHS)
        vectors = torch.linalg.svd(inputs_TI - inputs_TI.mean(0), full_matrices=False).Vh[:4]
        expected, found = vectors.T @ vectors, directions(model)[name]
        # PEFT's SVD is a randomised one.
        assert float((found * expected).sum()) > 4 * 0.98, name


@pytest.mark.parametrize("init", ["eva", "corda"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_looked_at(init: Any, side: Any) -> None:
    spec = LoraSpec(rank=4, init=init)
    flat = calibrated(spec, passes(SAMPLES, 3))
    padded = calibrated(spec, passes(SAMPLES, 3), Rows(padded=True, side=side))
    if init == "eva":
        assert flat.peft_config["default"].rank_pattern == padded.peft_config["default"].rank_pattern
        assert_close(directions(padded), directions(flat), 1e-3)
    else:
        assert_close(matrices(padded), matrices(flat), 1e-3)


def test_the_ranks_of_a_16_bit_base_stay_in_the_type_of_the_adapter() -> None:
    method = build_method(LoraSpec(rank=4, init="eva", eva_rho=2.0))
    model = method.apply(tiny_model("llama").to(torch.bfloat16))
    install_target_forward(model.get_base_model())
    method.calibrate(model, calibration(passes(SAMPLES, 6)))
    assert model.peft_config["default"].rank_pattern
    types = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert types == {torch.float32}


def test_too_few_tokens_and_too_high_ranks_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"looks for 16 directions, and the rows that it is shown have 9 tokens"
    ):
        calibrated(LoraSpec(rank=8, init="eva"), passes(SAMPLES[:1], 1))
    with pytest.raises(ModelError, match=r"has 32 inputs, and may be given a rank of 40 \(method.rank times"):
        calibrated(LoraSpec(rank=20, init="eva"), passes(SAMPLES, 6))
    with pytest.raises(
        ModelError, match=r"method.init=corda: the rank is 20, and the weight of .* at most 16"
    ):
        calibrated(LoraSpec(rank=20, init="corda"), passes(SAMPLES, 6))
    with pytest.raises(
        ModelError, match=r"method.init=eva looks at the inputs of linear layers, and .*embed_tokens"
    ):
        calibrated(LoraSpec(rank=4, init="eva", targets=("q_proj", "embed_tokens")), passes(SAMPLES, 6))


def test_directions_that_never_stand_still_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT goes through the rows for ever: the inputs here are drawn anew in every pass."""
    generator = torch.Generator().manual_seed(0)

    def drawn(inputs: Tensor, batch: Batch, model: Any) -> Tensor:
        return torch.randn(24, inputs.shape[-1], generator=generator)

    monkeypatch.setattr("luthier.methods.lora_data.real_inputs", drawn)
    monkeypatch.setattr("luthier.methods.lora_data._MOST_ROUNDS", 3)
    with pytest.raises(
        ModelError, match=r"after 3 rounds over 61 tokens the directions of some layer still turn"
    ):
        calibrated(LoraSpec(rank=4, init="eva", eva_tau=0.999999), passes(SAMPLES, 3))


def test_new_tokens_and_eva_are_refused() -> None:
    method = build_method(LoraSpec(rank=4, init="eva"), VocabularyChange(added=("a",), ids=(96,)))
    with pytest.raises(ModelError, match=r"method.init=eva does not go with new tokens"):
        method.apply(tiny_model("llama"))


# ---- CorDA ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pefts_corda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PEFT's module for CorDA, which asks the package attrs for what `dataclasses` has too."""
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))  # type: ignore[arg-type]
    import peft.tuners.lora.corda as module

    yield module
    sys.modules.pop("peft.tuners.lora.corda")


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_corda_is_pefts(mode: Any, family: str, pefts_corda: Any) -> None:
    """PEFT sees the rows one by one, without padding; the factors and the function are the same."""
    ours = calibrated(LoraSpec(rank=4, init="corda", corda_mode=mode), passes(SAMPLES, 3), family=family)
    bare = tiny_model(family, "sdpa")
    names = sorted({name.rsplit(".", 1)[-1] for name in lora_layers(ours)})
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=names,
        init_lora_weights="corda",
        task_type="CAUSAL_LM",
        corda_config=CordaConfig(corda_method=mode),
    )

    def run() -> None:
        for sample in SAMPLES:
            bare(**dense([sample]))

    pefts_corda.preprocess_corda(bare, config, run_model=run)
    theirs = get_peft_model(bare, config)
    assert_close(matrices(ours), matrices(theirs), 2e-3)
    inputs = dense(SAMPLES)
    with torch.no_grad():
        expected = tiny_model(family, "sdpa").eval()(**inputs).logits
        for model in (ours, theirs):
            found = model.eval()(**inputs).logits
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-3)


def inputs_of_layers(model: PeftModel) -> dict[str, Tensor]:
    """(T, I) what each adapted layer is given on the samples."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0][0]}))
        for name, layer in lora_layers(model).items()
    ]
    calibration([]).forward(model, passes(SAMPLES, 6)[0])
    for handle in handles:
        handle.remove()
    return seen


def test_the_two_modes_start_from_opposite_ends() -> None:
    """What the adapter starts from weighs most, or least, on the run's own inputs."""
    sizes = {}
    for mode in ("ipm", "kpm"):
        spec = LoraSpec(rank=4, init="corda", corda_mode=mode, targets=("q_proj",))  # type: ignore[arg-type]
        model = calibrated(spec, passes(SAMPLES, 6))
        products = matrices(model)
        sizes[mode] = {
            name: float((inputs @ products[name].T).norm())
            for name, inputs in inputs_of_layers(model).items()
        }
    assert all(sizes["ipm"][name] > 3 * sizes["kpm"][name] for name in sizes["ipm"])


# ---- what goes together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eva_rho": 1.5}, "eva_rho belongs to init: eva"),
        ({"init": "eva", "corda_mode": "kpm"}, "corda_mode belongs to init: corda"),
        ({"init": "pissa", "calibration_samples": 8}, "calibration_samples belongs to init: eva and corda"),
        ({"init": "corda", "dora": True}, "init: corda and dora both take the weight apart"),
        ({"init": "loftq", "dora": True}, "init: loftq and dora"),
        ({"init": "eva", "trainable_tokens": (5,)}, "trainable_tokens are none"),
        ({"init": "eva", "adapters": ("x",)}, "init is chosen when an adapter is made"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSpec(**fields)


def test_dora_and_eva_go_together() -> None:
    model = calibrated(LoraSpec(rank=4, init="eva", dora=True), passes(SAMPLES, 6))
    layer: Any
    for layer in lora_layers(model).values():
        torch.testing.assert_close(
            layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1)
        )


def test_a_continued_adapter_looks_at_nothing() -> None:
    fresh = Lora(LoraSpec(init="eva"), VocabularyChange())
    assert fresh.num_calibration_samples == 256 and not fresh.needs_original_weights
    assert Lora(LoraSpec(adapters=("x",)), VocabularyChange()).num_calibration_samples == 0
    assert Lora(LoraSpec(init="pissa"), VocabularyChange()).num_calibration_samples == 0
