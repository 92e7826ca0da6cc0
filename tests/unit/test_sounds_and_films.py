"""Film files and sounds: which frames and samples are taken of them, and what the processor makes of these."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2AudioConfig
from transformers.utils.import_utils import is_torchvision_available

from luthier.data.collate import flat_batch
from luthier.data.media_files import Extent, Film, MediaRules, measure, opened
from luthier.recipe.media import MediaSpec
from luthier.run import prepare
from luthier.types import Media, RowError
from tests.films import with_torchvision
from tests.media import SOUND_RATE, film, picture, tiny_processor, tiny_sound_processor, tone

av = pytest.importorskip("av", reason="films need PyAV: pip install av")
soundfile = pytest.importorskip("soundfile", reason="sounds need soundfile: pip install soundfile")
soxr = pytest.importorskip("soxr", reason="other rates need soxr: pip install soxr")


# --------------------------------------------------------------------------------------------------
# Films


def _shown(found: Any) -> list[int]:
    """The numbers that `film` put into the frames."""
    assert isinstance(found, Film)
    return [frame.getpixel((0, 0))[0] for frame in found.frames]


@pytest.mark.parametrize(
    ("frames", "fps", "rules", "expected"),
    [
        # 24 frames are 3 seconds: two a second
        (24, 8, MediaRules(), [0, 4, 9, 13, 18, 23]),
        (24, 8, MediaRules(video_fps=1.0), [0, 11, 23]),
        (24, 8, MediaRules(video_fps=0.1), [0]),
        (24, 8, MediaRules(video_max_frames=4), [0, 7, 15, 23]),
        (5, 4, MediaRules(video_fps=99.0), [0, 1, 2, 3, 4]),
        (1, 4, MediaRules(), [0]),
    ],
)
def test_frames_are_evenly_spaced(
    frames: int, fps: int, rules: MediaRules, expected: list[int], tmp_path: Path
) -> None:
    """LLaMA-Factory's rule for video_fps and video_maxlen: floor(seconds x fps), at most so many, first to last."""
    for name in ("a.mkv", "a.avi"):  # of which the first does not say how many frames it has
        source = str(film(tmp_path / name, frames=frames, fps=fps))
        medium = Media("video", source)
        found = opened(medium, rules)
        assert _shown(found) == expected, name
        assert isinstance(found, Film)
        assert found.fps == pytest.approx(len(expected) / (frames / fps), rel=1e-2)
        assert measure(medium, rules) == Extent("video", 64, 48, frames=len(expected), fps=found.fps)
    held = base64.b64encode((tmp_path / "a.avi").read_bytes()).decode()
    assert _shown(opened(Media("video", f"data:video/avi;base64,{held}"), rules)) == expected


def test_a_film_that_changed_is_measured_again(tmp_path: Path) -> None:
    medium = Media("video", str(film(tmp_path / "a.avi", frames=8, fps=4)))
    assert measure(medium, MediaRules()).frames == 4
    film(tmp_path / "a.avi", frames=16, fps=4)
    assert measure(medium, MediaRules()).frames == 8


def test_frames_of_a_translated_file_are_made_smaller_first(tmp_path: Path) -> None:
    medium = Media("video", str(film(tmp_path / "a.avi", frames=4, fps=4)))
    rules = MediaRules.of(MediaSpec(video_max_pixels=768), llamafactory=True)
    assert measure(medium, rules) == Extent("video", 32, 24, frames=2, fps=2.0)
    found = opened(medium, rules)
    assert isinstance(found, Film)
    assert [frame.size for frame in found.frames] == [(32, 24)] * 2


def test_broken_films_say_which(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.avi", frames=24, fps=8).read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "empty.mp4").write_bytes(b"")
    soundfile.write(tmp_path / "sound.wav", tone(8000, 0.1), 8000)
    for name, reason in {
        "half.avi": "video file is broken",
        "text.mp4": "video file is broken",
        "empty.mp4": "video file is broken",
        "sound.wav": "video file is broken",
        "none.mp4": "video file is missing",
        ".": "video file is broken",
    }.items():
        with pytest.raises(RowError) as error:
            measure(Media("video", str(tmp_path / name)), MediaRules())
        assert (error.value.reason, str(tmp_path / name) in str(error.value)) == (reason, True), name


# --------------------------------------------------------------------------------------------------
# Sounds


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.wav"])
def test_a_sound_of_any_form_is_one_channel_at_the_models_rate(name: str, tmp_path: Path) -> None:
    samples = tone(44100, 0.5, channels=2)
    soundfile.write(tmp_path / name, samples, 44100)
    medium = Media("audio", str(tmp_path / name))
    found = opened(medium, MediaRules(audio_sampling_rate=SOUND_RATE))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (np.float32, (8000,))
    assert measure(medium, MediaRules(audio_sampling_rate=SOUND_RATE)) == Extent("audio", samples=8000)
    # The same tone, written down at that rate: the mean of both channels; a lossy form is a little off.
    expected = tone(SOUND_RATE, 0.5)[:, 0] * 0.75
    middle = slice(400, -400)
    assert np.abs(found - expected)[middle].max() < (0.02 if name == "a.ogg" else 1e-3)


def test_broken_sounds_say_which(tmp_path: Path) -> None:
    (tmp_path / "text.mp3").write_text("no sound")
    (tmp_path / "empty.flac").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros((0, 1), np.float32), SOUND_RATE)
    for name, reason in {
        "text.mp3": "audio file is broken",
        "empty.flac": "audio file is broken",
        "silent.wav": "audio file is broken",
        "none.mp3": "audio file is missing",
    }.items():
        with pytest.raises(RowError) as error:
            measure(Media("audio", str(tmp_path / name)), MediaRules())
        assert (error.value.reason, str(tmp_path / name) in str(error.value)) == (reason, True), name


