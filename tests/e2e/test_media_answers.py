"""Answers to pictures through the verbs: predict, chat, serve, export, evaluate and answers at evaluations.

A tiny Qwen2.5-VL is trained on real photographs, and what every verb says of them is compared with plain transformers on
what was saved.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoTokenizer, Qwen2_5_VLProcessor
from typer.testing import CliRunner

import luthier
from luthier.answering import open_model
from luthier.api.served import Served
from luthier.api.server import load
from luthier.chat.session import Session
from luthier.cli import app
from luthier.data.processors import processor_class
from luthier.export_verb import export
from luthier.types import CheckpointError, DataError, GenerationError, LuthierError
from tests.media import picture
from tests.multimodal import media_model
from tests.serving import Running, running
from tests.tiny import chat_model

TOKENS = 8
MARKS = "<|vision_start|><|image_pad|><|vision_end|>"


class Trained:
    """A run on the demonstration's photographs, and what transformers makes of the same files and texts."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data, self.base, self.run = data, media_model(folder / "base", "qwen2.5-vl"), folder / "run"
        self.recipe = {
            "model": {"path": str(self.base)},
            "data": {
                "train": ["mllm_demo"],
                "eval": ["mllm_demo"],
                "directory": str(data),
                "cache": str(folder / "cache"),
            },
            "method": {"type": "lora", "rank": 8},
            "optim": {"lr": 0.02},
            "generation": {"max_new_tokens": TOKENS},
            "train": {
                "rows_per_device": 2,
                "max_steps": 6,
                "eval_every": 6,
                "save_every": 6,
                "generate_at_eval": {},
                "plots": False,
                "output": str(self.run),
            },
        }
        self.trained = luthier.train(self.recipe, quiet=True)
        self.rows = json.loads((data / "mllm_demo.json").read_text(encoding="utf-8"))
        base: Any = AutoModelForMultimodalLM.from_pretrained(self.base)
        self.model: Any = PeftModel.from_pretrained(base, self.run).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.run)
        self.processor: Any = processor_class(Qwen2_5_VLProcessor).from_pretrained(self.run)

    def photograph(self, row: int) -> Path:
        return self.data / self.rows[row]["images"][0]

    def inputs(self, turns: list[dict[str, str]], images: list[Path]) -> Any:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        text = text.replace("<image>", MARKS)
        opened = [Image.open(one).convert("RGB") for one in images]
        return self.processor(text=[text], images=opened, add_special_tokens=False, return_tensors="pt")

    def answer(self, turns: list[dict[str, str]], images: list[Path], model: Any = None) -> str:
        """The greedy answer by plain transformers."""
        inputs = self.inputs(turns, images)
        stop = self.tokenizer.eos_token_id
        out = (model or self.model).generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=stop
        )
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Trained:
    torch.set_num_threads(1)
    return Trained(tmp_path_factory.mktemp("seen"), shared_data)


def _ask(path: Path, text: str) -> tuple[list[dict[str, str]], list[Path]]:
    return [{"role": "user", "content": f"<image>{text}"}], [path]


# ---- predict, evaluations, evaluate, export


