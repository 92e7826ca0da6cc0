"""From a trainer that is ready to what is left of it: it trains, its weights are saved, its numbers are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier.publish import CARD_NAME, model_card, upload
from luthier.recipe.schema import Recipe
from luthier.show import Say
from luthier.trainer.bad_numbers import Rewind
from luthier.trainer.checkpoint import hash_file
from luthier.trainer.interruption import Interruption
from luthier.trainer.plots import plot_run
from luthier.trainer.processes import Processes
from luthier.trainer.retention import what_is_left
from luthier.trainer.rollouts import SamplingInterrupted
from luthier.trainer.run_directory import published_files
from luthier.trainer.stream_steps import end_stream
from luthier.trainer.trainer import PeftTrainer
from luthier.types import RunInterrupted


def learn(
    trainer: PeftTrainer,
    settings: Recipe,
    manifest: dict[str, Any],
    resumed: Path | None,
    interruption: Interruption,
    say: Say,
) -> dict[str, float]:
    """Train, save what was trained, evaluate; writes the results files and returns all numbers."""
    metrics: dict[str, float] = {}
    if not settings.train.eval_only:
        metrics = _train_through(trainer, resumed, say)
        metrics["train_tokens"] = trainer.state.num_input_tokens_seen
        if (received := interruption.agree()) is not None:
            raise RunInterrupted(
                f"{received.name}: stopped after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; {what_is_left(trainer.saver.run_dir, then='')}"
            )
        _save(trainer, manifest, metrics)
    if settings.train.eval_at_end and (settings.data.eval or settings.data.dev_split):
        evaluated = trainer.evaluate_at_end()
        trainer.save_metrics("eval", evaluated)
        metrics |= evaluated
    return metrics


def _train_through(trainer: PeftTrainer, resumed: Path | None, say: Say) -> dict[str, float]:
    """Train to the end, going back to a checkpoint as often as the recipe's `bad_numbers` asks for it."""
    try:
        while True:
            try:
                output = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except SamplingInterrupted:
                trainer.save_before_step()
                return {}
            except Rewind as request:
                resumed = trainer.rewind(request)
                say(f"{request.reason}. Going on from {resumed.name}, without the rows since then")
            else:
                trainer.saver.wait()
                return dict(output.metrics)
    finally:
        trainer.saver.writer.finish()
        end_stream(trainer.train_dataset)


def _save(trainer: PeftTrainer, manifest: dict[str, Any], trained: dict[str, float]) -> None:
    """The numbers, the trained weights, tokenizer and template, and the manifest that names their hashes."""
    processes = Processes.of(trainer.args)
    processes.together(partial(trainer.save_metrics, "train", trained))
    processes.together(trainer.save_state)
    weights = trainer.whole_weights()
    manifest["parallel"] = {
        "type": trainer.strategy.name,
        "processes": trainer.args.world_size,
        "wrapped": trainer.strategy.wrapped(trainer.model_wrapped),
    }
    processes.first(partial(_publish, trainer, manifest, weights))


def _publish(trainer: PeftTrainer, manifest: dict[str, Any], weights: Mapping[str, Tensor] | None) -> None:
    with published_files(Path(str(trainer.args.output_dir))) as folder:
        trainer.save_trained(folder, weights)
        # PEFT writes a form to fill in; ours follows the evaluation.
        (folder / CARD_NAME).unlink(missing_ok=True)
        files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        passes = {"tokens_per_pass": trainer.tokens_per_pass, **end_stream(trainer.train_dataset)}
        text = json.dumps({**manifest, **passes, "files": files}, indent=2)
        (folder / "run.json").write_text(text + "\n", encoding="utf-8")


def show_result(
    settings: Recipe, output: Path, manifest: Mapping[str, Any], metrics: Mapping[str, float], say: Say
) -> None:
    """Curves and model card, then the upload, if the recipe asks for one. Raises PublishError where that fails."""
    if settings.train.plots:
        plot_run(output)
    (output / CARD_NAME).write_text(model_card(settings, manifest, metrics), encoding="utf-8")
    if (hub := settings.train.push_to_hub) is not None:
        files = json.loads((output / "run.json").read_text(encoding="utf-8"))["files"]
        whole = f"the run in {output} is finished and whole"
        say(f"uploaded: {upload(hub, settings.model.token, output, [*files, CARD_NAME], whole)}")
