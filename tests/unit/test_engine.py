"""Generation: what rows say together, drawn, stopped and cancelled, is what plain transformers says of each alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, set_seed

from luthier.engine.hf import BASE, HfEngine
from luthier.engine.key_values import bytes_per_token
from luthier.engine.selftest import answers_together
from luthier.model.logprobs import install_target_forward
from luthier.types import GenerationError, GenerationSettings, Request
from tests.tiny import FAMILIES, VOCAB, tiny_model

PROMPTS = [
    [5, 9, 30, 41, 12],
    [7, 8],
    [11, 40, 22, 3, 60, 61, 9, 14, 15],
    [33],
    [44, 45, 46],
    [20, 21, 22, 23],
]
GREEDY = GenerationSettings(max_new_tokens=12, stop_ids=(1, 50))


def plain_answer(model: Any, prompt: list[int], settings: GenerationSettings) -> list[int]:
    """One token at a time, without any cache."""
    ids, answer = torch.tensor([prompt]), []
    for _ in range(settings.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in settings.stop_ids:
            break
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return answer


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_say_what_each_says_alone(family: str) -> None:
    """Six prompts through three places: rows join while others are under way, and leave at their own length."""
    model, plain = tiny_model(family), tiny_model(family, attention="eager").eval()
    install_target_forward(model)
    engine = HfEngine(model, rows=3)
    expected = [plain_answer(plain, prompt, GREEDY) for prompt in PROMPTS]
    answers = engine.generate(PROMPTS, GREEDY)
    assert [answer.ids for answer in answers] == expected
    assert [answer.finish for answer in answers] == [
        "length" if len(ids) == GREEDY.max_new_tokens else "stop" for ids in expected
    ]
    assert engine._together
    assert not engine.busy


def test_the_lengths_of_the_families_differ() -> None:
    """Else nothing above would leave before its neighbours."""
    lengths = {
        len(plain_answer(tiny_model(family, attention="eager").eval(), prompt, GREEDY))
        for family in FAMILIES
        for prompt in PROMPTS
    }
    assert len(lengths) > 4


def test_a_model_with_another_state_answers_one_by_one() -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    set_seed(0)
    model = MambaForCausalLM(config).eval()
    assert not answers_together(model)
    expected = [
        model.generate(
            torch.tensor([prompt]),
            generation_config=GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1),
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS[:3]
    ]
    settings = GenerationSettings(max_new_tokens=5, stop_ids=(1,))
    answers = HfEngine(model, rows=4).generate(PROMPTS[:3], settings)
    assert [[*answer.ids, *([1] if answer.finish == "stop" else [])] for answer in answers] == expected


class _Unmasked(torch.nn.Module):
    """A model that does not look at its mask: padding changes what it says."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(
        self, input_ids: Tensor, past_key_values: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=True)


def test_a_model_that_ignores_the_mask_answers_one_by_one() -> None:
    assert answers_together(tiny_model("llama", "sdpa").eval())
    assert not answers_together(_Unmasked(tiny_model("llama", "sdpa").eval()))


def test_a_stream_is_the_answer() -> None:
    model = tiny_model("llama")
    engine = HfEngine(model)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        events = list(engine.stream(Request(tuple(prompt), GREEDY)))
        assert [event.choice.token for event in events if event.choice is not None] == answer.ids
        assert [event.end for event in events] == [None] * (len(events) - 1) + [answer]


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    settings = GenerationSettings(max_new_tokens=9, temperature=1.5, top_k=20, seed=3)
    engine = HfEngine(tiny_model("llama"), rows=4)
    together = [answer.ids for answer in engine.generate(PROMPTS, settings)]
    alone = [engine.generate([prompt], settings)[0].ids for prompt in PROMPTS]
    assert together == alone
    assert together != [answer.ids for answer in engine.generate(PROMPTS, replace(settings, seed=4))]


