"""What is trained is what is served, of rows with pictures: the ids and numbers of prompts, opened from a run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import luthier
from luthier.answering import open_model
from luthier.data.collate import flat_batch
from luthier.data.formats import to_row
from luthier.data.media_template import MediaTemplate
from luthier.data.prompts import posed_part
from luthier.data.read import read_rows
from luthier.data.registry import resolve_datasets
from luthier.recipe.schema import DataSpec
from luthier.run import prepare
from luthier.types import Conversation, DataError, GenerationError, Media, Message, Request
from tests.media import picture
from tests.multimodal import media_model

NATIVE: dict[str, dict[str, Any]] = {
    "own": {},
    "named": {"template": "chatml", "default_system": "Look closely."},
    "limits": {"media": {"image_max_pixels": 4000}},
}
FAMILIES = [("qwen2.5-vl", name) for name in NATIVE] + [
    ("gemma3", "own"),
    ("llava", "own"),
    ("llava", "named"),
]


def _recipe(base: Path, data: Path, folder: Path, **spec: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base)},
        "data": {"train": ["mllm_demo"], "directory": str(data), "cache": str(folder / "cache"), **spec},
        "method": {"type": "lora", "rank": 2},
        "train": {"max_steps": 1, "rows_per_device": 1, "plots": False, "output": str(folder / "run")},
    }


def _llamafactory(base: Path, data: Path, folder: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(base),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset": "mllm_demo",
        "dataset_dir": str(data),
        "template": "qwen2_vl",
        "cutoff_len": 2048,
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "report_to": "none",
    }


def _same_prompts(recipe: dict[str, Any], run: Path, data: Path) -> None:
    """The last prompt of every row, asked as `predict` asks, is the beginning of the sample that was trained."""
    table = prepare(recipe, quiet=True).train
    answerer = open_model(run)
    assert isinstance(answerer.template, MediaTemplate)
    (attr,) = resolve_datasets(["mllm_demo"], DataSpec(directory=str(data)))
    rows = [to_row(raw, attr, "conversation").conversation for raw in read_rows(attr)]
    assert len(rows) == len(table) == 6
    for sample in table:
        conversation = rows[sample.index]
        assert conversation is not None
        request = answerer.request(posed_part(conversation)[0])
        length = len(request.prompt)
        assert list(request.prompt) == sample.input_ids[:length].tolist()
        assert sample.weights[:length].sum() < sample.weights.sum() and sample.weights[length] == 1
        trained = flat_batch([sample]).media
        assert request.opener is not None
        found = request.opener(request.media, torch.tensor([request.prompt]))
        assert found.keys() == trained.keys() and "pixel_values" in found
        for name, values in found.items():
            same = trained[name][:, :length] if name.endswith("type_ids") else trained[name]
            assert torch.equal(values, same), name


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_a_run_is_asked_with_what_it_was_trained_on(
    family: str, name: str, shared_data: Path, tmp_path: Path
) -> None:
    base = media_model(tmp_path / "base", family)
    recipe = _recipe(base, shared_data, tmp_path, **NATIVE[name])
    luthier.train(recipe, quiet=True)
    _same_prompts(recipe, tmp_path / "run", shared_data)


def test_a_llamafactory_run_too(shared_data: Path, tmp_path: Path) -> None:
    recipe = _llamafactory(media_model(tmp_path / "base", "qwen2.5-vl"), shared_data, tmp_path)
    luthier.train(recipe, quiet=True)
    _same_prompts(recipe, tmp_path / "run", shared_data)


def test_the_adapters_own_processor_comes_before_that_of_the_base(shared_data: Path, tmp_path: Path) -> None:
    """The base's file was changed after the training: the run has the one that it was trained with."""
    base = media_model(tmp_path / "base", "qwen2.5-vl")
    recipe = _recipe(base, shared_data, tmp_path)
    luthier.train(recipe, quiet=True)
    file = base / "processor_config.json"
    text = file.read_text(encoding="utf-8")
    assert "12544" in text  # 28 x 28 x 16, the most pixels of an image
    asked = Conversation(
        (Message("user", "?", media=(Media("image", str(picture(tmp_path / "a.png", 300, 300))),)),)
    )
    before = open_model(tmp_path / "run").request(asked).prompt
    file.write_text(text.replace("12544", "3136"), encoding="utf-8")
    assert open_model(tmp_path / "run").request(asked).prompt == before
    assert len(open_model(base).request(asked).prompt) < len(before)


def test_a_processor_that_makes_other_tokens_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """A model that nobody trained here has passed no gate; its first prompt with a picture is compared."""
    answerer = open_model(media_model(tmp_path / "base", "llava"))
    template: Any = answerer.template
    media = (Media("image", str(picture(tmp_path / "a.png"))),)
    asked = Conversation((Message("user", "Who?", media=media),))
    whole = template.reader.process
    monkeypatch.setattr(
        template.reader,
        "process",
        lambda text, media: {"input_ids": [whole(text, media)["input_ids"][0][1:]]},
    )
    with pytest.raises(DataError, match=r"the model's processor makes \d+ tokens"):
        answerer.request(asked)
    monkeypatch.undo()
    assert answerer.request(asked).media == media


def test_an_engine_that_reads_text_alone_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    answerer = open_model(media_model(tmp_path / "base", "llava"))
    request = answerer.request(
        Conversation((Message("user", "Who?", media=(Media("image", str(picture(tmp_path / "a.png"))),)),))
    )
    monkeypatch.setattr(type(answerer.engine), "reads_media", False)
    with pytest.raises(GenerationError, match=r"this engine reads text alone.*generation\.engine=hf"):
        answerer.engine.limit(request)
    assert answerer.engine.limit(Request(request.prompt, request.settings)) > 0
