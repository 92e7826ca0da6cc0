"""The verb `train`: from a recipe to a run directory. It connects the parts and computes nothing itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.assemble import Material, build_model, eval_sets, read_material, training_steps
from luthier.data.prepare import PreparedData
from luthier.data.report import check_max_lost, format_reports
from luthier.environment import detect_hardware
from luthier.methods.groups import count_parameters
from luthier.model.load import ModelSource, fingerprint, load_tokenizer, locate
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe
from luthier.show import Say, example_text, quiet_libraries, speaker
from luthier.trainer.arguments import training_arguments
from luthier.trainer.callbacks import LogCallback, ProgressCallback
from luthier.trainer.checkpoint import hash_file, read_manifest, resolve_resume, sweep_temporary
from luthier.trainer.interruption import Interruption
from luthier.trainer.plots import plot_run
from luthier.trainer.retention import what_is_left
from luthier.trainer.run_directory import published_files, run_guard
from luthier.trainer.same_run import changes, identity
from luthier.trainer.trainer import PeftTrainer
from luthier.types import CheckpointError, RecipeError, RunInterrupted

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the run is, and its numbers: `train_loss`, `eval_loss`, `eval_perplexity`, tokens and times."""

    output: Path
    metrics: dict[str, float]


def train(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, quiet: bool = False
) -> TrainResult:
    """Run a recipe; see `luthier.train`."""
    quiet_libraries()
    hardware = detect_hardware()
    loaded = resolve(load_recipe(recipe, overrides), hardware)
    settings = loaded.recipe
    output = Path(settings.train.output)
    if hardware.world_size > 1:
        raise RecipeError(
            f"this version trains with one process, and {hardware.world_size} were started; run it without torchrun"
        )
    arguments = training_arguments(settings, use_cpu=hardware.device == "cpu")
    say = speaker(quiet or arguments.process_index > 0)
    for note in loaded.notes:
        say(f"note: {note}")
    train_spec = settings.train
    if not train_spec.overwrite:
        run_guard(output, overwrite=False, resume=train_spec.resume)  # say so before the long work
    source = locate(settings.model)
    tokenizer = load_tokenizer(settings.model, source)
    material = read_material(settings, tokenizer, say)
    _show(settings, material, say)
    model, method = build_model(settings, source, hardware)
    manifest = _manifest(settings, source, material)
    # Only now, when nothing of the input can be wrong any more, is anything written.
    resumed = _open_run(output, loaded, manifest["identity"], say, main=arguments.process_index == 0)
    count = count_parameters(model)
    say(
        f"{count.trainable:,} of {count.total:,} parameters train ({count.trainable / count.total:.2%}) "
        f"on {hardware.name}, {settings.train.precision}"
    )
    manifest |= {"parameters": asdict(count)}
    with ProgressCallback(quiet=quiet) as progress, Interruption() as interruption:
        trainer = PeftTrainer(
            model=model,
            args=arguments,
            stage=material.stage,
            method=method,
            optim=settings.optim,
            steps=training_steps(settings, material, hardware.world_size, arguments.process_index),
            eval_sets=eval_sets(settings, material, hardware.world_size),
            tokenizer=tokenizer,
            callbacks=[LogCallback(output), progress, interruption],
            save_total_limit=train_spec.save_total_limit,
            checkpoint_metadata={key: manifest[key] for key in ("luthier", "identity")},
            async_save=train_spec.async_save,
        )
        metrics = _learn(trainer, settings, manifest, resumed, interruption)
    if train_spec.plots and not train_spec.eval_only and trainer.is_world_process_zero():
        plot_run(output)
    return TrainResult(output, metrics)


def prepare(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, quiet: bool = False
) -> PreparedData:
    """Tokenize the data of a recipe into the cache and stop; the same tokens that `train` will use."""
    quiet_libraries()
    loaded = resolve(load_recipe(recipe, overrides), detect_hardware())
    say = speaker(quiet)
    for note in loaded.notes:
        say(f"note: {note}")
    settings = loaded.recipe
    material = read_material(settings, load_tokenizer(settings.model, locate(settings.model)), say)
    _show(settings, material, say)
    return material.data


