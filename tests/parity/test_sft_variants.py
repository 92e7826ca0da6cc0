"""dft, asft and eaft against whole logits in float64, and against numbers that LLaMA-Factory computed.

`data/sft_variants.json`: LLaMA-Factory 0.9.5 (torch 2.13.0 on CPU, float32), its `dft_loss_func`, `asft_loss_func` and
`eaft_loss_func` called on the logits, reference logits and labels in the file; `value` is the loss, `gradient` that of
the loss with respect to the logits, `option` is `asft_alpha` or `eaft_alpha`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions
from luthier.model import kernel
from luthier.model.kernel import Anchor, token_logprobs
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import AdaptersOff, OtherModel, Reference, StartingPoint
from luthier.model.rows import Rows
from luthier.recipe.schema import SftSpec
from luthier.stages import build_stage
from luthier.types import IGNORE_INDEX, Batch, LossSum, ModelError, Sample, TokenLogprobs
from tests.reference import METHODS, assert_same_gradients, flat_and_dense, gradients, padded_rows
from tests.tiny import VOCAB, random_samples, tiny_model

LENGTHS = (23, 41, 9, 1, 37)
SPECS = {
    "dft": SftSpec(loss="dft"),
    "asft": SftSpec(loss="asft", kl_weight=0.7),
    "eaft": SftSpec(loss="eaft", entropy_power=1.0),
    "eaft-root": SftSpec(loss="eaft", entropy_power=0.5),
}
FAMILIES = ("llama", "llama-tied", "gemma2-softcap", "granite-scaled")


def loss_of(spec: SftSpec, policy: Any, batch: Batch) -> LossSum:
    stage = build_stage(spec, EncodeOptions(max_length=64, overflow="drop"))
    assert stage.needs_reference == (spec.loss == "asft")
    assert stage.is_likelihood
    loss = stage.loss(policy, batch, {})
    assert list(loss.terms) == ["loss"]
    assert torch.equal(loss.terms["loss"].weight, stage.weight(batch)["loss"])
    return loss


def mean(loss: LossSum) -> Tensor:
    return loss.terms["loss"].total / loss.terms["loss"].weight


def metric(loss: LossSum, name: str) -> float:
    term = loss.metrics[name]
    assert not term.total.requires_grad
    return float(term.total / term.weight)


# ---- the whole table ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dense:
    """Log-probabilities (N, V) float64 of the supervised positions, their targets and weights."""

    table: Tensor
    targets: Tensor
    weights: Tensor


def dense_of(model: nn.Module, samples: Sequence[Sample]) -> Dense:
    """From the logits of transformers' own padded forward pass."""
    ids, mask, _ = padded_rows(samples)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double()
    places = [
        (row, column) for row, s in enumerate(samples) for column in range(1, len(s)) if s.weights[column] > 0
    ]
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    weights = torch.tensor([float(samples[row].weights[column]) for row, column in places])
    return Dense(logits[rows, columns - 1].log_softmax(-1), ids[rows, columns], weights.double())


def closed_form(spec: SftSpec, policy: Dense, reference: Dense | None) -> tuple[Tensor, dict[str, float]]:
    """The loss and its metrics, written down from the papers."""
    logprobs = policy.table.gather(1, policy.targets[:, None])[:, 0]

    def average(values: Tensor) -> Tensor:
        return (policy.weights * values).sum() / policy.weights.sum()

    metrics = {"nll": float(-average(logprobs.detach()))}
    if spec.loss == "eaft":
        top = policy.table.detach().sort(dim=-1, descending=True).values[:, :20].softmax(-1)
        entropy = -(top * top.log()).sum(-1)
        return average((entropy / 3) ** spec.entropy_power * -logprobs), metrics
    loss = average(logprobs.detach().exp() * -logprobs)
    if spec.loss == "asft":
        assert reference is not None
        q = reference.table.detach()
        kl = average((q.exp() * (q - policy.table)).sum(-1))
        metrics["kl"] = float(kl.detach())
        loss = loss + spec.kl_weight * kl
    return loss, metrics


