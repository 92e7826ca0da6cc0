"""Log-probabilities at the temperature of sampling, against whole tables of logits divided by it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.model import kernel
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import AdaptersOff, OtherModel, Reference, StartingPoint
from luthier.model.rows import Rows
from luthier.recipe.schema import FreezeSpec, FullSpec, LoraSpec
from luthier.trainer.metrics import RecordingPolicy
from luthier.types import IGNORE_INDEX, Batch
from tests.tiny import random_samples, tiny_model
from tests.unit.test_kernel import DIFFERENTIABLE, ROWS, closed_forms, problem

METHODS: dict[str, Any] = {
    "full": FullSpec(),
    "freeze": FreezeSpec(layers=1),
    "lora": LoraSpec(rank=4),
    "lora-head": LoraSpec(rank=4, targets=("q_proj", "lm_head")),
}


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_the_kernel_is_that_of_divided_logits(
    trains: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every statistic and its gradients, in several chunks, in float64."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 211 * 2 * 37)
    p = problem(trains=trains)
    hidden = p.hidden.detach().double().requires_grad_()
    head = p.head.detach().double().requires_grad_(trains)
    answers = p.answers(temperature=temperature)
    # Of both distributions: closed_forms divides by nothing, so the heads are divided for it.
    divided = problem(trains=trains)
    object.__setattr__(divided, "anchor_head", p.anchor_head / temperature)
    expected = closed_forms(hidden, head / temperature, divided)
    assert set(answers) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(answers[name].double(), values.double(), rtol=1e-5, atol=1e-4, msg=name)
    weights = torch.randn(len(DIFFERENTIABLE), ROWS, generator=torch.Generator().manual_seed(8))
    for said in (answers, expected):
        parts = [(w * said[name]).sum() for w, name in zip(weights, DIFFERENTIABLE, strict=True)]
        torch.stack([part.double() for part in parts]).sum().backward()
    assert p.hidden.grad is not None
    torch.testing.assert_close(p.hidden.grad.double(), hidden.grad, rtol=1e-4, atol=5e-4)
    if trains:
        assert p.head.grad is not None
        torch.testing.assert_close(p.head.grad.double(), head.grad, rtol=1e-4, atol=5e-4)


def policy_model(method: str, family: str = "llama") -> Any:
    model = build_method(METHODS[method]).apply(tiny_model(family))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model


def batch_of(lengths: tuple[int, ...] = (9, 5, 14)) -> Batch:
    return flat_batch(random_samples(lengths))


def dense(model: Any, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from each segment's own logits, by the model's ordinary forward."""
    chosen, entropies = [], []
    bounds = batch.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        ids = batch.input_ids[:, start:stop]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        table = torch.log_softmax(logits.float() / temperature, -1)
        targets = batch.targets[start:stop]
        at = (targets != IGNORE_INDEX).nonzero()[:, 0]
        chosen.append(table[at, targets[at]])
        entropies.append(-(table.exp() * table).sum(-1)[at])
    return torch.cat(chosen), torch.cat(entropies)


CASES = [(method, "llama") for method in METHODS] + [("full", "gemma2-softcap"), ("lora", "gemma2-softcap")]


@pytest.mark.parametrize(("method", "family"), [*CASES, ("lora", "granite-scaled"), ("full", "llama-tied")])
def test_a_model_gives_its_own_dense_numbers_and_gradients(method: str, family: str) -> None:
    """After the family's own scaling and capping, as sampling divides them."""
    model, batch, temperature = policy_model(method, family), batch_of(), 0.6
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    answers = ModelPolicy(model).logprobs(batch, entropy=True, temperature=temperature)
    logprobs, entropies = dense(model, batch, temperature)
    assert answers.entropy is not None
    torch.testing.assert_close(answers.logprobs, logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers.entropy, entropies, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 2, len(logprobs))
    ours = torch.autograd.grad((weights * answers.logprobs + 0.3 * answers.entropy).sum(), trained)
    theirs = torch.autograd.grad((weights * logprobs + 0.3 * entropies).sum(), trained)
    assert any(float(grad.abs().max()) > 1e-3 for grad in theirs)
    for grad, expected in zip(ours, theirs, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_say_the_same(side: Any) -> None:
    model, batch = policy_model("lora"), batch_of()
    expected = ModelPolicy(model).logprobs(batch, temperature=1.3).logprobs.detach()
    padded = build_method(METHODS["lora"]).apply(tiny_model("llama", attention="eager"))
    padded.load_state_dict(model.state_dict())
    install_target_forward(padded.get_base_model(), Rows(padded=True, side=side))
    found = ModelPolicy(padded).logprobs(batch, temperature=1.3).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def reference(kind: str, model: Any) -> Reference:
    if kind == "other":
        other = tiny_model("llama", seed=4)
        install_target_forward(other)
        return OtherModel(other)
    return AdaptersOff(model) if kind == "off" else StartingPoint(model)


@pytest.mark.parametrize(
    ("kind", "method"), [("off", "lora"), ("start", "full"), ("start", "lora"), ("other", "lora")]
)
def test_every_reference_answers_at_the_temperature(kind: str, method: str) -> None:
    model, batch, temperature = policy_model(method), batch_of(), 0.5
    model.eval()
    policy = ModelPolicy(model, reference=reference(kind, model))
    if kind == "off":
        with model.disable_adapter():
            expected, _ = dense(model, batch, temperature)
    else:
        frozen = model if kind == "start" else tiny_model("llama", seed=4)
        expected, _ = dense(frozen.eval(), batch, temperature)
    expected = expected.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found = policy.reference_logprobs(batch, temperature=temperature)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - policy.reference_logprobs(batch)).abs().max() > 0.01


def test_what_a_batch_brings_along_is_of_temperature_one() -> None:
    model, batch = policy_model("lora"), batch_of()
    batch.reference = torch.zeros(int((batch.targets != IGNORE_INDEX).sum()))
    policy = ModelPolicy(model, reference=AdaptersOff(model))
    assert torch.equal(policy.reference_logprobs(batch), batch.reference)
    assert policy.reference_logprobs(batch, temperature=0.5).abs().max() > 0.1


def test_evaluations_record_what_was_asked_for() -> None:
    model, batch = policy_model("lora"), batch_of()
    policy = ModelPolicy(model, reference=AdaptersOff(model))
    recording = RecordingPolicy(policy)
    found = recording.logprobs(batch, entropy=True, temperature=0.7)
    expected = policy.logprobs(batch, entropy=True, temperature=0.7)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert [len(row.targets) for row in recording.rows] == [
        int((part != IGNORE_INDEX).sum()) for part in batch.targets.split(batch.cu_seqlens.diff().tolist())
    ]
    assert torch.equal(
        recording.reference_logprobs(batch, temperature=0.7),
        policy.reference_logprobs(batch, temperature=0.7),
    )


def test_under_autocast_the_division_is_in_float32() -> None:
    """A head that answers in 16 bits is not rounded a second time."""
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    head = torch.randn(31, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits = hidden.bfloat16() @ head.T
    targets = torch.arange(5)
    expected = torch.log_softmax(logits.float() / 0.7, -1)[torch.arange(5), targets]
    for grows in (False, True):
        leaf = hidden.clone().requires_grad_(grows)
        found = kernel.token_logprobs(
            leaf,
            lambda rows: rows.bfloat16() @ head.T,
            targets,
            vocab_size=31,
            entropy=False,
            mean_logprobs=False,
            head_trains=False,
            temperature=0.7,
        )
        torch.testing.assert_close(found["logprobs"], expected, rtol=0, atol=1e-6)
