"""The processor beside a trained model prepares pictures as training did, its limits of pixels among it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PaddleOCRVLProcessor, Qwen2_5_VLProcessor
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

import luthier
from luthier.data.collate import flat_batch
from luthier.data.media_tokens import MediaReader
from luthier.data.processors import processor_class
from luthier.export_verb import export
from luthier.model.processor import PROCESSOR_FILES, processor_files, with_settings
from luthier.recipe.media import MediaSpec
from luthier.run import prepare
from luthier.types import Media, RecipeError
from tests.media import Kind, media_tokenizer, tiny_processor
from tests.multimodal import media_model

TOKEN = 28 * 28
LIMITS = {"image_max_pixels": 6 * TOKEN, "image_min_pixels": 3 * TOKEN}


def _recipe(model: Path, data: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {
            "train": ["mllm_demo"],
            "directory": str(data),
            "cache": str(folder / "cache"),
            "media": LIMITS,
            **sections.pop("data", {}),
        },
        "optim": {"lr": 0.01},
        "train": {
            "output": str(folder / "run"),
            "rows_per_device": 6,
            "max_steps": 1,
            "save_every": 1,
            "plots": False,
        },
        **sections,
    }


def _pictures(data: Path) -> list[list[Path]]:
    """Of each row."""
    rows = json.loads((data / "mllm_demo.json").read_text(encoding="utf-8"))
    return [[data / name for name in row["images"]] for row in rows]


def _read(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]


def _tokens(grids: Any) -> set[int]:
    """Of each image, four patches a token."""
    return {int(count) // 4 for count in np.asarray(grids).prod(axis=-1)}


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "lora", "rank": 2}], ids=["full", "lora"])
def test_whoever_loads_the_model_sees_what_training_saw(
    method: dict[str, Any], shared_data: Path, tmp_path: Path
) -> None:
    """Checkpoint, finished run and merged model, read by transformers alone, on real pictures, bit by bit."""
    base = media_model(tmp_path / "base", "qwen2.5-vl")
    recipe = _recipe(base, shared_data, tmp_path, method=method)
    trained = [flat_batch([sample]).media for sample in prepare(recipe, quiet=True).train]
    luthier.train(recipe, quiet=True)
    folders = [tmp_path / "run" / "checkpoint-1", tmp_path / "run"]
    if method["type"] == "lora":
        assert export(tmp_path / "run", output=tmp_path / "merged", quiet=True).passed
        folders.append(tmp_path / "merged")
    for folder in folders:
        processor: Any = processor_class(Qwen2_5_VLProcessor).from_pretrained(folder)
        assert dict(processor.image_processor.to_dict()["size"]) == {
            "shortest_edge": 3 * TOKEN,
            "longest_edge": 6 * TOKEN,
        }
        for files, media in zip(_pictures(shared_data), trained, strict=True):
            text = "<|vision_start|><|image_pad|><|vision_end|>" * len(files)
            given = processor(images=_read(files), text=[text], return_tensors="pt")
            assert given["image_grid_thw"].equal(media["image_grid_thw"])
            assert given["pixel_values"].equal(media["pixel_values"])
            assert _tokens(given["image_grid_thw"]) <= {3, 4, 5, 6}
    # And the limits are felt: the base's own processor makes more of these pictures.
    unlimited: Any = processor_class(Qwen2_5_VLProcessor).from_pretrained(base)
    for files in _pictures(shared_data):
        assert min(_tokens(unlimited.image_processor(images=_read(files))["image_grid_thw"])) > 6


def test_another_image_processor_is_saved_with_its_limits(shared_data: Path, tmp_path: Path) -> None:
    """PaddleOCR-VL's, other sums and another order than Qwen2.5-VL's, from a file with the keys' earlier names."""
    token = "<|IMAGE_PLACEHOLDER|>"
    tokenizer: Any = media_tokenizer(
        ["<|im_end|>", token], "{{ '' }}", eos="<|im_end|>", named={"image_token": token}
    )
    own = PaddleOCRVLImageProcessorPil(size={"shortest_edge": 2 * TOKEN, "longest_edge": 99 * TOKEN})
    values = own.to_dict() | {"min_pixels": 2 * TOKEN, "max_pixels": 99 * TOKEN}
    del values["size"]
    reader = MediaReader(PaddleOCRVLProcessor(own, tokenizer, chat_template="{{ '' }}"), MediaSpec(**LIMITS))
    assert reader.settings == {
        "image_processor": {"size": {"shortest_edge": 3 * TOKEN, "longest_edge": 6 * TOKEN}}
    }
    written = with_settings({PROCESSOR_FILES[1]: json.dumps(values).encode()}, reader.settings)
    (tmp_path / PROCESSOR_FILES[1]).write_bytes(written[PROCESSOR_FILES[1]])
    loaded = PaddleOCRVLImageProcessorPil.from_pretrained(tmp_path)
    for file in (file for files in _pictures(shared_data) for file in files):
        medium = Media("image", str(file))
        ids = tokenizer(reader.expansion(medium), return_tensors="pt", add_special_tokens=False)["input_ids"]
        given = loaded(images=_read([file]), return_tensors="pt")
        media = reader([medium], ids)
        assert media.keys() == given.keys()
        for name, value in media.items():
            assert value.equal(given[name]), name
        assert _tokens(given["image_grid_thw"]) <= {3, 4, 5, 6}