@pytest.mark.parametrize(
    "drawn",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_of_transformers(drawn: dict[str, Any]) -> None:
    """The next token of 1,500 draws against the probabilities that transformers' own generate gives."""
    model, prompt = tiny_model("llama", "sdpa").eval(), PROMPTS[0]
    config = GenerationConfig(
        do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
        **{"top_k": 0, "top_p": 1.0, **drawn},
    )  # fmt: skip
    scores = model.generate(torch.tensor([prompt]), generation_config=config).scores[0][0]
    expected = scores.softmax(-1)
    engine, count = HfEngine(model, rows=64), 1500
    requests = [
        Request(tuple(prompt), GenerationSettings(max_new_tokens=1, seed=seed, **drawn))
        for seed in range(count)
    ]
    found = Counter(answer.ids[0] for _, answer in engine.answers(requests))
    assert all(expected[token] > 0 for token in found)
    likely = (expected > 5 / count).nonzero()[:, 0].tolist()
    statistic = sum(
        (found[token] - count * float(expected[token])) ** 2 / (count * float(expected[token]))
        for token in likely
    )
    # Chi-squared with so many degrees of freedom is below this in all but one in ten thousand.
    freedom = len(likely)
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_penalties_are_those_of_their_formulas() -> None:
    model, prompt = tiny_model("llama", "sdpa").eval(), PROMPTS[0]
    settings = GenerationSettings(max_new_tokens=10, presence_penalty=2.0, frequency_penalty=1.5)
    ids, drawn = torch.tensor([prompt]), []
    for _ in range(10):
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        for token, times in Counter(drawn).items():
            logits[token] -= 2.0 + 1.5 * times
        drawn.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[drawn[-1]]])], dim=1)
    engine = HfEngine(model)
    assert engine.generate([prompt], settings)[0].ids == drawn
    assert engine.generate([prompt], GenerationSettings(max_new_tokens=10))[0].ids != drawn


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    model, prompt = tiny_model("qwen2", "sdpa").eval(), PROMPTS[2]
    config = GenerationConfig(do_sample=False, max_new_tokens=10, repetition_penalty=1.8, eos_token_id=None)
    expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    settings = GenerationSettings(max_new_tokens=10, repetition_penalty=1.8)
    assert HfEngine(model).generate([prompt], settings)[0].ids == expected


@pytest.mark.parametrize("length_penalty", [1.0, 3.0])
def test_beams_are_those_of_transformers(length_penalty: float) -> None:
    model, prompt = tiny_model("llama", "sdpa").eval(), PROMPTS[0]
    config = GenerationConfig(
        num_beams=4, do_sample=False, max_new_tokens=9, length_penalty=length_penalty, eos_token_id=[1, 50], pad_token_id=0,
    )  # fmt: skip
    expected = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    settings = GenerationSettings(
        max_new_tokens=9, num_beams=4, length_penalty=length_penalty, stop_ids=(1, 50)
    )
    answer = HfEngine(model).generate([prompt], settings)[0]
    assert answer.ids == [token for token in expected if token not in (0, 1, 50)]


