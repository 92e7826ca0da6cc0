"""A prompt that is computed once for both answers gives the numbers and gradients of a prompt for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedModel

from luthier.data.collate import branch_batch, rows_of
from luthier.model.attention import SDPA
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.rows import FLAT, Rows
from luthier.types import Batch, ModelError, Sample
from tests.padded import padded_model
from tests.reference import METHODS, assert_same_gradients, dense_answers, gradients, without_dropout
from tests.tiny import FAMILIES, VOCAB, tiny_model

SHARING = Rows(shares_prompts=True)
PAIRS = ((9, 6, 4), (1, 5, 3), (4, 1, 12), (17, 8, 8), (2, 3, 1))
"""Tokens of a prompt and of its two answers; a prompt of one token is not shared."""


def deepseek() -> PreTrainedModel:
    """Latent attention: values are narrower than keys, and only a part of a key is rotated."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=SDPA)


def fresh(family: str) -> PreTrainedModel:
    return deepseek() if family == "deepseek" else tiny_model(family)


def taught(family: str, method: str = "full", rows: Rows = SHARING) -> nn.Module:
    model = METHODS[method](fresh(family))
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model, rows)
    return without_dropout(model).train()


def pairs(lengths: Sequence[tuple[int, int, int]] = PAIRS) -> list[Sample]:
    """Samples of two branches; every token of an answer is a target, of unequal weight."""
    rng = np.random.default_rng(0)
    samples = []
    for number, (prompt, *answers) in enumerate(lengths):
        total = prompt + sum(answers)
        weights = rng.choice([1.0, 0.5], total).astype(np.float32)
        weights[:prompt] = 0.0
        ids = rng.integers(3, VOCAB, total).astype(np.int32)
        samples.append(Sample(ids, weights, "random", number, (prompt, prompt + answers[0])))
    return samples


def weighted(numbers: Tensor, batch: Batch) -> Tensor:
    """A loss that both branches of a pair matter to, not a plain likelihood."""
    weights = batch.target_weights[batch.target_weights > 0]
    return (weights * numbers).sum() + (numbers * torch.linspace(-1, 1, len(numbers))).sum()


def answers(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities (N,) and the gradients of a loss of them."""
    model.zero_grad()
    logprobs = ModelPolicy(model).logprobs(batch).logprobs
    weighted(logprobs, batch).backward()
    return logprobs.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_sharing_changes_nothing(model: nn.Module, samples: Sequence[Sample]) -> None:
    shared, apart = (branch_batch(samples, share_prompts=share) for share in (True, False))
    assert int((shared.parent >= 0).sum()) == 2 * sum(sample.branches[0] > 1 for sample in samples)
    assert (apart.parent == -1).all()
    actual, actual_gradients = answers(model, shared)
    expected, expected_gradients = answers(model, apart)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(actual_gradients, expected_gradients, relative=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek"])
def test_shared_equals_unshared(family: str) -> None:
    assert_sharing_changes_nothing(taught(family), pairs())


@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "mistral-window", "gpt2", "qwen3-moe"])
def test_shared_equals_plain_transformers(family: str) -> None:
    """The whole against padded rows, eager attention and dense logits, in which nothing is shared."""
    samples = pairs()
    batch = branch_batch(samples, share_prompts=True)
    actual, actual_gradients = answers(taught(family), batch)
    dense = without_dropout(tiny_model(family, "eager")).train()
    branches = [rows_of(sample) for sample in samples]
    expected = dense_answers(dense, [rows[k] for k in range(2) for rows in branches]).logprobs
    weighted(expected, batch).backward()
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(actual_gradients, gradients(dense), relative=1e-5)


@pytest.mark.parametrize("method", ["lora", "lora-on-head", "frozen-head"])
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap"])
def test_whatever_trains(family: str, method: str) -> None:
    assert_sharing_changes_nothing(taught(family, method), pairs())


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3-window"])
def test_gradient_checkpointing(family: str, reentrant: bool, method: str) -> None:
    model = taught(family, method)
    batch = branch_batch(pairs(), share_prompts=True)
    expected, expected_gradients = answers(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    if method == "lora":
        model.enable_input_require_grads()  # type: ignore[operator]
    actual, actual_gradients = answers(model, batch)
    assert torch.equal(actual, expected)
    assert_same_gradients(actual_gradients, expected_gradients, relative=1e-6)


@pytest.mark.parametrize("prompt", [2, 4, 5, 6, 7, 30])
def test_window_around_the_prompt(prompt: int) -> None:
    """A window of 5 that ends inside the prompt, at its end, or inside the branch."""
    assert_sharing_changes_nothing(taught("mistral-window"), pairs([(prompt, 3, 9)]))


def test_three_branches_and_one() -> None:
    """Any number of answers continue a prompt; some of them may be asked for alone."""
    model, (sample,) = taught("llama"), pairs([(7, 5, 9)])
    three = replace(sample, branches=(7, 12, 15))
    assert_equal_branches(model, three, branches=None, count=3)
    assert_equal_branches(model, three, branches=[1], count=1)


def assert_equal_branches(model: nn.Module, sample: Sample, branches: list[int] | None, count: int) -> None:
    batches = [branch_batch([sample], share_prompts=share, branches=branches) for share in (True, False)]
    assert batches[0].num_segments == count + 1
    shared, apart = (ModelPolicy(model).logprobs(batch).logprobs for batch in batches)
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)


def test_one_answer_does_not_matter_to_the_other() -> None:
    """Exactly: what the first answer is changes no bit of what is said of the second."""
    model, (sample,) = taught("llama"), pairs([(7, 5, 9)])
    ids = sample.input_ids.copy()
    ids[7:12] = ids[7:12][::-1]
    with torch.no_grad():
        before, after = (
            ModelPolicy(model).logprobs(branch_batch([one], share_prompts=True)).logprobs
            for one in (sample, replace(sample, input_ids=ids))
        )
    assert not torch.equal(before[:5], after[:5])
    assert torch.equal(before[5:], after[5:])


def counted(model: nn.Module, call: Callable[[], object]) -> dict[str, int]:
    """Tokens that went through the embedding and through the first layer's MLP."""
    tokens = {"embedding": 0, "mlp": 0}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            tokens[name] += output.shape[0] * output.shape[1]

        return hook

    parts = {"embedding": model.model.embed_tokens, "mlp": model.model.layers[0].mlp}  # type: ignore[union-attr]
    handles = [part.register_forward_hook(watch(name)) for name, part in parts.items()]  # type: ignore[union-attr]
    call()
    for handle in handles:
        handle.remove()
    return tokens


def test_prompts_are_computed_once() -> None:
    model, samples = taught("llama"), pairs()
    for share in (True, False):
        batch = branch_batch(samples, share_prompts=share)
        expected = 0
        for sample in samples:
            prompt = sample.branches[0]
            both = sum(stop - start for start, stop in pairwise((*sample.branches, len(sample))))
            # The prompt's last token begins each branch.
            expected += (prompt - 1) + 2 + both if share else 2 * prompt + both
        assert batch.num_tokens == expected
        assert counted(model, lambda batch=batch: answers(model, batch)) == {  # type: ignore[misc]
            "embedding": expected,
            "mlp": expected,
        }


def test_a_model_that_was_not_proven_refuses() -> None:
    """Rather than to leave the prompt out without a word."""
    batch = branch_batch(pairs(), share_prompts=True)
    for model in (taught("llama", rows=FLAT), padded_model("bloom")):
        with pytest.raises(ModelError, match="proven to share them"):
            ModelPolicy(model).logprobs(batch)