def test_files_without_a_part_for_films_get_one() -> None:
    """It read the images' file, whose limits are other ones now; values that nobody changed keep their bytes."""
    images = {"size": {"shortest_edge": 5, "longest_edge": 9}, "max_pixels": 9}
    files = {"preprocessor_config.json": json.dumps(images).encode()}
    found = with_settings(files, {"image_processor": {"size": {"longest_edge": 7}}, "video_processor": {}})
    assert {name: json.loads(content) for name, content in found.items()} == {
        "preprocessor_config.json": {"size": {"longest_edge": 7}},
        "video_preprocessor_config.json": images,
    }
    whole = {"image_processor": {"size": {"longest_edge": 9}}, "video_processor": {"max_pixels": 3}}
    files = {"processor_config.json": json.dumps(whole).encode(), "video_preprocessor_config.json": b"{ }"}
    found = with_settings(files, {"image_processor": {"size": {"longest_edge": 7}}, "video_processor": {}})
    assert json.loads(found["processor_config.json"]) == whole | {
        "image_processor": {"size": {"longest_edge": 7}}
    }
    assert found["video_preprocessor_config.json"] == b"{ }"
    assert with_settings(files, {}) == files


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_processor_that_cannot_say_an_area_refuses_one(kind: Kind, tmp_path: Path) -> None:
    processor = tiny_processor(kind, tmp_path)
    with pytest.raises(
        RecipeError, match=r"data\.media\.image_max_pixels: .*resizes by a rule of its own.*remove"
    ):
        MediaReader(processor, MediaSpec(image_max_pixels=5000))
    # A translated file shrinks before the processor sees an image, as LLaMA-Factory does; nothing can be said of it.
    assert MediaReader(processor, MediaSpec(image_max_pixels=5000), llamafactory=True).settings == {}


def test_limits_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"image_max_pixels: .*allows 784 to 12544 pixels.*no least and 700"
    ):
        MediaReader(tiny_processor("qwen2_5_vl", tmp_path), MediaSpec(image_max_pixels=700))


def test_a_translated_file_says_the_nearest_limits(shared_data: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's own of 1,024 to 589,824 pixels, cut to what the processor allows."""
    base = media_model(tmp_path / "base", "qwen2.5-vl")
    recipe = _recipe(base, shared_data, tmp_path, method={"type": "lora", "rank": 2})
    recipe["data"] |= {"rules": "llamafactory", "media": {"image_max_pixels": 6 * TOKEN}}
    luthier.train(recipe, quiet=True)
    saved = json.loads(processor_files(str(tmp_path / "run"), {})[PROCESSOR_FILES[0]])
    assert saved["image_processor"]["size"] == {"shortest_edge": 1024, "longest_edge": 6 * TOKEN}
