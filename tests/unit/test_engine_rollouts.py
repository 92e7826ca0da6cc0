"""What a rollout asks of the engine: the stop token's log-probability too, those of the distribution that was sampled."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, set_seed

from luthier.api.worker import Worker
from luthier.engine.hf import HfEngine
from luthier.engine.protocol import BASE
from luthier.engine.vllm import sampling
from luthier.types import Generation, GenerationError, GenerationSettings, Request
from tests.tiny import FAMILIES, VOCAB, tiny_model

PROMPTS = [[5, 9, 30, 41, 12], [7, 8], [11, 40, 22, 3, 60, 61, 9, 14, 15]]
STOPS = tuple(range(1, 12))
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


# ---- a prompt of several requests is read once


class Counted:
    """Counts the tokens that a model computes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.passes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        self.passes.append(tuple(kwargs["input_ids"].shape))

    @property
    def prompts(self) -> list[tuple[int, int]]:
        """Rows and tokens of the passes that read prompts."""
        return [shape for shape in self.passes if shape[1] > 1]


def alone(model: Any, request: Request) -> Generation:
    """The answer of an engine that holds one row."""
    return dict(HfEngine(model, rows=1).answers([request]))[0]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_says_what_each_says_alone_and_its_prompt_is_read_once(
    family: str, temperature: float
) -> None:
    """Two groups of four and one prompt by itself: three prompts are read, in one pass."""
    model = tiny_model(family).eval()
    settings = GenerationSettings(
        max_new_tokens=10, temperature=temperature, logprobs=0, logprobs_of="sampling", stop_ids=STOPS[:8]
    )
    prompts = [PROMPTS[0]] * 4 + [PROMPTS[2]] * 4 + [PROMPTS[1]]
    requests = [Request(tuple(ids), replace(settings, seed=seed)) for seed, ids in enumerate(prompts)]
    expected = [alone(model, request) for request in requests]
    engine = HfEngine(model, rows=9)
    next(engine.stream(requests[0]))  # what is asked of every model first
    counted = Counted(model)
    answers = dict(engine.answers(requests))
    assert counted.prompts == [(3, 9)]
    for number, answer in answers.items():
        assert [one.token for one in chosen(answer)] == [one.token for one in chosen(expected[number])]
        mine, theirs = ([one.logprob for one in chosen(one)] for one in (answer, expected[number]))
        assert mine == pytest.approx(theirs, abs=1e-5)
    if temperature:
        assert len({tuple(answer.ids) for answer in answers.values()}) > 3


def test_who_comes_later_takes_the_prompt_of_who_is_there() -> None:
    """Sixteen answers to two prompts through four places: a prompt is read again only once nobody has it."""
    model = tiny_model("llama", "sdpa").eval()
    settings = GenerationSettings(max_new_tokens=14, temperature=1.3, stop_ids=STOPS, logprobs=0)
    requests = [
        Request(tuple(ids), replace(settings, seed=seed))
        for ids in (PROMPTS[0], PROMPTS[2])
        for seed in range(8)
    ]
    expected = [alone(model, request) for request in requests]
    engine = HfEngine(model, rows=4)
    next(engine.stream(requests[0]))
    counted = Counted(model)
    answers = dict(engine.answers(requests))
    assert [answers[number].ids for number in range(16)] == [answer.ids for answer in expected]
    assert sum(rows for rows, _ in counted.prompts) < 5
    lengths = {len(answer.ids) for answer in expected}
    assert len(lengths) > 4, "else nobody would come later than others"


def test_a_cancelled_row_takes_nothing_from_those_that_copied_its_prompt() -> None:
    model = tiny_model("llama", "sdpa").eval()
    request = Request(tuple(PROMPTS[2]), GenerationSettings(max_new_tokens=8))
    expected = alone(model, request)
    engine = HfEngine(model, rows=3)
    first, second = engine.submit(request), engine.submit(request)
    engine.step()
    third = engine.submit(request)
    engine.step()
    engine.cancel(first)
    ends = {}
    while engine.busy:
        ends |= {event.ticket: event.end for event in engine.step() if event.end is not None}
    assert ends == {second: expected, third: expected}