def _show(settings: Recipe, material: Material, say: Say) -> None:
    """The data report and one example. Raises DataError over `max_lost`."""
    data = material.data
    say(format_reports(data.reports))
    check_max_lost(data.reports, settings.data.max_lost)
    shown = data.train if len(data.train) else next(iter(data.eval.values()))
    say(example_text(shown[0], material.template.decode))


def _open_run(
    output: Path, loaded: LoadedRecipe, now: Mapping[str, Any], say: Say, *, main: bool
) -> Path | None:
    """Make the run directory, or find the checkpoint to go on from; writes `recipe.yaml` for the workers.

    Raises CheckpointError where the checkpoint is of a run with other settings, base or data.
    """
    train_spec = loaded.recipe.train
    if main:
        run_guard(output, overwrite=train_spec.overwrite, resume=train_spec.resume)
        output.mkdir(parents=True, exist_ok=True)
        sweep_temporary(output)
    resumed, skipped = resolve_resume(output, train_spec.resume)
    if resumed is not None:
        _compare(resumed, now, train_spec.allow_changes, say)
    for folder, reason in skipped:
        say(f"checkpoint {folder.name} is not used: {reason}")
    if resumed is not None:
        say(f"resuming from {resumed}")
    if main:
        (output / "recipe.yaml").write_text(dump_recipe(loaded), encoding="utf-8")
    return resumed


def _compare(checkpoint: Path, now: Mapping[str, Any], allowed: bool, say: Say) -> None:
    """Name what changed since the checkpoint was written; an error unless the recipe allows it."""
    before = read_manifest(checkpoint)["metadata"].get("identity")
    different = changes(before, now) if before is not None else []
    if different and not allowed:
        raise CheckpointError(
            f"{checkpoint} is of a run that was another: {'; '.join(different)}. To go on all the same, give "
            "train.allow_changes=true; to start anew, another train.output"
        )
    for text in different:
        say(f"changed since {checkpoint.name}: {text}")


def _learn(
    trainer: PeftTrainer,
    settings: Recipe,
    manifest: dict[str, Any],
    resumed: Path | None,
    interruption: Interruption,
) -> dict[str, float]:
    """Train, save what was trained, evaluate; writes the results files and returns all numbers."""
    metrics: dict[str, float] = {}
    if not settings.train.eval_only:
        trained = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None).metrics
        trained["train_tokens"] = trainer.state.num_input_tokens_seen
        trainer.saver.writer.wait()
        if interruption.received is not None:
            raise RunInterrupted(
                f"{interruption.received.name}: stopped after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; {what_is_left(trainer.saver.run_dir)}"
            )
        trainer.save_metrics("train", trained)
        trainer.save_state()
        _save(trainer, manifest)
        metrics |= trained
    if settings.train.eval_at_end and (settings.data.eval or settings.data.dev_split):
        evaluated = trainer.evaluate()
        trainer.save_metrics("eval", evaluated)
        metrics |= evaluated
    return metrics


def _save(trainer: PeftTrainer, manifest: dict[str, Any]) -> None:
    """The trained weights, tokenizer and template, and the manifest that names their hashes."""
    if not trainer.args.should_save:
        return
    with published_files(Path(str(trainer.args.output_dir))) as folder:
        trainer.save_model(str(folder), _internal_call=True)
        files = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
        text = json.dumps({**manifest, "files": files}, indent=2)
        (folder / "run.json").write_text(text + "\n", encoding="utf-8")


def _manifest(settings: Recipe, source: ModelSource, material: Material) -> dict[str, Any]:
    """What the run was made from: versions, and fingerprints of base, template and data."""
    base = fingerprint(source)
    trained = [report.dataset for report in material.data.reports[: len(settings.data.train)]]
    return {
        "luthier": __version__,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "base": {"path": settings.model.path, "fingerprint": base},
        "identity": identity(settings, base, [material.data.fingerprints[name] for name in trained]),
        "template": {"name": material.template.name, "sha256": material.template.fingerprint},
        "data": material.data.fingerprints,
        "reports": [report.to_dict() for report in material.data.reports],
        "stage": settings.stage.type,
        "method": settings.method.model_dump(mode="json"),
    }
