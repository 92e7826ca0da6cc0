"""The verb `train`: from a recipe to a run directory. It connects the parts and computes nothing itself."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from luthier import __version__
from luthier.data.batching import RowsRule, TokensRule, plan_epoch
from luthier.data.encode import EncodeOptions
from luthier.data.prepare import Preparation, PreparedData, Progress, prepare
from luthier.data.report import check_max_lost, format_reports
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate, load_template
from luthier.environment import detect_hardware
from luthier.methods import build_method
from luthier.methods.groups import count_parameters
from luthier.model.load import ModelSource, fingerprint, load_model, load_tokenizer, locate
from luthier.model.logprobs import install_target_forward
from luthier.model.selftest import require_isolation
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.resolve import TOKENS_PER_BATCH, Hardware, resolve
from luthier.recipe.schema import Recipe
from luthier.show import example_text, quiet_libraries
from luthier.stages import build_stage
from luthier.trainer.arguments import training_arguments
from luthier.trainer.callbacks import LogCallback, ProgressCallback
from luthier.trainer.checkpoint import hash_file, resolve_resume, sweep_temporary
from luthier.trainer.plots import plot_run
from luthier.trainer.run_directory import published_files, run_guard
from luthier.trainer.steps import Plan, StepDataset
from luthier.trainer.trainer import EvalSet, PeftTrainer
from luthier.types import Method, RecipeError, Stage

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the run is, and its numbers: `train_loss`, `eval_loss`, `eval_perplexity`, tokens and times."""

    output: Path
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Material:
    """Everything about the data: how it is rendered, what is learnt from it, and its tokens."""

    template: ChatTemplate
    stage: Stage
    data: PreparedData


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
    say = _speaker(quiet or arguments.process_index > 0)
    for note in loaded.notes:
        say(f"note: {note}")
    train_spec = settings.train
    if not train_spec.overwrite:
        run_guard(output, overwrite=False, resume=train_spec.resume)  # say so before the long work
    source = locate(settings.model)
    tokenizer = load_tokenizer(settings.model, source)
    material = _material(settings, tokenizer, say)
    resumed = _open_run(output, loaded, say, main=arguments.process_index == 0)
    model, method = _model(settings, source, hardware)
    count = count_parameters(model)
    say(
        f"{count.trainable:,} of {count.total:,} parameters train ({count.trainable / count.total:.2%}) "
        f"on {hardware.name}, {settings.train.precision}"
    )
    manifest = _manifest(settings, source, material) | {"parameters": asdict(count)}
    with ProgressCallback(quiet=quiet) as progress:
        trainer = PeftTrainer(
            model=model,
            args=arguments,
            stage=material.stage,
            method=method,
            optim=settings.optim,
            steps=_steps(settings, material, hardware.world_size, arguments.process_index),
            eval_sets=_eval_sets(settings, material, hardware.world_size),
            tokenizer=tokenizer,
            callbacks=[LogCallback(output), progress],
            save_total_limit=train_spec.save_total_limit,
            checkpoint_metadata={key: manifest[key] for key in ("luthier", "base", "data")},
        )
        metrics = _learn(trainer, settings, manifest, resumed)
    if train_spec.plots and not train_spec.eval_only and trainer.is_world_process_zero():
        plot_run(output)
    return TrainResult(output, metrics)


def _speaker(quiet: bool) -> Say:
    console = Console(soft_wrap=True)
    return (lambda text: None) if quiet else (lambda text: console.print(text, highlight=False))


def _material(settings: Recipe, tokenizer: PreTrainedTokenizerFast, say: Say) -> _Material:
    """Read, check and tokenize the data, show report and example. Raises DataError over `max_lost`."""
    compatible = settings.data.rules == "llamafactory"
    template = load_template(tokenizer, settings.data, pieces=compatible)
    options = EncodeOptions.of(
        settings.data, settings.stage.type, llamafactory=compatible, pad_id=tokenizer.pad_token_id
    )
    stage = build_stage(settings.stage, options)
    how = Preparation(
        encode=stage.encode,
        template=template,
        kind="text" if settings.stage.type == "pt" else "conversation",
        identity={"stage": settings.stage.type, **asdict(options)},
        seed=settings.train.seed,
        llamafactory=compatible,
        hub_cache=settings.model.cache_dir,
        hub_token=settings.model.token,
    )
    data = prepare(settings.data, how, _row_progress(say))
    say(format_reports(data.reports))
    check_max_lost(data.reports, settings.data.max_lost)
    shown = data.train if len(data.train) else next(iter(data.eval.values()))
    say(example_text(shown[0], template.decode))
    return _Material(template, stage, data)