def shift(model: nn.Module) -> None:
    """Move what trains, by the same for two models with the same names."""
    generator = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.std())


def assert_equal(
    spec: SftSpec,
    flat: nn.Module,
    dense: nn.Module,
    reference: Reference | None,
    dense_reference: nn.Module | None,
    samples: Sequence[Sample],
) -> None:
    """Value, metrics and gradients; and that nothing of the policy was left changed."""
    before = {name: parameter.detach().clone() for name, parameter in flat.named_parameters()}
    trains = {name: parameter.requires_grad for name, parameter in flat.named_parameters()}
    loss = loss_of(spec, ModelPolicy(flat, reference=reference), flat_batch(samples))
    other = None
    if dense_reference is not None:
        with torch.no_grad():
            other = dense_of(dense_reference, samples)
    expected, metrics = closed_form(spec, dense_of(dense, samples), other)
    assert float(mean(loss).detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert set(loss.metrics) == set(metrics)
    for name, value in metrics.items():
        assert metric(loss, name) == pytest.approx(value, rel=1e-4)
    mean(loss).backward()
    expected.backward()
    assert_same_gradients(gradients(flat), gradients(dense), relative=5e-5)
    assert {name: parameter.requires_grad for name, parameter in flat.named_parameters()} == trains
    for name, parameter in flat.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_whole_logits(
    family: str, method: str, spec: SftSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is the base below the adapters, or where the parameters that train started."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    flat, dense = flat_and_dense(family, method)
    adapted = isinstance(flat, PeftModel)
    _, start = flat_and_dense(family, "full" if adapted else method)
    reference: Reference = AdaptersOff(flat) if isinstance(flat, PeftModel) else StartingPoint(flat)
    for model in (flat, dense):
        shift(model)
    assert_equal(spec, flat, dense, reference, start, random_samples(LENGTHS))


@pytest.mark.parametrize("limit", [1, VOCAB * 2 * 21, 2**23])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_chunks_of_any_size(method: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", limit)
    flat, dense = flat_and_dense("gemma2-softcap", method)
    _, start = flat_and_dense("gemma2-softcap", method)
    reference = StartingPoint(flat)
    for model in (flat, dense):
        shift(model)
    for spec in (SPECS["asft"], SPECS["eaft"]):
        for model in (flat, dense):
            model.zero_grad()
        assert_equal(spec, flat, dense, reference, start, random_samples(LENGTHS))


def test_starting_point_of_an_adapter() -> None:
    """An adapter that is trained on is compared with itself as it was, not with the base."""
    flat, dense = flat_and_dense("llama", "lora-on-head")
    _, start = flat_and_dense("llama", "lora-on-head")
    reference = StartingPoint(flat)
    for model in (flat, dense):
        shift(model)
    assert_equal(SPECS["asft"], flat, dense, reference, start, random_samples(LENGTHS))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_head_that_an_adapter_keeps_whole(family: str) -> None:
    """`modules_to_save` has two heads: the trained one and, below it, the reference's."""

    def adapted(attention: str) -> PeftModel:
        torch.manual_seed(3)
        tying = {"ensure_weight_tying": True} if family == "llama-tied" else {}
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **tying)
        model = get_peft_model(tiny_model(family, attention), config)
        assert isinstance(model, PeftModel)
        shift(model)
        return model

    flat, dense = adapted("luthier_segments"), adapted("eager")
    install_target_forward(flat.get_base_model())
    start = tiny_model(family, "eager")
    assert_equal(SPECS["asft"], flat, dense, AdaptersOff(flat), start, random_samples(LENGTHS))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_another_model(method: str) -> None:
    """Of another family and width, with a cap on its logits that the policy does not have."""
    flat, dense = flat_and_dense("llama", method)
    other, dense_other = (
        tiny_model("gemma2-softcap", kind, seed=9) for kind in ("luthier_segments", "eager")
    )
    install_target_forward(other)
    assert_equal(SPECS["asft"], flat, dense, OtherModel(other), dense_other, random_samples(LENGTHS))


def test_another_width() -> None:
    torch.manual_seed(5)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **shape))
    dense_other = AutoModelForCausalLM.from_config(other.config, attn_implementation="eager")
    dense_other.load_state_dict(other.state_dict())
    install_target_forward(other)
    # One segment: this model's own attention knows of no others.
    samples = random_samples((37,))
    flat, dense = flat_and_dense("llama", "full")
    assert_equal(SPECS["asft"], flat, dense, OtherModel(other), dense_other, samples)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_padded_rows(spec: SftSpec, side: Any) -> None:
    flat, dense = tiny_model("llama", "sdpa"), tiny_model("llama", "eager")
    install_target_forward(flat, Rows(padded=True, side=side))
    reference = StartingPoint(flat)
    for model in (flat, dense):
        shift(model)
    assert_equal(spec, flat, dense, reference, tiny_model("llama", "eager"), random_samples(LENGTHS))


