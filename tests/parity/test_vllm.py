"""The engine over vLLM says what the one over transformers says: run in an environment that has vLLM."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from luthier.answering import open_model
from luthier.engine.hf import HfEngine
from luthier.engine.protocol import BASE
from luthier.types import (
    Conversation,
    Generation,
    GenerationError,
    GenerationSettings,
    Message,
    ModelError,
    Request,
)

pytestmark = [
    pytest.mark.skipif(
        util.find_spec("vllm") is None, reason="vLLM is not installed; it has an environment of its own"
    ),
    pytest.mark.slow,
]

PROMPTS = [
    [5, 9, 30, 41, 12],
    [700, 8],
    [11, 4000, 22, 3, 60, 61, 9, 14, 15],
    [33],
    [44, 45, 46],
    [504, 3575, 282, 4649, 314],
]
GREEDY = GenerationSettings(max_new_tokens=16, logprobs=3)
TIE = 1e-4
"""Where the two likeliest tokens are closer than this, either may be chosen."""


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def lora(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model with an adapter that changes its answers, and the adapter's folder."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(plain, config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(folder))
    return model, folder


def decode(ids: Any) -> str:
    """Each token as its number between blanks."""
    return "".join(f" {token} " for token in ids)


@pytest.fixture(scope="module")
def engine(smollm2: Path, lora: tuple[Any, Path]) -> Any:
    from luthier.engine.vllm import VllmEngine

    return VllmEngine(
        str(smollm2), dtype="float32", rows=3, context=256, decode=decode, adapters={"one": lora[1]}
    )


def same_but_for_ties(ours: Generation, theirs: Generation) -> bool:
    """Whether two answers are equal; false where they part at a tie. What parts elsewhere is an error."""
    for mine, other in zip(ours.choices, theirs.choices, strict=False):
        if mine.token != other.token:
            best, second = other.top[0][1], other.top[1][1]
            assert best - second < TIE, (ours.ids, theirs.ids)
            return False
        assert mine.logprob == pytest.approx(other.logprob, abs=2e-4)
    assert ours.ids == theirs.ids and ours.finish == theirs.finish
    return True


@pytest.mark.parametrize(("here", "there"), [(None, "default"), ("one", "default"), (BASE, BASE)])
def test_greedy_answers_are_those_of_transformers(
    engine: Any, lora: tuple[Any, Path], here: str | None, there: str
) -> None:
    """Six prompts through three places, of the base and of its adapter, which is the default."""
    expected = HfEngine(lora[0], rows=3, adapters=("default",)).generate(PROMPTS, GREEDY, there)
    answers = engine.generate(PROMPTS, GREEDY, here)
    same = [same_but_for_ties(ours, theirs) for ours, theirs in zip(answers, expected, strict=True)]
    assert sum(same) >= 5, "more than one tie among six answers"
    assert not engine.busy


def test_base_and_adapter_do_not_mix(engine: Any) -> None:
    """Asked for in turns: vLLM's own layers on a CPU would give the base's rows the adapter."""
    requests = [Request(tuple(PROMPTS[0]), GREEDY, name) for name in ("one", BASE, "one", BASE)]
    answers = dict(engine.answers(requests))
    assert answers[0].ids == answers[2].ids == engine.generate(PROMPTS[:1], GREEDY, "one")[0].ids
    assert answers[1].ids == answers[3].ids == engine.generate(PROMPTS[:1], GREEDY, BASE)[0].ids
    assert answers[0].ids != answers[1].ids


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"temperature": 0.9, "top_k": 1, "seed": 4},
        {"max_length": 12},
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_over_transformers(
    engine: Any, lora: tuple[Any, Path], changes: dict[str, Any]
) -> None:
    settings = replace(GREEDY, **changes)
    expected = HfEngine(lora[0], rows=3, adapters=("default",)).generate(PROMPTS, settings, BASE)
    answers = engine.generate(PROMPTS, settings, BASE)
    assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
    for ours, theirs in zip(answers, expected, strict=True):  # the model's own, before the settings
        for mine, other in zip(ours.choices, theirs.choices, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=2e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in other.top]
    if "top_k" not in changes:
        assert [answer.ids for answer in engine.generate(PROMPTS, GREEDY, BASE)] != [
            answer.ids for answer in answers
        ]


def test_a_seed_draws_the_same_alone_and_among_others(engine: Any) -> None:
    drawn = replace(GREEDY, temperature=1.0, seed=7, top_p=0.95, min_p=0.01)
    together = engine.generate([PROMPTS[0]] * 3, drawn)
    assert together[0].ids == together[1].ids == together[2].ids
    assert engine.generate(PROMPTS, drawn)[0].ids == together[0].ids
    assert engine.generate(PROMPTS[:1], replace(drawn, seed=8))[0].ids != together[0].ids
    assert (
        engine.generate(PROMPTS[:1], replace(drawn, seed=-1))[0].ids
        == engine.generate(PROMPTS[:1], replace(drawn, seed=-1))[0].ids
    )
    free = engine.generate([PROMPTS[0]] * 3, replace(drawn, seed=None))
    assert len({tuple(answer.ids) for answer in free}) == 3


def test_tokens_are_drawn_as_often_as_they_are_likely(engine: Any) -> None:
    """The likeliest first token of 300 seeds, against its probability: within five standard deviations."""
    first = replace(GREEDY, max_new_tokens=1)
    (token, logprob), *_ = engine.generate(PROMPTS[4:5], first, BASE)[0].choices[0].top
    share, count = math.exp(logprob), 300
    requests = [
        Request(tuple(PROMPTS[4]), replace(first, temperature=1.0, seed=seed), BASE) for seed in range(count)
    ]
    found = sum(answer.ids == [token] for _, answer in engine.answers(requests))
    assert abs(found - count * share) < 5 * math.sqrt(count * share * (1 - share))
    assert 0 < found < count


def test_the_stream_is_the_answer(engine: Any) -> None:
    whole = engine.generate(PROMPTS[2:3], GREEDY)[0]
    events = list(engine.stream(Request(tuple(PROMPTS[2]), GREEDY)))
    assert [event.choice for event in events] == list(whole.choices)
    assert [event.end for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].end == whole and whole.finish == "length"


def test_it_ends_at_stop_tokens_and_stop_strings(engine: Any) -> None:
    ids = engine.generate(PROMPTS[2:3], GREEDY)[0].ids
    place = next(number for number in range(3, 16) if ids[number] not in ids[:number])
    by_token = engine.generate(PROMPTS[2:3], replace(GREEDY, stop_ids=(1, ids[place])))[0]
    assert (by_token.ids, by_token.finish, by_token.stopped_by) == (ids[:place], "stop", ids[place])
    text = f" {ids[place - 1]}  {ids[place]} "
    by_text = engine.generate(PROMPTS[2:3], replace(GREEDY, stop=("never", text)))[0]
    assert (by_text.ids, by_text.finish, by_text.stopped_by) == (ids[: place + 1], "stop", text)
    assert not engine.busy and not engine._engine.has_unfinished_requests()


def test_what_is_cancelled_leaves_its_place(engine: Any) -> None:
    whole = engine.generate(PROMPTS[:1], GREEDY)[0]
    tickets = [engine.submit(Request(tuple(prompt), GREEDY)) for prompt in PROMPTS[:4]]
    assert (engine.waiting, engine.running) == (4, 0)
    engine.step()
    assert (engine.waiting, engine.running) == (1, 3)
    gone, waited = engine.cancel(tickets[1]), engine.cancel(tickets[3])
    assert gone.finish == waited.finish == "cancelled"
    assert len(gone.ids) <= 1 and waited.ids == []
    assert engine.cancel(tickets[1]) is None
    ends = {}
    while engine.busy:
        ends |= {event.ticket: event.end for event in engine.step() if event.end is not None}
    assert set(ends) == {tickets[0], tickets[2]}
    assert ends[tickets[0]].ids == whole.ids
    engine.submit(Request(tuple(PROMPTS[0]), GREEDY))
    engine.step()
    assert engine.abandon() == [] and not engine.busy
    assert engine.generate(PROMPTS[:1], GREEDY)[0].ids == whole.ids


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([5], {"num_beams": 2}, "num_beams: vLLM's engine searches no beams"),
        ([5], {"temperature": 0.001}, "vLLM draws at 0.01 or more, or greedily at 0"),
        ([5], {"temperature": 3.0}, "vLLM cannot hold these settings: temperature must be in"),
        ([5], {"presence_penalty": 3.0}, "vLLM cannot hold these settings: presence_penalty must be in"),
        ([5] * 256, {}, "the model's context of 256 leaves no room"),
        ([10**6], {}, "the prompt has token 1000000, and the model's vocabulary 49152 tokens"),
        ([], {}, "the prompt is empty"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_cannot_be_held_is_refused_at_once(
    engine: Any, prompt: list[int], changes: dict[str, Any], message: str
) -> None:
    for ask in (engine.limit, engine.submit):
        with pytest.raises(GenerationError, match=message):
            ask(Request(tuple(prompt), replace(GREEDY, **changes)))
    with pytest.raises(GenerationError, match=message):
        list(engine.stream(Request(tuple(prompt), replace(GREEDY, **changes))))
    assert not engine.busy


def test_a_model_that_is_opened_answers_with_either_engine(smollm2: Path) -> None:
    """The same prompt, settings and text, from a folder; without ties, because the test above counts those."""
    conversation = Conversation((Message("user", "Name three colours."),))
    texts = []
    for name in ("hf", "vllm"):
        opened = open_model(smollm2, engine=name, rows=2)  # type: ignore[arg-type]
        request = opened.request(conversation, max_new_tokens=24)
        texts.append(opened.text(opened.engine.generate([request.prompt], request.settings)[0]))
        assert opened.engine.rows == 2 and opened.engine.context_length == 8192
    assert texts[0] == texts[1] and texts[0]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing"):
        open_model(tmp_path / "nothing", engine="vllm")


def test_a_folder_of_an_adapter_is_enough(lora: tuple[Any, Path]) -> None:
    """Merged over transformers, added over vLLM; there requests may ask for the base below it, too."""
    conversation = Conversation((Message("user", "Name three colours."),))
    merged, opened = open_model(lora[1]), open_model(lora[1], engine="vllm", rows=2)
    request = opened.request(conversation, max_new_tokens=24)
    assert request == merged.request(conversation, max_new_tokens=24)
    answers = [who.engine.generate([request.prompt], request.settings)[0].ids for who in (merged, opened)]
    assert answers[0] == answers[1]
    assert opened.engine.choices == ("default", BASE)
    assert opened.engine.generate([request.prompt], request.settings, BASE)[0].ids != answers[0]
