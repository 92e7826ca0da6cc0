"""The verb `train`: from a recipe to a run directory. It connects the parts and computes nothing itself."""

from __future__ import annotations

import errno
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier import __version__
from luthier.arrange import Attach, Material, eval_sets, padding_share, training_steps
from luthier.assemble import attachments, build_model, longest_sample, run_identity
from luthier.data.prepare import PreparedData
from luthier.environment import detect_hardware
from luthier.eval_answers import answers_at_eval
from luthier.learning import learn, show_result
from luthier.material import fitted, load_tokens, read_material, show_material
from luthier.methods.groups import ParameterCount, count_parameters
from luthier.model.base_record import BaseRecord, remember_base
from luthier.model.load import ModelSource, fingerprint, load_config, locate
from luthier.model.logprobs import chosen_rows
from luthier.model.positions import loaded_positions
from luthier.model.quantize import untested_files
from luthier.model.quantized_layers import measured
from luthier.model.vocabulary import VocabularyChange
from luthier.online import Supply, online_supply
from luthier.parallel import build_strategy
from luthier.parallel.strategy import Strategy
from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.online import OnlineSpec
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import AdapterSpec, Recipe
from luthier.references import live_reference, precomputation
from luthier.show import Say, quiet_libraries, speaker
from luthier.trainer.agreement import LIBRARIES, agree_to_start, remember_launch, require_alike
from luthier.trainer.arguments import require_followable, training_arguments
from luthier.trainer.callbacks import LogCallback, ProgressCallback
from luthier.trainer.checkpoint import resolve_resume
from luthier.trainer.interruption import Interruption
from luthier.trainer.kernels import kernel_rules
from luthier.trainer.precision import AUTOCAST
from luthier.trainer.processes import Processes
from luthier.trainer.retention import what_is_left
from luthier.trainer.run_directory import begin_run, run_guard
from luthier.trainer.same_run import differences
from luthier.trainer.trackers import tracking
from luthier.trainer.trainer import PeftTrainer
from luthier.types import CheckpointError, Method


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the run is, and its numbers: `train_loss`, `eval_loss`, `eval_perplexity`, tokens and times."""

    output: Path
    metrics: dict[str, float]


def train(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, quiet: bool = False
) -> TrainResult:
    """Run a recipe in this process, which may be one of several; see `luthier.train`."""
    quiet_libraries()
    hardware = detect_hardware()
    return train_resolved(resolve(load_recipe(recipe, overrides), hardware), hardware, quiet=quiet)


def train_resolved(loaded: LoadedRecipe, hardware: Hardware, *, quiet: bool = False) -> TrainResult:
    """Run a recipe that has nothing left open, as one of `hardware.world_size` processes."""
    train_spec = loaded.recipe.train
    try:
        with kernel_rules(deterministic=train_spec.deterministic, tf32=train_spec.tf32):
            return _train(loaded, hardware, quiet)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        left = what_is_left(Path(train_spec.output))
        raise CheckpointError(f"the disk is full ({error.filename or train_spec.output}). {left}") from error


def _train(loaded: LoadedRecipe, hardware: Hardware, quiet: bool) -> TrainResult:
    arguments = training_arguments(loaded.recipe, use_cpu=hardware.device == "cpu")
    processes = Processes.of(arguments)
    loaded = _begin(loaded, processes)
    settings, output = loaded.recipe, Path(loaded.recipe.train.output)
    main, interruption = processes.is_first, Interruption(processes)
    say = speaker(quiet or not main)
    for note in loaded.notes:
        say(f"note: {note}")
    train_spec, attached = settings.train, attachments(loaded)
    together = processes.together  # what fails on one process ends all of them
    source, tokenizer, vocabulary, material = _read(settings, processes, say)
    strategy = together(partial(_strategy, settings, source, processes))
    load = partial(_model, settings, source, hardware, vocabulary, material, say, strategy.loads_on_host)
    (model, method), sharing = together(load), processes.with_rows(strategy.copies)
    manifest = together(partial(_manifest, settings, source, material, sharing))
    require_alike(processes, {"the base model": manifest["base"]["fingerprint"], **manifest["data"]})
    remember_base(model, _base_record(settings, manifest["base"]["fingerprint"]))
    material = fitted(settings, material, model)
    supply = _online(loaded, source, model, material, say, processes)
    # Only now, when nothing of the input can be wrong any more, is anything written.
    resumed = _open_run(output, loaded, manifest["identity"], say, processes)
    manifest["parameters"] = asdict(_count(model, hardware, settings, say))
    manifest["vocabulary"] = vocabulary.to_dict() if vocabulary.is_needed else None
    manifest |= _model_record(settings, material, model, say)
    reported = train_spec.report_to if main else ()
    trackers = tracking(reported, output, run_name=arguments.run_name, resumed=resumed)
    strategy.divide(model)
    attach = precomputation(settings, source, hardware, model, material, say, strategy, processes)
    # A signal ends what is computed here at once: there is no step yet to wait for, nor anything to save.
    supply = supply or _offline(settings, source, model, material, attach, sharing, say)
    with trackers as tracked, ProgressCallback(quiet=quiet) as progress, interruption:
        trainer = PeftTrainer(
            model=model,
            args=arguments,
            stage=material.stage,
            method=method,
            optim=settings.optim,
            steps=supply.steps,
            eval_sets=supply.eval_sets,
            tokenizer=tokenizer,
            callbacks=[*tracked, LogCallback(output), progress, *attached.callbacks, interruption],
            save_total_limit=train_spec.save_total_limit,
            checkpoint_metadata={key: manifest[key] for key in ("luthier", "identity")},
            async_save=train_spec.async_save,
            metrics=attached.metrics,
            schedule=attached.schedule,
            answers=supply.answers,
            rollouts=supply.rollouts,
            strategy=strategy,
            eval_arithmetic=AUTOCAST[train_spec.eval_precision],
            bad_numbers=train_spec.bad_numbers,
            reference=live_reference(settings, hardware, model, material, strategy),
            fit_memory=supply.fit_memory(say) if train_spec.fit_memory else None,
        )
        supply.watch(progress.answered, lambda: interruption.received is not None, trainer.saver.writer.wait)
        metrics = learn(trainer, settings, manifest, resumed, interruption, say)
    if main and not train_spec.eval_only:
        show_result(settings, output, manifest, metrics, say)
    return TrainResult(output, metrics)


def _read(
    settings: Recipe, processes: Processes, say: Say
) -> tuple[ModelSource, PreTrainedTokenizerBase, VocabularyChange, Material]:
    """What is read before any model is loaded, with the data report."""
    together = processes.together
    source = processes.in_turn(partial(locate, settings.model))
    tokenizer, vocabulary = together(partial(load_tokens, settings, source, say))
    material = processes.in_turn(partial(read_material, settings, tokenizer, say))
    together(partial(show_material, settings, material, say))
    return source, tokenizer, vocabulary, material


def _begin(loaded: LoadedRecipe, processes: Processes) -> LoadedRecipe:
    """The recipe of this attempt, once all processes have met and agreed on it."""
    train_spec = (loaded := agree_to_start(loaded, processes)).recipe.train
    if not train_spec.overwrite:  # say so before the long work
        run_guard(Path(train_spec.output), overwrite=False, resume=train_spec.resume)
    return loaded


def _online(
    loaded: LoadedRecipe,
    source: ModelSource,
    model: PreTrainedModel | PeftModel,
    material: Material,
    say: Say,
    processes: Processes,
) -> Supply | None:
    """What a trainer gets whose stage learns from answers of its own; None for other stages."""
    if not isinstance(loaded.recipe.stage, OnlineSpec):
        return None
    beside = loaded.path.parent if loaded.path is not None else None
    return online_supply(loaded.recipe, source, model, material, beside, say, processes)


def _offline(
    settings: Recipe,
    source: ModelSource,
    model: PreTrainedModel | PeftModel,
    material: Material,
    attach: Attach | None,
    processes: Processes,
    say: Say,
) -> Supply:
    """What a trainer gets whose stage learns from data."""
    padded, count = chosen_rows(model).padded, processes.count
    return Supply(
        training_steps(settings, material, count, processes.rank, padded, attach, processes.exchange),
        eval_sets(settings, material, count, padded=padded, attach=attach),
        answers_at_eval(settings, source, model, material, say, processes),
    )


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
    tokenizer, _ = load_tokens(settings, locate(settings.model), say)
    material = read_material(settings, tokenizer, say)
    show_material(settings, material, say)
    return material.data


def _strategy(settings: Recipe, source: ModelSource, processes: Processes) -> Strategy:
    return build_strategy(settings, processes.count, load_config(settings.model, source))


def _write_recipe(output: Path, loaded: LoadedRecipe) -> None:
    remember_launch(output)
    (output / "recipe.yaml").write_text(dump_recipe(loaded), encoding="utf-8")


def _model(
    settings: Recipe,
    source: ModelSource,
    hardware: Hardware,
    vocabulary: VocabularyChange,
    material: Material,
    say: Say,
    on_host: bool,
) -> tuple[PreTrainedModel | PeftModel, Method]:
    """The model ready to train; see `build_model`."""
    longest, train_spec = longest_sample(settings, material), settings.train
    looks, resumed = getattr(settings.method, "init", None) in ("eva", "corda"), None
    if looks and not train_spec.overwrite:
        # It holds what the method saw in the data, which need not be looked at again.
        resumed, _ = resolve_resume(Path(train_spec.output), train_spec.resume)
    given: dict[str, Any] = {"longest": longest, "material": material, "resumed": resumed, "on_host": on_host}
    model, method = build_model(settings, source, hardware, vocabulary, say=say, **given)
    require_followable(settings, model, hardware.world_size)
    return model, method


def _count(model: nn.Module, hardware: Hardware, settings: Recipe, say: Say) -> ParameterCount:
    """How many parameters there are and train, said aloud."""
    count = count_parameters(model)
    say(
        f"{count.trainable:,} of {count.total:,} parameters train ({count.trainable / count.total:.2%}) "
        f"on {hardware.name}, {settings.train.precision}"
    )
    return count


def _model_record(settings: Recipe, material: Material, model: nn.Module, say: Say) -> dict[str, Any]:
    """How segments go through the model and what was changed in it, for the manifest; says what is not as usual."""
    rows, positions = chosen_rows(model), loaded_positions(model)
    record: dict[str, Any] = {"rows": rows.record()}
    if positions is not None:
        record["positions"] = asdict(positions)
        say(f"note: positions are stretched ({positions})")
    elif settings.model.rope_scaling is not None:
        say("note: model.rope_scaling changes nothing: the model reads data.max_length tokens as it is")
    if (quantized := measured(model)) is not None:
        record["quantized"] = asdict(quantized)
        say(
            f"quantized: {quantized.layers} layers with {quantized.weights / quantized.total:.0%} of all weights; the "
            f"model takes {quantized.bytes / 2**30:.2f} GiB"
        )
    if settings.model.quantization is None and (untested := untested_files(model)) is not None:
        say(f"note: {untested}")
    if settings.model.activation_offload and (where := next(model.parameters()).device.type) != "cuda":
        say(
            f"note: model.activation_offload moves nothing here: the memory of a {where} device is the host's"
        )
    if rows.padded:
        amount = ""
        if not isinstance(settings.stage, OnlineSpec):  # nobody knows how long answers will be
            share = padding_share(settings, material)
            record["rows"]["padding_share"] = round(share, 4)
            amount = f" ({share:.0%} of all positions is padding)"
        say(f"note: rows are padded on the {rows.side}{amount}: {rows.reason}")
    return record


def _open_run(
    output: Path, loaded: LoadedRecipe, now: Mapping[str, Any], say: Say, processes: Processes
) -> Path | None:
    """Make the run directory, or find the checkpoint to go on from; writes `recipe.yaml` for the workers.

    Raises CheckpointError where the checkpoint is of a run with other settings, base or data.
    """
    train_spec = loaded.recipe.train
    # Nobody looks for a checkpoint before the first process has swept.
    processes.together(partial(begin_run, output, train_spec) if processes.is_first else bool)
    resumed, skipped = processes.first(partial(resolve_resume, output, train_spec.resume))
    for folder, reason in skipped:
        say(f"checkpoint {folder.name} is not used: {reason}")
    if resumed is not None:
        for text in processes.together(partial(differences, resumed, now, allowed=train_spec.allow_changes)):
            say(f"changed since {resumed.name}: {text}")
        say(f"resuming from {resumed}")
    processes.first(partial(_write_recipe, output, loaded))
    return resumed


def _base_record(settings: Recipe, base: str) -> BaseRecord:
    """What an adapter of this run says of the model below it."""
    spec = settings.model
    below = settings.method.merged_first if isinstance(settings.method, AdapterSpec) else ()
    return BaseRecord(base, spec.quantization, spec.dtype, below)


def _manifest(
    settings: Recipe, source: ModelSource, material: Material, processes: Processes
) -> dict[str, Any]:
    """What the run was made from: versions, and fingerprints of base, template and data."""
    base = fingerprint(source)
    return {
        "luthier": __version__,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "base": {"path": settings.model.path, "fingerprint": base},
        "identity": run_identity(settings, base, material, processes.count),
        "template": {"name": material.template.name, "sha256": material.template.fingerprint},
        "data": material.data.fingerprints,
        "reports": [report.to_dict() for report in material.data.reports],
        "stage": settings.stage.type,
        "method": settings.method.model_dump(mode="json"),
    }
