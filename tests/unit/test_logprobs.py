"""The numeric kernel against whole logits of transformers' own padded, eager forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.data.collate import flat_batch
from luthier.model import kernel
from luthier.model.kernel import chunk_rows
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.types import Batch, ModelError, Sample
from tests.reference import (
    METHODS,
    assert_same_gradients,
    dense_answers,
    flat_and_dense,
    gradients,
    without_dropout,
)
from tests.tiny import FAMILIES, VOCAB, random_samples, tiny_model

LENGTHS = (23, 41, 9, 1, 37)
NAMES = ("logprobs", "entropy", "mean_logprobs")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, the least there is."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)


def mixed(answers: Any, seed: int = 5) -> Tensor:
    """A scalar to which each token's statistics contribute with weights of their own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name in NAMES:
        values = getattr(answers, name)
        parts.append((torch.randn(len(values), generator=generator) * values).sum())
    return torch.stack(parts).sum()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_dense(family: str, method: str, training: bool) -> None:
    flat, dense = (without_dropout(model).train(training) for model in flat_and_dense(family, method))
    samples = random_samples(LENGTHS)
    answers = ModelPolicy(flat).logprobs(flat_batch(samples), entropy=True, mean_logprobs=True)
    expected = dense_answers(dense, samples)
    assert len(expected.logprobs) > 3 * 16  # several chunks, the last one partly filled
    assert len(expected.logprobs) % 16
    for name in NAMES:
        torch.testing.assert_close(getattr(answers, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    mixed(answers).backward()
    mixed(expected).backward()
    assert_same_gradients(gradients(flat), gradients(dense), relative=3e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("wanted", [{}, {"entropy": True}, {"mean_logprobs": True}])
@pytest.mark.parametrize("method", ["frozen-head", "full"])
def test_each_statistic_alone(method: str, wanted: dict[str, bool]) -> None:
    """A statistic that is not asked for is absent, and changes neither the others nor their gradients."""
    flat, dense = flat_and_dense("gemma2-softcap", method)
    samples = random_samples(LENGTHS)
    answers = ModelPolicy(flat).logprobs(flat_batch(samples), **wanted)
    expected = dense_answers(dense, samples)
    names = ["logprobs", *wanted]
    assert [name for name in NAMES if getattr(answers, name) is not None] == [n for n in NAMES if n in names]
    for name in names:
        torch.testing.assert_close(getattr(answers, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    for said in (answers, expected):
        parts = [k * getattr(said, name).square().sum() for k, name in enumerate(names, start=1)]
        torch.stack(parts).sum().backward()
    assert_same_gradients(gradients(flat), gradients(dense), relative=3e-5)


@pytest.mark.parametrize(("method", "rowwise"), [("lora", True), ("frozen-head", True), ("full", False)])
def test_logits_are_computed_once_for_a_frozen_head(
    method: str, rowwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that does not train sees each chunk once; one that trains sees it again in backward."""
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 1)
    flat, _ = flat_and_dense("llama", method)
    sizes: list[int] = []
    head = (flat.get_base_model() if isinstance(flat, PeftModel) else flat).get_output_embeddings()
    plain = nn.Linear.forward

    def counting(self: nn.Linear, hidden: Tensor) -> Tensor:
        if self is head:
            sizes.append(len(hidden))
        return plain(self, hidden)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    answers = ModelPolicy(flat).logprobs(flat_batch(random_samples(LENGTHS)))
    num_targets = len(answers.logprobs)
    chunks = [16] * (num_targets // 16) + [num_targets % 16]
    assert sizes == chunks
    answers.logprobs.sum().backward()
    assert sorted(sizes) == sorted(chunks if rowwise else chunks * 2)


def test_chunks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(10_000, 49_152, cpu) == 2**23 // 49_152
    assert chunk_rows(100, 49_152, cpu) == 100
    assert chunk_rows(5, 49_152, cpu) == 16
    assert chunk_rows(10_000, 2**30, cpu) == 16
    assert chunk_rows(10_000, 49_152, torch.device("cuda")) == 2**27 // 49_152


@pytest.mark.parametrize("method", METHODS)
def test_batch_without_targets(method: str) -> None:
    """Nothing is answered, and backward still reaches the same parameters, with zeros: other ranks wait for it."""
    flat, _ = flat_and_dense("llama", method)
    samples = [Sample(sample.input_ids, sample.weights * 0) for sample in random_samples((7, 12))]
    answers = ModelPolicy(flat).logprobs(flat_batch(samples), entropy=True, mean_logprobs=True)
    for name in NAMES:
        assert getattr(answers, name).shape == (0,)
        assert getattr(answers, name).dtype == torch.float32
    sum(getattr(answers, name).sum() for name in NAMES).backward()
    reached = {name for name, parameter in flat.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in flat.named_parameters() if parameter.requires_grad}
    assert all(not gradient.any() for gradient in gradients(flat).values())


def test_no_gradient_where_none_is_wanted() -> None:
    flat, dense = flat_and_dense("llama", "full")
    samples = random_samples(LENGTHS)
    with torch.no_grad():
        answers = ModelPolicy(flat).logprobs(flat_batch(samples), entropy=True, mean_logprobs=True)
        expected = dense_answers(dense, samples)
    assert not answers.logprobs.requires_grad
    for name in NAMES:
        torch.testing.assert_close(getattr(answers, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


# ---- the hook leaves the model what it was --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_model_stays_itself(family: str, tmp_path: Path) -> None:
    """Class names, the saved folder and greedy generation with left padding are those of an untouched model."""
    # transformers' SDPA has no soft-capping, so Gemma 2's reference is eager.
    plain = tiny_model(family, "eager" if family == "gemma2-softcap" else "sdpa").eval()
    taught = tiny_model(family).eval()
    cls, head_cls = type(taught), type(taught.get_output_embeddings())
    install_target_forward(taught)
    install_target_forward(taught)  # a second time changes nothing
    assert type(taught).__name__ == cls.__name__ == type(plain).__name__
    assert type(taught).__mro__.index(cls) == 2  # one mixin, once
    assert type(taught.get_output_embeddings()).__name__ == head_cls.__name__

    samples = random_samples((5, 13, 9))
    width = max(map(len, samples))
    ids = torch.stack([torch.tensor([0] * (width - len(s)) + s.input_ids.tolist()) for s in samples])
    mask = torch.stack([torch.tensor([0] * (width - len(s)) + [1] * len(s)) for s in samples])
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(taught.generate(ids, **arguments), plain.generate(ids, **arguments))

    taught.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.architectures == [cls.__name__]
    assert type(reloaded) is cls
    saved = reloaded.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.state_dict().items())


def test_forward_with_labels_is_untouched() -> None:
    plain, taught = tiny_model("llama", "sdpa"), tiny_model("llama")
    install_target_forward(taught)
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(taught(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_targets_refuse_what_would_be_ignored() -> None:
    model = tiny_model("llama")
    install_target_forward(model)
    batch: Batch = flat_batch(random_samples((6,)))
    for name, value in (("labels", batch.input_ids), ("attention_mask", torch.ones_like(batch.input_ids))):
        with pytest.raises(ModelError, match=name):
            model(input_ids=batch.input_ids, targets=batch.targets, **{name: value})


def test_model_without_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no output head"):
        install_target_forward(tiny_model("llama").base_model)
