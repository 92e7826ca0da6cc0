"""What a rollout asks of the engine: the stop token's log-probability too, those of the distribution that was sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.engine.hf import HfEngine
from luthier.engine.vllm import sampling
from luthier.types import Generation, GenerationError, GenerationSettings, Request
from tests.tiny import tiny_model

PROMPTS = [[5, 9, 30, 41, 12], [7, 8], [11, 40, 22, 3, 60, 61, 9, 14, 15]]
STOPS = tuple(range(1, 40))
"""Many, so that answers end by them."""
DRAWN = GenerationSettings(
    max_new_tokens=12, temperature=0.6, logprobs=0, logprobs_of="sampling", stop_ids=STOPS
)


def chosen(answer: Generation) -> list[Any]:
    """Its choices, the stop token among them."""
    return [*answer.choices, *([answer.stop] if answer.stop is not None else [])]


def dense_logprobs(model: Any, prompt: list[int], answer: Generation, temperature: float) -> list[float]:
    """Of every choice, by one pass of transformers without a cache."""
    ids = [choice.token for choice in chosen(answer)]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(ids, start=len(prompt) - 1)]


def drawn_answers(
    model: Any, settings: GenerationSettings, count: int = 4
) -> list[tuple[list[int], Generation]]:
    requests = [
        Request(tuple(prompt), replace(settings, seed=seed)) for prompt in PROMPTS for seed in range(count)
    ]
    answers = dict(HfEngine(model, rows=5).answers(requests))
    return [(list(request.prompt), answers[number]) for number, request in enumerate(requests)]


@pytest.mark.parametrize(
    "further",
    [{}, {"top_p": 0.8, "top_k": 30, "min_p": 0.01}, {"repetition_penalty": 1.4, "presence_penalty": 0.5}],
)
@pytest.mark.parametrize(("whose", "temperature"), [("sampling", 0.6), ("sampling", 1.7), ("model", 0.6)])
def test_logprobs_are_of_what_was_asked_and_the_stop_token_has_its_own(
    further: dict[str, Any], whose: Any, temperature: float
) -> None:
    """Cuts and penalties change what is drawn, and never the log-probabilities."""
    model = tiny_model("llama", "sdpa").eval()
    settings = replace(DRAWN, temperature=temperature, logprobs_of=whose, **further)
    answers = drawn_answers(model, settings)
    for prompt, answer in answers:
        expected = dense_logprobs(model, prompt, answer, temperature if whose == "sampling" else 1.0)
        assert [choice.logprob for choice in chosen(answer)] == pytest.approx(expected, abs=1e-5)
        assert (answer.stop is not None) == (answer.finish == "stop")
        if answer.stop is not None:
            assert answer.stopped_by == answer.stop.token
            assert answer.stop.token in STOPS
    assert {answer.finish for _, answer in answers} == {"stop", "length"}


def test_the_likeliest_are_of_the_same_distribution() -> None:
    model = tiny_model("llama", "sdpa").eval()
    answer = HfEngine(model).generate([PROMPTS[0]], replace(DRAWN, logprobs=97, seed=2))[0]
    for choice in chosen(answer):
        assert dict(choice.top)[choice.token] == choice.logprob
        assert sum(torch.tensor([value for _, value in choice.top]).exp()) == pytest.approx(1, abs=1e-4)


def test_greedy_answers_have_the_models_logprobs() -> None:
    model = tiny_model("llama", "sdpa").eval()
    greedy = replace(DRAWN, temperature=0.0)
    answers = [
        HfEngine(model).generate([PROMPTS[0]], replace(greedy, logprobs_of=whose))[0]
        for whose in ("model", "sampling")
    ]
    assert answers[0] == answers[1]


def test_an_answer_may_be_its_stop_token_alone() -> None:
    model = tiny_model("llama", "sdpa").eval()
    engine = HfEngine(model)
    first = engine.generate([PROMPTS[0]], GenerationSettings(max_new_tokens=1))[0].ids[0]
    settings = GenerationSettings(max_new_tokens=5, stop_ids=(first,), logprobs=0)
    answer = engine.generate([PROMPTS[0]], settings)[0]
    assert (answer.ids, answer.finish, answer.stopped_by) == ([], "stop", first)
    assert answer.stop is not None
    assert answer.stop.logprob == pytest.approx(dense_logprobs(model, PROMPTS[0], answer, 1.0)[0], abs=1e-5)


def test_a_stop_string_or_a_limit_leaves_no_stop_token() -> None:
    engine = HfEngine(tiny_model("llama"), decode=lambda ids: "".join(f"<{token}>" for token in ids))
    whole = engine.generate([PROMPTS[0]], GenerationSettings(max_new_tokens=4))[0]
    assert (whole.finish, whole.stop) == ("length", None)
    stopped = engine.generate([PROMPTS[0]], GenerationSettings(stop=(f"<{whole.ids[1]}>",)))[0]
    assert (stopped.finish, stopped.stop) == ("stop", None)


def test_beams_say_their_stop_token() -> None:
    engine = HfEngine(tiny_model("llama", "sdpa").eval())
    answer = engine.generate([PROMPTS[0]], GenerationSettings(num_beams=3, stop_ids=STOPS))[0]
    assert answer.stop is not None
    assert answer.stop.token == answer.stopped_by


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_rollout_counts_scores_that_are_no_numbers(bad: float) -> None:
    """The largest of all numbers, divided by a temperature below 1, would be infinite again."""
    model = tiny_model("llama", "sdpa").eval()
    answer = HfEngine(model).generate([PROMPTS[0]], replace(DRAWN, seed=0, stop_ids=()))[0]
    with torch.no_grad():
        model.lm_head.weight[answer.ids[0]] = bad
    damaged = HfEngine(model).generate([PROMPTS[0]], replace(DRAWN, seed=0, stop_ids=()))[0]
    assert damaged.bad_scores == len(damaged.ids) == 12
    assert all(choice.logprob is not None and choice.logprob <= 0 for choice in damaged.choices)


def test_vllm_refuses_the_logprobs_that_it_has_not() -> None:
    with pytest.raises(GenerationError, match="vLLM has log-probabilities before the temperature alone"):
        sampling(DRAWN, 12)


def test_whose_logprobs_is_one_of_two() -> None:
    with pytest.raises(GenerationError, match="logprobs_of='raw' should be model or sampling"):
        GenerationSettings(logprobs_of="raw")  # type: ignore[arg-type]
