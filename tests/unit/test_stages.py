"""The supervised loss: smoothing, weights, sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions
from luthier.data.template import load_template
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.recipe.schema import DataSpec, PtSpec, Recipe, SftSpec
from luthier.stages import ONLINE, STAGES, build_stage
from luthier.stages.supervised import supervised_weights
from luthier.types import Batch, Conversation, Message, Policy, Row, Sample, Stage, TokenLogprobs
from tests.reference import assert_same_gradients, gradients, padded_rows
from tests.tiny import chat_tokenizer, random_samples, tiny_model

OPTIONS = EncodeOptions(max_length=64, overflow="drop")
LENGTHS = (9, 21, 4)


def stages(label_smoothing: float) -> list[Stage]:
    return [
        build_stage(PtSpec(label_smoothing=label_smoothing), OPTIONS),
        build_stage(SftSpec(label_smoothing=label_smoothing), OPTIONS),
    ]


class Fixed:
    """A policy whose answers are given."""

    def __init__(self, logprobs: list[float], mean_logprobs: list[float]) -> None:
        self.logprobs_N, self.mean_N = torch.tensor(logprobs), torch.tensor(mean_logprobs)
        self.asked: list[bool] = []

    def logprobs(self, batch: Batch, *, entropy: bool = False, mean_logprobs: bool = False) -> TokenLogprobs:
        self.asked.append(mean_logprobs)
        return TokenLogprobs(self.logprobs_N, None, self.mean_N if mean_logprobs else None)


def batch_of(weights: list[float]) -> Batch:
    return flat_batch([Sample(np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32))])


@pytest.mark.parametrize("stage", stages(0.0), ids=lambda stage: stage.name)
def test_weighted_sum(stage: Stage) -> None:
    """The first token's weight counts for nothing: nothing predicts it."""
    batch = batch_of([3.0, 1.0, 0.0, 0.5, 2.0])
    policy = Fixed([-1.0, -2.0, -4.0], [])
    loss = stage.loss(policy, batch, {})
    assert list(loss.terms) == ["loss"]
    assert float(loss.terms["loss"].total) == 1.0 * 1 + 0.5 * 2 + 2.0 * 4
    assert float(loss.terms["loss"].weight) == 3.5
    assert {name: float(weight) for name, weight in stage.weight(batch).items()} == {"loss": 3.5}
    assert loss.metrics == {}
    assert policy.asked == [False]


@pytest.mark.parametrize("stage", stages(0.25), ids=lambda stage: stage.name)
def test_smoothed_sum(stage: Stage) -> None:
    loss = stage.loss(Fixed([-1.0, -2.0, -4.0], [-8.0, -6.0, -5.0]), batch_of([0.0, 1.0, 0.0, 0.5, 2.0]), {})
    assert float(loss.terms["loss"].total) == 0.75 * (1 + 1 + 8) + 0.25 * (8 + 3 + 10)
    assert float(loss.terms["loss"].weight) == 3.5
    # Perplexity is of the plain likelihood.
    assert float(loss.metrics["nll"].total) == 1 + 1 + 8
    assert float(loss.metrics["nll"].weight) == 3.5


@pytest.mark.parametrize("epsilon", [0.1, 0.4])
def test_smoothing_equals_transformers(epsilon: float) -> None:
    """Value and gradient of transformers' LabelSmoother on right-padded rows."""
    samples = [Sample(s.input_ids, np.sign(s.weights)) for s in random_samples(LENGTHS)]
    flat, dense = tiny_model("llama"), tiny_model("llama", "eager")
    install_target_forward(flat)
    for stage in stages(epsilon):
        flat.zero_grad()
        dense.zero_grad()
        term = stage.loss(ModelPolicy(flat), flat_batch(samples), {}).terms["loss"]
        ids, mask, labels = padded_rows(samples)
        output = CausalLMOutput(logits=dense(ids, attention_mask=mask).logits)
        expected = LabelSmoother(epsilon=epsilon)(output, labels, shift_labels=True)
        torch.testing.assert_close(term.total / term.weight, expected, rtol=1e-5, atol=1e-5)
        (term.total / term.weight).backward()
        expected.backward()
        assert_same_gradients(gradients(flat), gradients(dense))


def test_loss_equals_transformers_loss() -> None:
    samples = [Sample(s.input_ids, np.sign(s.weights)) for s in random_samples(LENGTHS)]
    flat, dense = tiny_model("qwen3"), tiny_model("qwen3", "eager")
    install_target_forward(flat)
    ids, mask, labels = padded_rows(samples)
    expected = float(dense(ids, attention_mask=mask, labels=labels).loss)
    for stage in stages(0.0):
        term = stage.loss(ModelPolicy(flat), flat_batch(samples), {}).terms["loss"]
        assert float(term.total / term.weight) == pytest.approx(expected, rel=1e-5)


def test_weights_follow_the_targets() -> None:
    batch = flat_batch(random_samples(LENGTHS))
    expected = [w for s in random_samples(LENGTHS) for w in s.weights[1:].tolist() if w > 0]
    assert supervised_weights(batch).tolist() == expected
    assert len(set(expected)) == 2  # 1 and 0.5


def test_message_weights() -> None:
    """A weight given to a message is the weight of its tokens, the token that ends it among them; a question that has
    one is learnt, too."""
    template = load_template(chat_tokenizer(), DataSpec())
    messages = (
        Message("user", "a"),
        Message("assistant", "bcd", weight=0.25),
        Message("user", "e", weight=2.0),
        Message("assistant", "fg"),
        Message("user", "h"),
        Message("assistant", "ijkl", weight=0.0),
    )
    stage = build_stage(SftSpec(), EncodeOptions(max_length=500, overflow="drop"))
    encoded = stage.encode(Row("made", 0, Conversation(messages)), template)
    (sample,) = encoded.samples
    batch = stage.collate([sample])
    # three bytes and the stop token at 0.25, a byte and the end token at 2, two bytes and the stop token at 1
    assert float(stage.weight(batch)["loss"]) == 4 * 0.25 + 2 * 2 + 3
    num_supervised = int((batch.targets >= 0).sum())
    policy: Policy = Fixed([-(2.0**k) for k in range(num_supervised)], [])
    total = float(stage.loss(policy, batch, {}).terms["loss"].total)
    assert num_supervised == 9
    assert total == 0.25 * (1 + 2 + 4 + 8) + 2 * (16 + 32) + (64 + 128 + 256)


def test_documents_are_all_targets() -> None:
    template = load_template(chat_tokenizer(), DataSpec())
    stage = build_stage(PtSpec(), EncodeOptions(max_length=500, overflow="split"))
    (sample,) = stage.encode(Row("made", 0, text="hello"), template).samples
    ids = sample.input_ids.tolist()
    batch = stage.collate([sample])
    assert batch.targets.tolist() == [*ids[1:], -100]
    assert ids[-1] == chat_tokenizer().eos_token_id
    assert float(stage.weight(batch)["loss"]) == len(ids) - 1 == 5


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_built_by_its_name(name: str) -> None:
    needed = {"rewards": [{"type": "exact_match"}]} if name in ONLINE else {}
    recipe = Recipe.model_validate(
        {"model": {"path": "m"}, "data": {"train": ["a"]}, "stage": {"type": name, **needed}}
    )
    assert build_stage(recipe.stage, OPTIONS).name == name
