"""Answers to images: the engine's, many rows at a time, against processor and `generate` of transformers, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForMultimodalLM

from luthier.answering import Answerer, open_model
from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.engine.hf import HfEngine
from luthier.types import Conversation, Generation, Media, Message, Request, Row
from tests.media import picture
from tests.multimodal import KINDS, media_model

SIZES = ((40, 30), (90, 60), (120, 28), (133, 200))
SHOWN = ([0], [], [1, 2], [3], [0], [3, 2, 1])
"""Pictures of each row: one, none, several, and twice the same."""
TOKENS = 12


class Bench:
    """A tiny model with its processor, the requests of some rows, and what plain transformers answers to each."""

    def __init__(self, family: str, folder: Path) -> None:
        base = media_model(folder / "model", family)
        self.pictures = [picture(folder / f"{k}.png", *size, seed=k) for k, size in enumerate(SIZES)]
        self.answerer: Answerer = open_model(base, rows=3)
        self.plain: Any = AutoModelForMultimodalLM.from_pretrained(base).eval()
        self.processor: Any = self.answerer.template.opener.processor  # type: ignore[union-attr]
        self.inputs = [self._inputs(shown) for shown in SHOWN]
        self.requests = [
            self.answerer.request(self.conversation(shown), max_new_tokens=TOKENS, logprobs=0)
            for shown in SHOWN
        ]

    def conversation(self, shown: list[int]) -> Conversation:
        """A text that is longer for more pictures, and they behind it: the tiny Gemma 3 sees no further than 32 tokens."""
        text = "What is it? " * (1 + len(shown))
        media = tuple(Media("image", str(self.pictures[one]), len(text)) for one in shown)
        return Conversation((Message("user", text, media=media),))

    def _inputs(self, shown: list[int]) -> dict[str, Tensor]:
        """The same by transformers alone."""
        parts = [
            {"type": "text", "text": "What is it? " * (1 + len(shown))},
            *[{"type": "image"}] * len(shown),
        ]
        talk = [{"role": "user", "content": parts}]
        text = self.processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        images = [Image.open(self.pictures[one]).convert("RGB") for one in shown] or None
        return dict(self.processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))

    def generated(self, row: int, **options: Any) -> tuple[list[int], list[float]]:
        """Tokens and their log-probabilities."""
        out = self.plain.generate(
            **self.inputs[row],
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=list(self.answerer.template.stop_ids),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        tokens = out.sequences[0, self.inputs[row]["input_ids"].shape[1] :].tolist()
        chosen = zip(out.logits, tokens, strict=False)
        return tokens, [float(logits_1V[0].log_softmax(-1)[token]) for logits_1V, token in chosen]


@pytest.fixture(scope="module", params=list(KINDS))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Bench(request.param, tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


def _told(answer: Generation) -> tuple[list[int], list[float]]:
    choices = [*answer.choices, *([answer.stop] if answer.stop is not None else [])]
    return [choice.token for choice in choices], [choice.logprob or 0.0 for choice in choices]


def test_prompts_and_numbers_are_those_of_processor_and_training(bench: Bench) -> None:
    options = EncodeOptions(2048, "error")
    for shown, request, inputs in zip(SHOWN, bench.requests, bench.inputs, strict=True):
        assert list(request.prompt) == inputs["input_ids"][0].tolist()
        asked = bench.conversation(shown)
        whole = Conversation((*asked.messages, Message("assistant", "A cat.")))
        (sample,) = sft_sample(Row("rows", 0, whole), bench.answerer.template, options).samples
        length = len(request.prompt)
        assert sample.input_ids[:length].tolist() == list(request.prompt) and sample.media == request.media
        if not shown:
            continue
        assert request.opener is not None
        found = request.opener(request.media, torch.tensor([request.prompt]))
        trained = flat_batch([replace(sample, opener=request.opener)]).media
        assert found.keys() == trained.keys() == inputs.keys() - {"input_ids", "attention_mask"}
        for name, values in found.items():
            assert torch.equal(values, inputs[name]), name
            same = trained[name][:, :length] if name.endswith("type_ids") else trained[name]
            assert torch.equal(values, same), name


def _compare(bench: Bench, answers: dict[int, Generation]) -> None:
    assert len(answers) == len(SHOWN)
    for row, answer in answers.items():
        tokens, logprobs = bench.generated(row)
        mine = _told(answer)
        assert mine[0] == tokens, row
        assert mine[1] == pytest.approx(logprobs, abs=2e-5), row


def test_rows_together_answer_as_generate_does_alone(bench: Bench) -> None:
    """Six rows through three places: they are padded on the left, join, leave, and one continues another's prompt."""
    engine: Any = bench.answerer.engine
    _compare(bench, dict(engine.answers(bench.requests)))
    assert engine._together and not engine.busy


def test_rows_one_by_one_answer_the_same(bench: Bench) -> None:
    """Through another engine with one place, in the cache that the model itself has."""
    engine = HfEngine(bench.plain, rows=1)
    _compare(bench, dict(engine.answers(bench.requests)))


def test_the_answers_look_at_the_pictures(bench: Bench) -> None:
    """Else nothing above would notice a picture at the wrong row: other pictures of the same sizes, other numbers."""
    request = bench.requests[2]
    other = picture(bench.pictures[0].parent / "other.png", *SIZES[1], seed=99)
    media = (replace(request.media[0], source=str(other)), request.media[1])
    changed = Request(request.prompt, request.settings, media=media, opener=request.opener)
    first, second = (_told(dict(bench.answerer.engine.answers([one]))[0])[1][0] for one in (request, changed))
    assert abs(first - second) > 1e-3


def test_the_same_prompt_with_other_pictures_is_read_anew(bench: Bench) -> None:
    """Rows that share tokens share keys and values only where they share the pictures."""
    request = bench.requests[0]
    other = picture(bench.pictures[0].parent / "twin.png", *SIZES[0], seed=98)
    twin = Request(
        request.prompt,
        request.settings,
        media=(replace(request.media[0], source=str(other)),),
        opener=request.opener,
    )
    found = dict(bench.answerer.engine.answers([request, twin, request]))
    together = [found[number] for number in range(3)]
    alone = [dict(bench.answerer.engine.answers([one]))[0] for one in (request, twin)]
    for mine, expected in zip(together, (alone[0], alone[1], alone[0]), strict=True):
        assert _told(mine)[0] == _told(expected)[0]
        assert _told(mine)[1] == pytest.approx(_told(expected)[1], abs=2e-5)
    assert abs(_told(together[0])[1][0] - _told(together[1])[1][0]) > 1e-3


def test_beams_are_those_of_generate(bench: Bench) -> None:
    request = bench.answerer.request(bench.conversation(SHOWN[2]), max_new_tokens=TOKENS, num_beams=3)
    answer = dict(bench.answerer.engine.answers([request]))[0]
    tokens, _ = bench.generated(2, num_beams=3, length_penalty=request.settings.length_penalty)
    stops = set(bench.answerer.template.stop_ids)
    assert answer.ids == [token for token in tokens if token not in stops]
