"""Every example that needs no other run trains a step on the embedded model, with the data that comes with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import luthier
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import OnlineSpec
from tests.multimodal import media_model

ROOT = Path(__file__).parents[2]
NEEDS_RUNS = {"sft_stacked_adapters.yaml", "llamafactory_ppo.yaml", "ppo_reward_model.yaml"}
NUM_ROWS = {"sft_eva": 8, "llamafactory_pt": 8, "sft_tools": 1}
"""Of fewer rows, EVA would look at each for longer, and LLaMA-Factory's blocks of tokens would not fill one."""
PICTURES = ROOT / "examples" / "sft_media.yaml"
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").glob("*.yaml"))
    if path.name not in NEEDS_RUNS and path != PICTURES
]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(
    path: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # examples name their data from there
    overrides = [
        f"model.path={smollm2}",
        f"train.output={tmp_path / 'run'}",
        f"data.cache={tmp_path / 'cache'}",
        "train.max_steps=1",
        "train.save_every=null",
        "train.plots=false",
        "train.log_every=1",
        f"data.max_samples={NUM_ROWS.get(path.stem, 3)}",
        "data.dev_split=0",
        "train.generate_at_eval=null",
        "train.eval_every=null",
        "train.load_best=false",
    ]
    online = isinstance(load_recipe(path).recipe.stage, OnlineSpec)
    if online:
        overrides += ["generation.max_new_tokens=4", "stage.prompts_per_rollout=2", "stage.minibatches=1"]
    result = luthier.train(path, overrides, quiet=True)
    if online:  # whose loss says nothing; its answers are there to be read
        assert (result.output / "samples.jsonl").read_text(encoding="utf-8").count("\n") >= 2
        return
    # An instruct model's loss on short English text; an untrained head would give ln 49152 = 10.8.
    assert 0.5 < result.metrics["train_loss"] < 6
    assert json.loads((result.output / "run.json").read_text(encoding="utf-8"))["files"]


def test_the_example_with_pictures_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model of its family, for all epochs: nothing is lost, the language model alone has learnt."""
    monkeypatch.chdir(ROOT)
    model = media_model(tmp_path / "model", "qwen2.5-vl")
    overrides = [
        f"model.path={model}",
        f"train.output={tmp_path / 'run'}",
        f"data.cache={tmp_path / 'cache'}",
        "train.plots=false",
    ]
    result = luthier.train(PICTURES, overrides, quiet=True)
    lines = [json.loads(line) for line in (result.output / "trainer_log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    (report,) = json.loads((result.output / "run.json").read_text(encoding="utf-8"))["reports"]
    assert (report["rows"], report["dropped"]) == (20, {})
    weights = load_file(result.output / "adapter_model.safetensors")
    assert all(".language_model." in name for name in weights)