# ---- the policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_at_the_start_there_is_no_divergence(method: str) -> None:
    """asft starts as dft does, whatever its weight."""
    samples, spec = random_samples(LENGTHS), SftSpec(loss="asft", kl_weight=100.0)
    found = []
    for wanted in (spec, SPECS["dft"]):
        flat, _ = flat_and_dense("llama", method)
        loss = loss_of(wanted, ModelPolicy(flat, reference=StartingPoint(flat)), flat_batch(samples))
        mean(loss).backward()
        found.append((loss, gradients(flat)))
    (anchored, its_gradients), (plain, expected) = found
    assert metric(anchored, "kl") == 0.0
    assert torch.equal(mean(anchored), mean(plain))
    assert_same_gradients(its_gradients, expected, relative=2e-4)


def test_dropout_is_the_policy_s_alone() -> None:
    """The reference draws no random numbers, and training mode is back after it."""
    flat, _ = flat_and_dense("gpt2", "full")  # dropout of 0.1 everywhere
    batch, reference = flat_batch(random_samples(LENGTHS)), StartingPoint(flat)
    flat.train()
    found = []
    for spec in (SPECS["asft"], SPECS["dft"]):
        torch.manual_seed(4)
        found.append(loss_of(spec, ModelPolicy(flat, reference=reference), batch))
    anchored, plain = found
    assert metric(anchored, "nll") == metric(plain, "nll")
    assert metric(anchored, "kl") > 1e-3
    assert flat.training
    assert all(module.training for module in flat.modules())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_batch_without_targets(method: str) -> None:
    flat, _ = flat_and_dense("llama", method)
    samples = [Sample(sample.input_ids, sample.weights * 0) for sample in random_samples((7, 12))]
    for spec in SPECS.values():
        flat.zero_grad()
        loss = loss_of(spec, ModelPolicy(flat, reference=StartingPoint(flat)), flat_batch(samples))
        assert float(loss.terms["loss"].total) == float(loss.terms["loss"].weight) == 0
        loss.terms["loss"].total.backward()
        assert all(not gradient.any() for gradient in gradients(flat).values())


def test_without_a_reference() -> None:
    flat, _ = flat_and_dense("llama", "full")
    with pytest.raises(ModelError, match="none was built"):
        loss_of(SPECS["asft"], ModelPolicy(flat), flat_batch(random_samples(LENGTHS)))