# --------------------------------------------------------------------------------------------------
# From file to batch


def _recipe(folder: Path, kind: str, names: list[list[str] | str], **media: Any) -> dict[str, Any]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<{kind}>What is it?"},
                {"role": "assistant", "content": f"It is {k}."},
            ],
            f"{kind}s": [name],
        }
        for k, name in enumerate(names)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", f"{kind}s": f"{kind}s"}
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [{"file_name": "rows.json", "formatting": "openai", "columns": columns}],
            "directory": str(folder),
            "cache": str(folder / "cache"),
            "max_lost": None,
            "media": media,
        },
        "train": {"output": str(folder / "run")},
    }


def test_rows_with_sounds_are_what_the_processor_makes_of_them(tmp_path: Path) -> None:
    processor = tiny_sound_processor(tmp_path / "model")
    Qwen2AudioConfig().save_pretrained(tmp_path / "model")
    for k, (name, rate) in enumerate((("a.wav", SOUND_RATE), ("b.flac", 44100), ("c.ogg", 8000))):
        soundfile.write(tmp_path / name, tone(rate, 0.2 + 0.3 * k, 300.0 + k), rate)
    (tmp_path / "d.flac").write_bytes((tmp_path / "b.flac").read_bytes()[:40])
    recipe = _recipe(tmp_path, "audio", ["a.wav", "b.flac", "none.wav", "d.flac", "c.ogg"])
    data = prepare(recipe, quiet=True)
    (report,) = data.reports
    assert report.examples == {"audio file is missing": [2], "audio file is broken": [3]}
    assert len(data.train) == 3
    for sample, (k, name) in zip(data.train, ((0, "a.wav"), (1, "b.flac"), (4, "c.ogg")), strict=True):
        samples, rate = soundfile.read(tmp_path / name, dtype="float32")
        text = (
            "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>What is it?<|im_end|>\n"
            f"<|im_start|>assistant\nIt is {k}.<|im_end|>\n"
        )
        heard = samples if rate == SOUND_RATE else soxr.resample(samples, rate, SOUND_RATE)
        given = processor(text=[text], audio=[heard], sampling_rate=SOUND_RATE, return_tensors="pt")
        assert sample.input_ids.tolist() == given["input_ids"][0].tolist()
        batch = flat_batch([sample])
        assert set(batch.media) == {"input_features", "feature_attention_mask"}
        for part, values in batch.media.items():
            torch.testing.assert_close(values, given[part], rtol=0, atol=0 if name == "a.wav" else 1e-6)


def test_rows_with_films_are_what_the_processor_makes_of_them(tmp_path: Path) -> None:
    """Files and lists of frames; with the limits of the recipe, which the processor itself keeps."""
    if not is_torchvision_available():
        with_torchvision(f"{__file__}::test_rows_with_films_are_what_the_processor_makes_of_them", tmp_path)
        return
    processor: Any = tiny_processor("qwen2_5_vl", tmp_path / "model")
    Qwen2_5_VLConfig().save_pretrained(tmp_path / "model")
    film(tmp_path / "a.avi", frames=24, fps=8, width=300, height=200)
    film(tmp_path / "b.mkv", frames=9, fps=3, width=100, height=200)
    (tmp_path / "c.mp4").write_text("no film")
    listed = [picture(tmp_path / f"{k}.png", 90, 60, seed=k).name for k in range(3)]
    limits = {"video_min_pixels": 20 * 784, "video_max_pixels": 30 * 784}
    processor.video_processor.size = {"shortest_edge": 784, "longest_edge": 9999 * 784}
    processor.save_pretrained(tmp_path / "model")
    recipe = _recipe(tmp_path, "video", ["a.avi", "c.mp4", "b.mkv", listed], video_max_frames=5, **limits)
    data = prepare(recipe, quiet=True)
    (report,) = data.reports
    assert report.examples == {"video file is broken": [1]}
    chosen = {0: [0, 5, 11, 17, 23], 2: [0, 2, 4, 6, 8], 3: [0, 1, 2]}
    films = {
        0: _frames(tmp_path / "a.avi"),
        2: _frames(tmp_path / "b.mkv"),
        3: [np.asarray(_image(tmp_path / name)) for name in listed],
    }
    processor.video_processor.size = {"shortest_edge": 20 * 784, "longest_edge": 30 * 784}
    assert len(data.train) == len(chosen)
    for sample, (k, indices) in zip(data.train, chosen.items(), strict=True):
        text = (
            "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What is it?<|im_end|>\n"
            f"<|im_start|>assistant\nIt is {k}.<|im_end|>\n"
        )
        frames = np.stack([films[k][index] for index in indices])
        seconds = {0: 3.0, 2: 3.0, 3: 1.5}[k]
        metadata = {
            "total_num_frames": len(indices),
            "fps": len(indices) / seconds,
            "frames_indices": [*range(len(indices))],
        }
        given = processor(
            text=[text],
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert sample.input_ids.tolist() == given["input_ids"][0].tolist()
        assert 20 <= int(given["video_grid_thw"][0, 1:].prod()) // 4 <= 30
        batch = flat_batch([sample])
        for name in ("pixel_values_videos", "video_grid_thw"):
            assert batch.media[name].equal(given[name]), name
        torch.testing.assert_close(
            batch.media["second_per_grid_ts"], torch.tensor(given["second_per_grid_ts"]), rtol=1e-2, atol=0
        )


def _frames(file: Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _image(file: Path) -> Any:
    from PIL import Image

    return Image.open(file).convert("RGB")
