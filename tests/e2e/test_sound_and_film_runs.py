"""Runs on sounds and films: the loss and the answers are those of plain transformers with the model's own processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer
from transformers.utils.import_utils import is_torchvision_available

import luthier
from tests.films import with_torchvision
from tests.media import SOUND_RATE, film, tone
from tests.multimodal import media_model

av = pytest.importorskip("av", reason="films need PyAV: pip install av")
soundfile = pytest.importorskip("soundfile", reason="sounds need soundfile: pip install soundfile")

NAMES = 4
TOKENS = 6
MARKS = {
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}

Inputs = Callable[[str, int], Any]
"""What the processor makes of a text and of the medium of a row."""


def _recipe(folder: Path, kind: str, suffix: str) -> dict[str, Any]:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<{kind}>What is it?"},
                {"role": "assistant", "content": f"It is {k}."},
            ],
            f"{kind}s": [f"{k}{suffix}"],
        }
        for k in range(NAMES)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", f"{kind}s": f"{kind}s"}
    described = {"file_name": "rows.json", "formatting": "openai", "columns": columns}
    return {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": [described],
            "eval": [described],
            "directory": str(folder),
            "cache": str(folder / "cache"),
        },
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 0.05},
        "generation": {"max_new_tokens": TOKENS, "do_sample": False},
        "train": {
            "rows_per_device": NAMES,
            "max_steps": 3,
            "log_every": 1,
            "plots": False,
            "output": str(folder / "run"),
        },
    }


def _assert_it_is_transformers(folder: Path, recipe: dict[str, Any], kind: str, inputs: Inputs) -> None:
    run = luthier.train(recipe, quiet=True).output
    model: Any = AutoModelForMultimodalLM.from_pretrained(folder / "model").eval()
    total, num_targets = 0.0, 0
    for k in range(NAMES):
        before = f"<|im_start|>user\n{MARKS[kind]}What is it?<|im_end|>\n<|im_start|>assistant\n"
        prompt, whole = inputs(before, k), inputs(f"{before}It is {k}.<|im_end|>\n", k)
        start, stop = (
            prompt["input_ids"].shape[1],
            whole["input_ids"].shape[1] - 1,
        )  # the line's end is not learnt
        labels = torch.full_like(whole["input_ids"], -100)
        labels[0, start:stop] = whole["input_ids"][0, start:stop]
        with torch.no_grad():
            total += float(model(**whole, labels=labels).loss) * (stop - start)
        num_targets += stop - start
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(total / num_targets, abs=1e-4)  # the log has four places
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(run)
    trained: Any = PeftModel.from_pretrained(model, run).eval()
    luthier.predict(run, output=folder / "answers", quiet=True)
    lines = [json.loads(line) for line in (folder / "answers" / "generated_predictions.jsonl").open()]
    assert len(lines) == NAMES
    for k, line in enumerate(lines):
        prompt = inputs(f"<|im_start|>user\n{MARKS[kind]}What is it?<|im_end|>\n<|im_start|>assistant\n", k)
        with torch.no_grad():
            out = trained.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        answer = out[0, prompt["input_ids"].shape[1] :]
        assert line["predict"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_a_run_on_sounds_is_that_of_transformers(tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(media_model(tmp_path / "model", "qwen2-audio"))
    for k in range(NAMES):
        soundfile.write(tmp_path / f"{k}.wav", tone(SOUND_RATE, 0.2 + 0.2 * k, 300.0 + 100 * k), SOUND_RATE)

    def inputs(text: str, k: int) -> Any:
        samples, _ = soundfile.read(tmp_path / f"{k}.wav", dtype="float32")
        return processor(text=[text], audio=[samples], sampling_rate=SOUND_RATE, return_tensors="pt")

    _assert_it_is_transformers(tmp_path, _recipe(tmp_path, "audio", ".wav"), "audio", inputs)


def test_a_run_on_films_is_that_of_transformers(tmp_path: Path) -> None:
    """Every frame of short films, as large as the saved processor has them."""
    if not is_torchvision_available():
        with_torchvision(f"{__file__}::test_a_run_on_films_is_that_of_transformers", tmp_path)
        return
    processor = AutoProcessor.from_pretrained(media_model(tmp_path / "model", "qwen2.5-vl"))
    processor.video_processor.size = {"shortest_edge": 4 * 784, "longest_edge": 9 * 784}
    processor.save_pretrained(tmp_path / "model")
    for k in range(NAMES):
        film(tmp_path / f"{k}.avi", frames=4 + 2 * k, fps=2, width=64, height=48 + 8 * k)

    def inputs(text: str, k: int) -> Any:
        with av.open(str(tmp_path / f"{k}.avi")) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        found = {"total_num_frames": len(frames), "fps": 2.0, "frames_indices": [*range(len(frames))]}
        return processor(
            text=[text],
            videos=[frames],
            video_metadata=[found],
            do_sample_frames=False,
            return_tensors="pt",
        )

    _assert_it_is_transformers(tmp_path, _recipe(tmp_path, "video", ".avi"), "video", inputs)