def test_the_server_reads_the_prompt_of_n_answers_once() -> None:
    model = tiny_model("llama", "sdpa").eval()
    request = Request(tuple(PROMPTS[0]), GenerationSettings(max_new_tokens=6, temperature=1.0))
    requests = [replace(request, settings=replace(request.settings, seed=seed)) for seed in range(3)]
    expected = [alone(model, request) for request in requests]
    engine = HfEngine(model, rows=4)
    next(engine.stream(request))
    counted = Counted(model)

    async def asked() -> dict[int, Generation]:
        worker = Worker(engine, 8)
        worker.start()
        ends = {}
        with worker.ask(requests) as asker:
            while asker.waits:
                news = await asker.next()
                if news.event.end is not None:
                    ends[news.number] = news.event.end
        await worker.stop()
        return ends

    ends = asyncio.run(asked())
    assert [ends[number] for number in range(3)] == expected
    assert counted.prompts == [(1, 5)]


def test_a_prompt_is_not_shared_between_adapters() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama", "sdpa"), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    engine = HfEngine(model, rows=6, adapters=("one", "two"))
    settings = GenerationSettings(max_new_tokens=8)
    requests = [Request(tuple(PROMPTS[0]), settings, adapter) for adapter in ("one", "two", BASE) * 2]
    counted = Counted(model.get_base_model())
    answers = dict(engine.answers(requests))
    assert [shape for shape in counted.prompts if shape[1] == 5 and shape[0] == 1][-3:] == [(1, 5)] * 3
    assert [answers[number] for number in range(3)] == [answers[number] for number in range(3, 6)]
    assert len({str(answers[number].ids) for number in range(3)}) == 3


def test_a_model_that_answers_one_by_one_answers_a_group() -> None:
    set_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    settings = GenerationSettings(max_new_tokens=6, temperature=1.0, logprobs=0)
    requests = [Request(tuple(PROMPTS[0]), replace(settings, seed=seed)) for seed in range(3)]
    answers = dict(HfEngine(model, rows=3).answers(requests))
    for number, request in enumerate(requests):
        assert answers[number] == alone(model, request)
        expected = dense_logprobs(model, PROMPTS[0], answers[number], 1.0)
        assert [one.logprob for one in chosen(answers[number])] == pytest.approx(expected, abs=1e-5)


# ---- rows with like and unlike settings are drawn together


def test_each_row_is_drawn_by_its_own_settings() -> None:
    """Every kind of settings at once, twice each, against each request by itself."""
    model = tiny_model("llama", "sdpa").eval()
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "logprobs": 2},
        {"temperature": 1.3, "top_p": 0.6, "logprobs": 0, "logprobs_of": "sampling"},
        {"temperature": 1.3, "top_p": 0.6, "repetition_penalty": 1.7, "logprobs": 2},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logprobs": 0},
    ]
    requests = [
        Request(tuple(PROMPTS[number % 2]), GenerationSettings(max_new_tokens=9, seed=number, **kind))
        for number, kind in enumerate(kinds * 2)
    ]
    answers = dict(HfEngine(model, rows=12).answers(requests))
    for number, request in enumerate(requests):
        expected = alone(model, request)
        assert answers[number].ids == expected.ids, request.settings
        for mine, theirs in zip(answers[number].choices, expected.choices, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_seeds_of_either_sign_draw_differently() -> None:
    engine = HfEngine(tiny_model("llama"), rows=4)
    settings = GenerationSettings(max_new_tokens=12, temperature=1.5)
    seeds = (7, -7, 8)
    assert (
        len({str(engine.generate([PROMPTS[0]], replace(settings, seed=seed))[0].ids) for seed in seeds}) == 3
    )
