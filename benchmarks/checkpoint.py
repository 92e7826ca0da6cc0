"""How long the training loop waits for a checkpoint: in the background, in the foreground, and transformers' own.

    python benchmarks/checkpoint.py --model FOLDER --rounds 5

The model is trained in full (weights and AdamW's state are written) and with LoRA. In every round each
contender saves once, in an order that turns from round to round, and trains a few steps around it. Reported
are the *stall*, the seconds that the loop stands still, and the *loss*, by how much the steps around the
checkpoint took longer than the same number of steps without one (the writing thread needs a core, too). The
ratio is taken inside each round; ours flush to the disk and hash what they wrote, transformers does neither.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
from transformers import AutoTokenizer, Seq2SeqTrainer, TrainerState
from transformers.trainer_callback import ExportableState

import luthier
from luthier.assemble import build_model
from luthier.data.encode import EncodeOptions
from luthier.environment import detect_hardware
from luthier.material import load_tokens
from luthier.model.load import locate
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.show import quiet_libraries
from luthier.stages import build_stage
from luthier.trainer.arguments import training_arguments
from luthier.trainer.plugins import load_schedule
from luthier.trainer.trainer import PeftTrainer
from luthier.types import Sample

TOKENS, STEPS = 256, 3


class Loop:
    """One contender's trainer on a model that is trained for real between the checkpoints."""

    def __init__(self, model_path: str, method: dict[str, Any], folder: Path, contender: str) -> None:
        tree = {
            "model": {"path": model_path},
            "data": {"train": ["made"]},
            "method": method,
            "train": {"output": str(folder), "save_every": 1, "plots": False, "rows_per_device": 1},
        }
        hardware = detect_hardware()
        recipe = resolve(load_recipe(tree), hardware).recipe
        source = locate(recipe.model)
        self.model, trained_by = build_model(recipe, source, hardware, load_tokens(recipe, source, print)[1])
        self.contender, self.folder = contender, folder
        self.stage = build_stage(recipe.stage, EncodeOptions.of(recipe.data, "sft"))
        self.trainer = PeftTrainer(
            model=self.model,
            args=training_arguments(recipe, use_cpu=hardware.device == "cpu"),
            stage=self.stage,
            method=trained_by,
            optim=recipe.optim,
            steps=None,
            eval_sets={},
            tokenizer=AutoTokenizer.from_pretrained(source.path),
            callbacks=[],
            save_total_limit=1,
            async_save=contender == "background",
            schedule=load_schedule(recipe.optim.schedule_function, None),
        )
        self.trainer.create_optimizer_and_scheduler(1000)
        self.trainer._tr_loss = torch.tensor(0.0)  # what `train` sets first
        kept = [*self.trainer.callback_handler.callbacks, self.trainer.control]
        self.trainer.state = TrainerState(
            max_steps=1000, stateful_callbacks=[one for one in kept if isinstance(one, ExportableState)]
        )
        rng = np.random.default_rng(0)
        ids = rng.integers(3, 1000, TOKENS).astype(np.int32)
        self.sample = Sample(ids, np.ones(TOKENS, np.float32))

    def step(self) -> None:
        self.trainer.training_step(self.model, [self.stage.collate([self.sample])])
        self.trainer.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()
        self.trainer.state.global_step += 1

    def save(self) -> None:
        if self.contender == "transformers":
            Seq2SeqTrainer._save_checkpoint(self.trainer, self.model, None)
        else:
            self.trainer._save_checkpoint(self.model, None)

    def finish(self) -> None:
        self.trainer.saver.writer.wait()
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(loop: Loop) -> dict[str, float]:
    """Stall and loss of one checkpoint, in seconds."""
    loop.step()
    without = seconds(lambda: [loop.step() for _ in range(2 * STEPS)] and None)
    started = time.perf_counter()
    for _ in range(STEPS):
        loop.step()
    stall = seconds(loop.save)
    for _ in range(STEPS):
        loop.step()
    loop.trainer.saver.writer.wait()  # what the next checkpoint, or the end of the run, would wait for
    with_one = time.perf_counter() - started
    loop.finish()
    return {"stall": stall, "loss": with_one - without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    given = parser.parse_args()
    quiet_libraries()
    methods: dict[str, dict[str, Any]] = {"full": {"type": "full"}, "lora": {"type": "lora"}}
    contenders = ["transformers", "foreground", "background"]
    answer: dict[str, Any] = {
        "luthier": luthier.__version__,
        "torch": torch.__version__,
        "rounds": given.rounds,
    }
    with tempfile.TemporaryDirectory() as place:
        for name, method in methods.items():
            loops = {
                contender: Loop(given.model, method, Path(place) / f"{name}-{contender}", contender)
                for contender in contenders
            }
            for loop in loops.values():
                loop.step()
                loop.save()  # the first save makes the buffers and warms the files
                loop.finish()
            rounds = []
            for number in range(given.rounds):
                order = contenders[number % 3 :] + contenders[: number % 3]
                rounds.append({contender: measure(loops[contender]) for contender in order})
                print(name, json.dumps(rounds[-1]), flush=True)
            answer[name] = {"rounds": rounds, "ratios": ratios(rounds)}
    given.results.write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps({name: answer[name]["ratios"] for name in methods}, indent=1))


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each contender against transformers of the same round: median, least and most."""
    found = {}
    for contender in ("foreground", "background"):
        for what in ("stall", "loss"):
            values = [row[contender][what] / row["transformers"][what] for row in rounds]
            found[f"{contender} {what}"] = {
                "median": round(statistics.median(values), 3),
                "least": round(min(values), 3),
                "most": round(max(values), 3),
            }
    return found


if __name__ == "__main__":
    main()