def test_predict_answers_rows_as_transformers_does(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "answers"
    words = ["predict", str(trained.run), "--data", "mllm_demo", "--output", str(output)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (output / "generated_predictions.jsonl").open(encoding="utf-8")]
    assert len(lines) == len(trained.rows)
    for line, row in zip(lines, trained.rows, strict=True):
        turns, images = row["messages"][:-1], [trained.data / name for name in row["images"]]
        ids = trained.inputs(turns, images)["input_ids"][0].tolist()
        assert line["prompt"] == trained.tokenizer.decode(ids)
        assert line["predict"] == trained.answer(turns, images)
        assert line["label"] == row["messages"][-1]["content"]
    assert len({line["predict"] for line in lines}) > 1


def test_predictions_are_not_mixed_with_those_of_another_picture(trained: Trained, tmp_path: Path) -> None:
    """A file beside its pictures, which nobody described: the columns say what they are."""
    picture(tmp_path / "a.png", 60, 40, seed=3)
    row = {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}]}
    broken = row | {"images": ["gone.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([row | {"images": ["a.png"]}, broken]), encoding="utf-8")
    words: Any = {"data": [tmp_path / "rows.json"], "output": tmp_path / "out", "quiet": True}
    result = luthier.predict(trained.run, **words)
    assert [one.predict for one in result.predictions] == [trained.answer(*_ask(tmp_path / "a.png", "What?"))]
    (left,) = result.metrics["not_answered"]
    assert left["row"] == 1 and left["reason"].startswith("image file is missing")
    again = luthier.predict(trained.run, **words)
    assert again.metrics["predicted_before"] == 1
    picture(tmp_path / "a.png", 60, 40, seed=4)
    with pytest.raises(CheckpointError, match="holds another prediction: media"):
        luthier.predict(trained.run, **words)


def test_answers_at_evaluations_see_the_photographs(trained: Trained, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained.run / "trainer_log.jsonl").open(encoding="utf-8")]
    told = next(line for line in lines if "eval_rouge-l" in line)
    result = luthier.predict(trained.run, output=tmp_path / "out", quiet=True)
    for name in ("rouge-l", "bleu-4", "chrf"):
        assert told[f"eval_{name}"] == pytest.approx(result.metrics[f"predict_{name}"], abs=1e-3)


def test_evaluate_has_the_loss_of_training(trained: Trained, shared_data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (trained.run / "trainer_log.jsonl").open(encoding="utf-8")]
    told = next(line["eval_loss"] for line in lines if "eval_loss" in line)
    own = luthier.evaluate(trained.run, quiet=True).report["perplexity"][0]["target"]
    assert own["loss"] == pytest.approx(told, abs=1e-4)
    named = luthier.evaluate(trained.run, perplexity=["mllm_demo"], window=300, quiet=True).report
    (entry,) = named["perplexity"]
    assert entry["target"]["left_out"] == {"images, films or sounds, and longer than the window": 2}


def test_the_export_is_compared_on_photographs(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = export(trained.run, output=out, quiet=True)
    assert result.passed, result.report["checks"]
    assert result.report["probes"]["origin"] == "data.eval"
    merged = AutoModelForMultimodalLM.from_pretrained(out).eval()
    question = _ask(trained.photograph(0), "Who are they?")
    answerer = open_model(out)
    session = Session(answerer, settings={"max_new_tokens": TOKENS})
    session.attach("image", trained.photograph(0))
    told = "".join(piece.text for piece in session.ask("Who are they?"))
    assert told == trained.answer(*question, model=merged) == trained.answer(*question)


def test_a_projector_that_was_lost_is_found(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    """Words alone would not tell: without rows that have a picture this fault passes."""
    from luthier.exporting import answers

    whole = answers._output
    calls = []

    def faulty(model: Any, ids: Any, probe: Any) -> Any:
        if probe.media:
            calls.append(probe)
            if not isinstance(model, PeftModel):  # the written one
                with torch.no_grad():
                    model.model.visual.merger.mlp[2].weight.zero_()
        return whole(model, ids, probe)

    monkeypatch.setattr(answers, "_output", faulty)
    result = export(trained.run, output=tmp_path / "merged", quiet=True)
    failed = {check["name"] for check in result.report["checks"] if not check["passed"]}
    assert calls and {"mean KL", "logits"} <= failed


def test_an_export_without_data_shows_a_built_in_picture(trained: Trained, tmp_path: Path) -> None:
    result = export(trained.base, output=tmp_path / "copy", quiet=True)
    assert result.passed and result.report["probes"]["origin"].endswith("and a built-in picture")


def test_rollouts_on_pictures_are_refused(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def short(answers, **_):\n    return [-len(a) for a in answers]\n")
    recipe = trained.recipe | {
        "stage": {
            "type": "grpo",
            "rewards": [{"type": "function", "path": f"{tmp_path / 'reward.py'}:short"}],
        },
        "train": {"output": str(tmp_path / "run"), "max_steps": 1},
    }
    with pytest.raises(LuthierError, match=r"row 0: it holds images.*ppo and grpo answer text alone"):
        luthier.train(recipe, quiet=True)


# ---- chat


@pytest.fixture(scope="module")
def session_of(trained: Trained) -> Any:
    answerer = open_model(trained.run)
    return lambda: Session(answerer, settings={"max_new_tokens": TOKENS})


def test_chat_shows_what_is_attached(trained: Trained, tmp_path: Path) -> None:
    first, second = trained.photograph(0), trained.photograph(1)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(first.read_bytes()[:2000])
    saved = tmp_path / "talk.jsonl"
    lines = [
        "/image",
        f"/image {tmp_path / 'gone.png'}",
        f"/image {broken}",
        f"/audio {first}",
        f"/image {first}",
        "Who?",
        f"/image {second}",
        f"/image {first}",
        "And these?",
        "And now?",
        f"/save {saved}",
    ]
    words = ["chat", str(trained.run), f"max_new_tokens={TOKENS}"]
    done = CliRunner().invoke(app, words, input="\n".join(lines) + "\n")
    assert done.exit_code == 2  # three files could not be shown
    turns: list[dict[str, str]] = []
    answers, images = [], []
    asked = (("Who?", [first]), ("And these?", [second, first]), ("And now?", []))
    for text, shown in asked:
        turns.append({"role": "user", "content": "<image>" * len(shown) + text})
        images += shown
        answers.append(trained.answer(turns, images))
        turns.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout.splitlines() == "\n".join(answers).splitlines()
    notes = done.stderr
    for note in (
        "nothing is attached; /image FILE shows one",
        f"error: image file is missing: {tmp_path / 'gone.png'}",
        f"error: image file is broken: {broken}",
        "error: there are audios, and Qwen2_5_VLProcessor takes none here",
        f"the next question shows {second}, {first}",
    ):
        assert note in notes, note
    # What was said is a row of training data, pictures among it.
    result = luthier.predict(trained.run, data=[saved], output=tmp_path / "out", quiet=True)
    assert [one.predict for one in result.predictions] == answers[-1:]


def test_chat_takes_pictures_back(session_of: Any, trained: Trained) -> None:
    session = session_of()
    session.attach("image", trained.photograph(0))
    list(session.ask("Who?"))
    assert session.attached == () and len(session.request().media) == 1
    session.undo()
    assert session.messages == []
    for _ in range(60):
        session.attach("image", trained.photograph(0))
    with pytest.raises(GenerationError, match="all that question and answer may have together"):
        session.ask("Who?")
    assert len(session.attached) == 60 and session.messages == []
    session.clear()
    assert session.attached == ()


def test_a_model_without_eyes_says_so(tmp_path: Path) -> None:
    session = Session(open_model(chat_model(tmp_path / "model")))
    file = picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="this model takes no images: it has no processor for them"):
        session.attach("image", file)
    with running(Served("text", session.answerer)) as server:
        found = _posted(server, [_image(file.read_bytes())], model="text")
        assert found == (400, "this model takes no images: it has no processor for them")


# ---- serve


@pytest.fixture(scope="module")
def server(trained: Trained) -> Iterator[Running]:
    model = load(trained.run, {"max_new_tokens": TOKENS}, name="seen", rows=4)
    with running(model) as found:
        yield found


def _image(content: bytes, kind: str = "png", **fields: Any) -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def _said(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def _posted(server: Running, parts: list[Any], model: str = "seen") -> tuple[int, str]:
    text = {"type": "text", "text": "Who?"}
    body = {"model": model, "messages": _said(*parts, text)}
    status, _, answer = server.send("/v1/chat/completions", body)
    return status, answer["error"]["message"]


def test_the_server_answers_to_photographs(server: Running, trained: Trained) -> None:
    client, files = server.client(), [trained.photograph(row) for row in range(2)]
    for shown in (files[:1], files[1:], files):
        parts = [_image(file.read_bytes(), "jpeg") for file in shown]
        turns = _said(*parts, {"type": "text", "text": "Who are they?"})
        answer = client.chat.completions.create(model="seen", messages=turns)
        plain = [{"role": "user", "content": "<image>" * len(shown) + "Who are they?"}]
        assert answer.choices[0].message.content == trained.answer(plain, shown)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == trained.inputs(plain, shown)["input_ids"].shape[1]
        pieces = client.chat.completions.create(model="seen", messages=turns, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
        assert text == answer.choices[0].message.content


def test_what_is_not_sent_is_not_opened(server: Running, trained: Trained, tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png")
    for url in (f"file://{file}", str(file), "http://127.0.0.1:1/a.png", "https://example.com/a.png"):
        status, message = _posted(server, [{"type": "image_url", "image_url": {"url": url}}])
        assert status == 400 and "nothing is fetched and no file is opened here" in message
    status, message = _posted(server, [{"type": "input_audio", "input_audio": {"data": str(file)}}])
    assert (status, message.rpartition(": ")[2]) == (400, "the data of a sound is base64")
    wanted = [
        ([{"type": "image", "image": str(file)}], "a part of type image is not supported"),
        ([{"type": "file", "file": {"file_id": "a"}}], "a part of type file is not supported"),
        ([_image(file.read_bytes(), detail="low")], "detail can be auto alone"),
        (
            [{"type": "image_url", "text": "a"}],
            "a part of type image_url has the field image_url and no other",
        ),
        ([_image(b"no picture")], "image file is broken"),
        ([_image(trained.photograph(0).read_bytes()[:2000], "jpeg")], "image file is broken"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], "takes none here"),
        ([_image(_huge())], "image is too large: at most 50,000,000 pixels are taken"),
    ]
    for parts, expected in wanted:
        status, message = _posted(server, parts)
        assert status == 400 and expected in message and len(message) < 400, message
    with pytest.raises(openai.BadRequestError, match="context has 512 tokens"):
        many = [_image(trained.photograph(0).read_bytes(), "jpeg")] * 40
        server.client().chat.completions.create(model="seen", messages=_said(*many), max_tokens=500)


def _huge() -> bytes:
    """The head of a PNG of 400 million pixels, in a hundred bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )
