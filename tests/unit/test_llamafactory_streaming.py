"""LLaMA-Factory's `streaming` and `buffer_size`."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.recipe.load import load_recipe
from luthier.types import RecipeError

BASE = "model_name_or_path: m\ndo_train: true\ndataset: a\nstage: sft\ntemplate: default\noutput_dir: out\n"


def translated(tmp_path: Path, more: str):  # type: ignore[no-untyped-def]
    file = tmp_path / "file.yaml"
    file.write_text(BASE + more)
    return load_recipe(file)


def test_streaming_is_a_stream_with_its_buffer(tmp_path: Path) -> None:
    plain = translated(tmp_path, "max_steps: 10\nbuffer_size: 7\n").recipe
    assert plain.data.stream is None  # there, too, the key says nothing without streaming
    given = translated(tmp_path, "streaming: true\nmax_steps: 10\nval_size: 20\ndataloader_num_workers: 4\n")
    data, train = given.recipe.data, given.recipe.train
    assert data.stream is not None
    assert (data.stream.buffer, data.dev_split, data.workers, train.max_steps) == (16384, 20, 4, 10)
    assert any("the processes that tokenize" in note for note in given.notes)
    small = translated(tmp_path, "streaming: true\nmax_steps: 10\nbuffer_size: 7\n").recipe.data
    assert small.stream is not None
    assert (small.stream.buffer, small.workers) == (7, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", "streaming: needs max_steps, as there"),
        ("max_steps: 10\nmax_samples: 5\n", "max_samples: does not go with streaming, as there; remove it"),
        ("max_steps: 10\nval_size: 0.1\n", "val_size: with streaming it is a number of rows, as there"),
    ],
)
def test_what_that_tool_refuses_is_refused(tmp_path: Path, more: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        translated(tmp_path, "streaming: true\n" + more)