def _row_progress(say: Say) -> Progress:
    """Says every 10,000 rows how far a data set is."""

    def report(name: str, done: int) -> None:
        if done % 10_000 == 0:
            say(f"{name}: {done:,} rows tokenized")

    return report


def _open_run(output: Path, loaded: LoadedRecipe, say: Say, *, main: bool) -> Path | None:
    """Make the run directory, or find the checkpoint to go on from; writes `recipe.yaml` for the workers."""
    train_spec = loaded.recipe.train
    if main:
        run_guard(output, overwrite=train_spec.overwrite, resume=train_spec.resume)
        output.mkdir(parents=True, exist_ok=True)
        sweep_temporary(output)
    resumed, skipped = resolve_resume(output, train_spec.resume)
    for folder, reason in skipped:
        say(f"checkpoint {folder.name} is not used: {reason}")
    if resumed is not None:
        say(f"resuming from {resumed}")
    if main:
        (output / "recipe.yaml").write_text(dump_recipe(loaded), encoding="utf-8")
    return resumed


def _model(
    settings: Recipe, source: ModelSource, hardware: Hardware
) -> tuple[PreTrainedModel | PeftModel, Method]:
    """The model ready to train: adapters attached, target forward installed, isolation proven."""
    # What an adapter draws depends on the seed alone, not on the data before it.
    set_seed(settings.train.seed)
    method = build_method(settings.method)
    base = load_model(settings.model, source, torch.device(hardware.device))
    model = method.apply(base)
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
    require_isolation(model, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision))
    return model, method


def _steps(settings: Recipe, material: _Material, world_size: int, rank: int) -> StepDataset | None:
    train_spec, table = settings.train, material.data.train
    if train_spec.eval_only:
        return None
    seed = train_spec.seed if train_spec.data_seed is None else train_spec.data_seed
    shuffle = settings.data.shuffle
    plan = partial(_epoch, table, _rule(settings), seed, shuffle, world_size, train_spec.tokens_per_pass)
    return StepDataset(table, plan, material.stage.collate, rank)


def _rule(settings: Recipe) -> RowsRule | TokensRule:
    train_spec = settings.train
    if train_spec.rows_per_device is not None:
        return RowsRule(train_spec.rows_per_device, train_spec.accumulation)
    return TokensRule(train_spec.tokens_per_batch or TOKENS_PER_BATCH)


def _epoch(
    table: SampleTable,
    rule: RowsRule | TokensRule,
    seed: int,
    shuffle: bool,
    world_size: int,
    tokens_per_pass: int | None,
    epoch: int,
) -> Plan:
    return plan_epoch(
        table.lengths,
        rule=rule,
        epoch=epoch,
        seed=seed,
        shuffle=shuffle,
        world_size=world_size,
        tokens_per_pass=tokens_per_pass,
        groups=table.groups if isinstance(rule, RowsRule) else None,
    )


def _eval_sets(settings: Recipe, material: _Material, world_size: int) -> dict[str, EvalSet]:
    """Every evaluation set in its own order, in passes of the training size, shared out among processes."""
    sets = {}
    for name, table in material.data.eval.items():
        rule = TokensRule(settings.train.tokens_per_pass or TOKENS_PER_BATCH)
        plan = plan_epoch(table.lengths, rule=rule, epoch=0, seed=0, shuffle=False)
        passes = [indices for step in plan for indices in step[0]]
        sets[name] = EvalSet(table, [passes[rank::world_size] for rank in range(world_size)])
    return sets


def _learn(
    trainer: PeftTrainer, settings: Recipe, manifest: dict[str, Any], resumed: Path | None
) -> dict[str, float]:
    """Train, save what was trained, evaluate; writes the results files and returns all numbers."""
    metrics: dict[str, float] = {}
    if not settings.train.eval_only:
        trained = trainer.train(resume_from_checkpoint=str(resumed) if resumed else None).metrics
        trained["train_tokens"] = trainer.state.num_input_tokens_seen
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


def _manifest(settings: Recipe, source: ModelSource, material: _Material) -> dict[str, Any]:
    """What the run was made from: versions, and fingerprints of base, template and data."""
    return {
        "luthier": __version__,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "base": {"path": settings.model.path, "fingerprint": fingerprint(source)},
        "template": {"name": material.template.name, "sha256": material.template.fingerprint},
        "data": material.data.fingerprints,
        "reports": [report.to_dict() for report in material.data.reports],
        "stage": settings.stage.type,
        "method": settings.method.model_dump(mode="json"),
    }
