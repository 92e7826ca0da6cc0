"""What a judge says of tokens: the numbers of plain dense logits, whatever shares a pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.answering import parts_of
from luthier.evaluating.judge import Judge, open_judge
from luthier.evaluating.perplexity import sliding
from luthier.types import Sample
from tests.padded import PADDED
from tests.tiny import FAMILIES as FLAT, chat_model, chat_tokenizer, random_samples


def dense(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return found


FAMILIES = ["llama-tied", "gemma3-window", "opt", "bloom"]
"""Prompts shared, with a window and soft caps, with learned positions, and rows padded."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    where = tmp_path_factory.mktemp(request.param) / "model"
    if request.param in FLAT:
        return chat_model(where, request.param, initializer_range=0.4)
    config = PADDED[request.param]()
    config.vocab_size, config.initializer_range = 260, 0.4
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(where)
    chat_tokenizer().save_pretrained(where)
    return where


def judge_of(folder: Path, tokens_per_pass: int) -> Judge:
    return open_judge(parts_of(folder), tokens_per_pass=tokens_per_pass)


@pytest.mark.parametrize("tokens_per_pass", [1, 30, 10_000])
def test_next_tokens_after_prompts_that_begin_alike(folder: Path, tokens_per_pass: int) -> None:
    rng = np.random.default_rng(0)
    begin = rng.integers(3, 97, 11).tolist()
    prompts = [[*begin, *rng.integers(3, 97, n).tolist()] for n in (1, 7, 4, 9)] + [begin]
    tokens = [5, 40, 41, 9]
    found = judge_of(folder, tokens_per_pass).next_logprobs(prompts, tokens)
    expected = torch.stack([dense(folder, prompt)[-1, tokens] for prompt in prompts])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("tokens_per_pass", [1, 30, 10_000])
def test_targets(folder: Path, tokens_per_pass: int) -> None:
    samples = random_samples([9, 3, 17, 5])
    found = dict(judge_of(folder, tokens_per_pass).judge(samples, greedy=True))
    for number, sample in enumerate(samples):
        at = np.flatnonzero(sample.weights[1:] > 0)
        ids = sample.input_ids.tolist()
        logprobs = dense(folder, ids)
        wanted = [float(logprobs[k, ids[k + 1]]) for k in at]
        assert found[number].logprobs == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        greedy = found[number].is_greedy
        assert greedy is not None and greedy.tolist() == [int(logprobs[k].argmax()) == ids[k + 1] for k in at]


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(10, 4, 3), (10, 4, 1), (50, 16, 8), (17, 16, 15), (2, 2, 1)]
)
def test_windows_count_every_target_once_with_enough_before_it(length: int, window: int, stride: int) -> None:
    ids = np.arange(length, dtype=np.int32)
    parts = list(sliding(Sample(ids, np.ones(length, np.float32)), window, stride))
    counted: list[int] = []
    for part in parts:
        at = np.flatnonzero(part.weights[1:] > 0) + 1
        counted += part.input_ids[at].tolist()
        assert len(part) <= window
        assert (at >= np.minimum(part.input_ids[at], window - stride)).all()  # tokens before it in its window
    assert counted == list(range(1, length))