def test_logprobs_are_of_the_model_itself() -> None:
    model, prompt = tiny_model("llama", "sdpa").eval(), PROMPTS[0]
    settings = GenerationSettings(max_new_tokens=6, temperature=2.0, top_k=9, seed=1, logprobs=3)
    answer = HfEngine(model).generate([prompt], settings)[0]
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *answer.ids]])).logits[0].log_softmax(-1)
    for place, choice in enumerate(answer.choices, start=len(prompt) - 1):
        assert choice.logprob == pytest.approx(float(logprobs[place, choice.token]), abs=1e-4)
        best = logprobs[place].topk(3)
        assert [token for token, _ in choice.top] == best.indices.tolist()
        assert [value for _, value in choice.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def decode(ids: Any) -> str:
    return "".join(f"<{token}>" for token in ids)


def test_a_stop_string_ends_the_answer_even_across_tokens() -> None:
    model, prompt = tiny_model("llama"), PROMPTS[0]
    engine = HfEngine(model, decode=decode)
    whole = engine.generate([prompt], GenerationSettings(max_new_tokens=12))[0].ids
    stop = decode(whole[3:5])[2:-1]
    answer = engine.generate([prompt], GenerationSettings(max_new_tokens=12, stop=("nothing", stop)))[0]
    assert (answer.finish, answer.stopped_by) == ("stop", stop)
    first = min(end for end in range(1, 13) if stop in decode(whole[:end]))
    assert answer.ids == whole[:first]
    with pytest.raises(GenerationError, match="knows no text"):
        HfEngine(model).generate([prompt], GenerationSettings(stop=("x",)))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_that_are_no_numbers_are_counted_and_never_chosen(num_beams: int) -> None:
    model = tiny_model("llama", "sdpa").eval()
    best = HfEngine(model).generate([PROMPTS[0]], GenerationSettings(max_new_tokens=1))[0].ids[0]
    with torch.no_grad():
        model.lm_head.weight[best] = torch.nan
    answer = HfEngine(model).generate(
        [PROMPTS[0]], GenerationSettings(max_new_tokens=4, num_beams=num_beams)
    )[0]
    assert best not in answer.ids
    assert (len(answer.ids), answer.finish, answer.bad_scores) == (4, "length", 4)


def test_a_row_without_any_number_ends_and_the_others_go_on() -> None:
    model = tiny_model("llama", "sdpa").eval()
    expected = HfEngine(model).generate([PROMPTS[1]], GREEDY)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = torch.nan
    answers = HfEngine(model).generate([PROMPTS[2], PROMPTS[1]], GREEDY)
    assert (answers[0].finish, answers[0].ids, answers[0].bad_scores) == ("error", [], 1)
    assert answers[1] == expected


def test_adapters_answer_side_by_side() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    engine = HfEngine(model, rows=6, adapters=("one", "two"))
    requests = [
        Request(tuple(prompt), GREEDY, adapter)
        for prompt in PROMPTS[:2]
        for adapter in ("one", "two", BASE, None)
    ]
    answers = dict(engine.answers(requests))
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = [plain_answer(model, prompt, GREEDY) for prompt in PROMPTS[:2]]
    with model.disable_adapter():
        expected[BASE] = [plain_answer(model, prompt, GREEDY) for prompt in PROMPTS[:2]]
    expected[None] = expected["one"]  # type: ignore[index]
    for number, request in enumerate(requests):
        assert answers[number].ids == expected[request.adapter][number // 4], request.adapter  # type: ignore[index]
    assert len({str(ids) for ids in expected.values()}) == 3
    with pytest.raises(GenerationError, match="there is no 'three'"):
        engine.generate([PROMPTS[0]], GREEDY, adapter="three")


def test_a_cancelled_request_frees_its_place() -> None:
    engine = HfEngine(tiny_model("llama"), rows=1)
    first, second = (engine.submit(Request(tuple(prompt), GREEDY)) for prompt in PROMPTS[:2])
    events = engine.step()
    assert {event.ticket for event in events} == {first}
    ended = engine.cancel(first)
    assert ended is not None
    assert (ended.finish, len(ended.ids)) == ("cancelled", 1)
    expected = HfEngine(tiny_model("llama")).generate([PROMPTS[1]], GREEDY)[0]
    ends = []
    while engine.busy:
        ends += [event.end for event in engine.step() if event.end is not None]
    assert ends == [expected]
    assert engine.cancel(second) is None


def test_the_bound_on_memory_holds() -> None:
    model = tiny_model("llama")
    most = 3 * (5 + 12)
    engine = HfEngine(model, rows=6, memory=most * bytes_per_token(model.config, torch.float32))
    prompts, live = [PROMPTS[0]] * 6, []
    for prompt in prompts:
        engine.submit(Request(tuple(prompt), GREEDY))
    while engine.busy:
        engine.step()
        live.append(engine.running)
    assert max(live) == 3
    assert bytes_per_token(model.config, torch.float32) == 2 * 2 * 2 * 8 * 4


def test_the_model_that_is_lent_stays_as_it_was() -> None:
    model = tiny_model("llama")
    model.train()
    HfEngine(model).generate(PROMPTS, GREEDY)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_length": 5}, "max_length=5 leaves no room"),
        ({"stop": ("x",)}, "knows no text"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs does not go with num_beams"),
    ],
)
def test_what_cannot_be_held_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GenerationError, match=said):
        HfEngine(tiny_model("llama")).generate([PROMPTS[0]], replace(GREEDY, **changes))


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_ends_at_it() -> None:
    engine = HfEngine(tiny_model("llama"))
    settings = GenerationSettings(max_new_tokens=50)
    answer = engine.generate([[5] * 250], settings)[0]
    assert (len(answer.ids), answer.finish) == (6, "length")
    with pytest.raises(GenerationError, match="context of 256 leaves no room"):
        engine.generate([[5] * 256], settings)
    with pytest.raises(GenerationError, match="prompt is empty"):
        engine.generate([[]], settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_settings_out_of_range_name_themselves(wrong: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        GenerationSettings(**wrong)