@pytest.mark.parametrize(("method", "calls"), [("full", 2), ("lora", 1)])
def test_logits_of_one_chunk_at_a_time(method: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of both models see chunks alone, once, or once more in backward where the head trains."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    flat, _ = flat_and_dense("llama", method)
    other = tiny_model("llama", seed=9)
    install_target_forward(other)
    inner = flat.get_base_model() if isinstance(flat, PeftModel) else flat
    heads = {id(model.get_output_embeddings()): name for model, name in ((inner, "policy"), (other, "other"))}
    seen: dict[str, list[int]] = {"policy": [], "other": []}
    plain = nn.Linear.forward

    def counting(self: nn.Linear, hidden: Tensor) -> Tensor:
        if id(self) in heads:
            seen[heads[id(self)]].append(len(hidden))
        return plain(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    batch = flat_batch(random_samples(LENGTHS))
    mean(loss_of(SPECS["asft"], ModelPolicy(flat, reference=OtherModel(other)), batch)).backward()
    targets = int((batch.targets != IGNORE_INDEX).sum())
    chunks = [16] * (targets // 16) + [targets % 16]
    assert len(chunks) > 2
    assert {name: sorted(sizes) for name, sizes in seen.items()} == dict.fromkeys(
        seen, sorted(chunks * calls)
    )


# ---- LLaMA-Factory -------------------------------------------------------------------------------------------

RECORDED = json.loads((Path(__file__).parent / "data" / "sft_variants.json").read_text())
OPTIONS = {"dft": None, "asft": "kl_weight", "eaft": "entropy_power"}


class Given:
    """A policy whose logits (L, V) at each position are given; with a head that trains, or one that does not."""

    def __init__(self, logits: Tensor, reference: Tensor, *, trains: bool) -> None:
        self.logits, self.reference, self.trains = logits, reference, trains

    def logprobs(self, batch: Batch, *, top_entropy: bool = False, divergence: bool = False) -> TokenLogprobs:
        supervised = batch.targets != IGNORE_INDEX
        answers = token_logprobs(
            self.logits[supervised],
            lambda rows: rows * 1.0,
            batch.targets[supervised],
            vocab_size=self.logits.shape[-1],
            entropy=False,
            mean_logprobs=False,
            top_entropy=top_entropy,
            anchor=Anchor(self.reference[supervised], torch.clone) if divergence else None,
            head_trains=self.trains,
        )
        return TokenLogprobs(**answers)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['loss']}-{case['option']}")
def test_llamafactory(case: dict[str, Any], trains: bool) -> None:
    labels = np.array(RECORDED["labels"])
    sample = Sample(np.array(RECORDED["input_ids"], np.int32), (labels != IGNORE_INDEX).astype(np.float32))
    logits = torch.tensor(RECORDED["logits"], requires_grad=True)
    option = OPTIONS[case["loss"]]
    spec = SftSpec(loss=case["loss"], **({option: case["option"]} if option else {}))
    policy = Given(logits, torch.tensor(RECORDED["reference"]), trains=trains)
    loss = mean(loss_of(spec, policy, flat_batch([sample])))
    assert float(loss) == pytest.approx(case["value"], rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor(case["gradient"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["dft", "asft", "eaft"])
def test_message_weights_multiply(loss: Any) -> None:
    """A target of weight 2 counts as two of weight 1, and one of weight 0 as none."""
    ids = np.array(RECORDED["input_ids"], np.int32)
    logits, reference = (torch.tensor(RECORDED[name]) for name in ("logits", "reference"))
    policy, spec = Given(logits, reference, trains=False), SftSpec(loss=loss)

    def totals(weights: list[float]) -> tuple[float, float]:
        term = loss_of(spec, policy, flat_batch([Sample(ids, np.array(weights, np.float32))])).terms["loss"]
        return float(term.total), float(term.weight)

    singles = [totals([float(place == one) for place in range(9)])[0] for one in range(1, 9)]
    weights = [0.0, 1.0, 2.0, 0.0, 0.5, 3.0, 0.0, 0.25, 1.0]
    total, weight = totals(weights)
    assert weight == sum(weights)
    assert total == pytest.approx(sum(w * one for w, one in zip(weights[1:], singles, strict=True)), rel=1e-5)


def test_kl_metric_is_weighted() -> None:
    """The metrics are divided by the same weights as the loss."""
    flat, _ = flat_and_dense("llama", "full")
    other = tiny_model("llama", seed=9)
    install_target_forward(other)
    loss = loss_of(
        SPECS["asft"],
        ModelPolicy(flat, reference=OtherModel(other)),
        flat_batch(random_samples(LENGTHS)),
    )
    assert {float(term.weight) for term in (*loss.terms.values(), *loss.metrics.values())} == {
        float(loss.terms["loss"].weight)
    }
