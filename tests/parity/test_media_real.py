"""Real photographs, in LLaMA-Factory's own form of rows, from file to tokens and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from transformers import AutoConfig, Gemma3Config, LlavaConfig, Qwen2_5_VLConfig

from luthier.data.collate import flat_batch
from luthier.data.prepare import PreparedData
from luthier.run import prepare
from luthier.types import DataError
from tests.media import Kind, tiny_processor
from tests.tiny import chat_model

CONFIGS: dict[str, type[Any]] = {
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "gemma3": Gemma3Config,
    "llava": LlavaConfig,
}


def _recipe(model: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The rows have `<image>` in their text and a column of paths beside the data file."""
    return {
        "model": {"path": str(model)},
        "data": {
            "train": ["mllm_demo"],
            "directory": str(data),
            "cache": str(folder / "cache"),
            "max_length": 1024,
        },
        "stage": {"type": "sft"},
        "train": {"output": str(folder / "run")},
    }


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_demo_rows_are_what_the_processor_makes_of_them(
    kind: Kind, shared_data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    processor: Any = tiny_processor(kind, model)
    CONFIGS[kind]().save_pretrained(model)
    assert type(AutoConfig.from_pretrained(model)) is CONFIGS[kind]
    data: PreparedData = prepare(_recipe(model, shared_data, tmp_path), quiet=True)
    rows = json.loads((shared_data / "mllm_demo.json").read_text(encoding="utf-8"))
    (report,) = data.reports
    assert (report.rows, report.lost_rows, len(data.train)) == (len(rows), 0, len(rows))
    for row, sample in zip(rows, data.train, strict=True):
        messages: list[dict[str, Any]] = []
        for turn in row["messages"]:
            before, tag, after = turn["content"].partition("<image>")
            texts = [[{"type": "text", "text": text}] if text else [] for text in (before, after)]
            parts = [*texts[0], *[{"type": "image"}] * bool(tag), *texts[1]]
            messages.append({"role": turn["role"], "content": parts})
        images = [Image.open(shared_data / name).convert("RGB") for name in row["images"]]
        text = processor.apply_chat_template(messages, tokenize=False)
        expected = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
        batch = flat_batch([sample])
        assert set(batch.media) == set(expected) - {"input_ids", "attention_mask"}
        for name, values in batch.media.items():
            assert values.equal(expected[name]), name


def test_a_text_model_says_what_to_do_with_images(shared_data: Path, tmp_path: Path) -> None:
    model = chat_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"mllm_demo.*row 0: the data has images, films or sounds"):
        prepare(_recipe(model, shared_data, tmp_path), quiet=True)
