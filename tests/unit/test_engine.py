"""Generation through a model with the isolated attention gives the tokens of plain transformers."""

from __future__ import annotations

import pytest
import torch

from luthier.engine.hf import HfEngine
from luthier.model.logprobs import install_target_forward
from luthier.types import GenerationSettings
from tests.tiny import tiny_model

PROMPTS = {
    "one": [[5, 9, 30, 41]],
    "equal lengths": [[5, 9, 30], [7, 8, 60]],
    "different lengths": [[5, 9, 30, 41, 12], [7, 8]],
}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gemma3-window", "gpt2", "opt"])
def test_greedy_answers_are_those_of_plain_transformers(family: str, prompts: str) -> None:
    model, plain = tiny_model(family), tiny_model(family, attention="eager")
    install_target_forward(model)
    plain.eval()
    settings = GenerationSettings(max_new_tokens=6, stop_ids=(1,))
    answers = HfEngine(model).generate(PROMPTS[prompts], settings)
    for prompt, answer in zip(PROMPTS[prompts], answers, strict=True):
        ids = torch.tensor([prompt])
        for token in answer:  # one token at a time, without any cache
            with torch.no_grad():
                logits = plain(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            assert token == int(logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)

    assert sum(map(len, answers)) >= 3
