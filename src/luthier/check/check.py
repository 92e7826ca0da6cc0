"""The verb `check`: everything that can be said of a recipe before an hour is spent on it.

It trains nothing and writes nothing but the caches. What `train` would refuse is collected, not raised, so that one
look shows all of it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.arrange import Material, training_steps
from luthier.assemble import attachments, build_model, longest_sample, run_identity
from luthier.check.estimate import estimate_memory, memory_before
from luthier.check.findings import DataSet, Findings, histogram_of, settings_of
from luthier.check.memory import PassShape, weight_bytes
from luthier.check.mixture import shares_of
from luthier.check.parameters import count_by_kind
from luthier.check.probe import run_probe
from luthier.check.rollouts import plan_rollouts
from luthier.check.schedule import Schedule, longest_shape, schedule_of
from luthier.check.tokens import chosen, show_sample
from luthier.data.prepare import DEV, PreparedData
from luthier.data.report import check_max_lost
from luthier.data.stream_preview import PREVIEW
from luthier.environment import detect_hardware
from luthier.material import fitted, load_tokens, read_material
from luthier.methods.groups import count_parameters
from luthier.model.faults import LOAD_ERRORS
from luthier.model.load import ModelSource, fingerprint, load_config, locate
from luthier.model.logprobs import chosen_rows
from luthier.model.multimodal import language_class
from luthier.model.quantize import DTYPES
from luthier.model.reference import Reference
from luthier.model.vocabulary import VocabularyChange
from luthier.online import online_supply
from luthier.parallel import require_divisible
from luthier.recipe.load import LoadedRecipe, load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import ModelRewardSpec, OnlineSpec, Recipe
from luthier.references import build_reference, reference_spec
from luthier.show import Say, quiet_libraries
from luthier.trainer.arguments import training_arguments
from luthier.trainer.checkpoint import resolve_resume
from luthier.trainer.kernels import kernel_rules
from luthier.trainer.run_directory import run_guard
from luthier.trainer.same_run import differences
from luthier.types import Method, RecipeError, Stage


def check(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    say: Say = lambda text: None,
    samples: int = 3,
    everything: bool = False,
    probe: bool = True,
) -> Findings:
    """Find out what `luthier.train` would do with this recipe, and what it would refuse.

    say: told how far it is. samples: how many are shown token by token. everything: list the recipe's defaults too.
    probe: measure a few optimizer steps. Nothing is raised that `train` would raise as a LuthierError; it is in
    `Findings.problems`. What libraries print goes to stderr.
    """
    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        return _Check(say, samples, everything, probe).run(recipe, overrides)


class _Check:
    """The questions in the order in which `train` meets them; each answer that is missing ends its own branch."""

    def __init__(self, say: Say, samples: int, everything: bool, probe: bool) -> None:
        self._say, self._samples, self._everything, self._probe = say, samples, everything, probe
        self._found = Findings()
        self._beside: Path | None = None

    def run(self, recipe: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Findings:
        found = self._found
        written = found.ask("recipe", lambda: load_recipe(recipe, overrides))
        if written is None:
            return found
        found.hardware = hardware = detect_hardware()
        loaded = found.ask("recipe", lambda: resolve(written, hardware))
        found.recipe = settings_of(loaded or written, everything=self._everything)
        found.notes += written.notes
        if loaded is not None:
            train = loaded.recipe.train
            found.ask("model", lambda: self._with_kernels(loaded, hardware, train.deterministic, train.tf32))
        return found

    def _with_kernels(
        self, loaded: LoadedRecipe, hardware: Hardware, deterministic: bool, tf32: bool | None
    ) -> None:
        with kernel_rules(deterministic=deterministic, tf32=tf32):
            self._ask_all(loaded, hardware)

    def _ask_all(self, loaded: LoadedRecipe, hardware: Hardware) -> None:
        found, settings = self._found, loaded.recipe
        self._beside = None if loaded.path is None else loaded.path.parent
        train, output = settings.train, Path(settings.train.output)
        found.ask("processes", lambda: _require_one_process(hardware))
        if found.ok:  # with several processes they would wait for each other
            found.ask("settings", lambda: training_arguments(settings, use_cpu=hardware.device == "cpu"))
        found.ask("settings", lambda: attachments(loaded))
        found.ask(
            "output",
            lambda: run_guard(output, overwrite=train.overwrite, resume=train.resume, remove=False),
        )
        source = found.ask("model", lambda: locate(settings.model))
        if source is None:
            return
        found.ask("processes", lambda: _require_divisible(settings, source))
        tokens = found.ask("tokenizer", lambda: load_tokens(settings, source, self._note))
        material = self._material(settings, tokens[0]) if tokens is not None else None
        if train.resume != "never":
            found.ask("output", lambda: self._resume(settings, source, material))
        if tokens is not None:
            self._model(settings, source, hardware, tokens[1], material)

    def _note(self, text: str) -> None:
        self._found.notes.append(text.removeprefix("note: "))

    # ---- data --------------------------------------------------------------------------------------

    def _material(self, settings: Recipe, tokenizer: PreTrainedTokenizerFast) -> Material | None:
        found = self._found
        material = found.ask("data", lambda: read_material(settings, tokenizer, self._say))
        if material is None:
            self._one_by_one(settings, tokenizer)
            return None
        found.datasets = _datasets(settings, material.data)
        found.mixture = found.ask("data", lambda: shares_of(settings, material)) or []
        if material.stream is not None:
            self._note(
                f"data.stream: the first {PREVIEW:,} rows of each training set are looked at; what is said of an epoch "
                "is of these"
            )
        found.ask("data", lambda: check_max_lost(material.data.reports, settings.data.max_lost))
        table = material.data.train
        shown = table if len(table) else next(iter(material.data.eval.values()))
        found.samples = [show_sample(sample, material.template) for sample in chosen(shown, self._samples)]
        return material

    def _one_by_one(self, settings: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        """Where the data cannot be read as a whole: what is wrong with each data set, and reports of the others."""
        data, found = settings.data, self._found
        sets = [*((one, "training") for one in data.train), *((one, "evaluation") for one in data.eval)]
        for one, part in sets if len(sets) > 1 else []:
            alone = data.model_copy(update={"train": (one,), "eval": (), "dev_split": 0.0})
            narrowed = settings.model_copy(update={"data": alone})
            material = found.ask("data", partial(read_material, narrowed, tokenizer, self._say))
            if material is not None:
                found.datasets += [_dataset(material.data, 0, part)]
        reports = [dataset.report for dataset in found.datasets]
        found.ask("data", lambda: check_max_lost(reports, data.max_lost))

    def _resume(self, settings: Recipe, source: ModelSource, material: Material | None) -> None:
        """Whether there is a checkpoint to go on from, and whether it is one of this run."""
        train = settings.train
        checkpoint, skipped = resolve_resume(Path(train.output), train.resume)
        for folder, reason in skipped:
            self._note(f"checkpoint {folder.name} is not used: {reason}")
        if checkpoint is None or material is None:
            return
        now = run_identity(settings, fingerprint(source), material, _processes(settings))
        changed = differences(checkpoint, now, allowed=train.allow_changes)
        for text in changed:
            self._note(f"changed since {checkpoint.name}: {text}")

    # ---- model -------------------------------------------------------------------------------------

    def _model(
        self,
        settings: Recipe,
        source: ModelSource,
        hardware: Hardware,
        vocabulary: VocabularyChange,
        material: Material | None,
    ) -> None:
        found = self._found
        least = found.ask("model", lambda: _least_bytes(settings, source))
        if least is not None and least > hardware.memory:
            self._note(
                f"the weights alone take {least / 2**30:.1f} GiB and {hardware.name} has "
                f"{hardware.memory / 2**30:.1f} GiB: the model is not loaded, and what needs it is not checked"
            )
            return
        before = memory_before(hardware.device)
        self._say("loading the model")
        longest = longest_sample(settings, material) if material is not None else 0
        built = found.ask(
            "model",
            lambda: build_model(
                settings, source, hardware, vocabulary, longest=longest, material=material, say=self._say
            ),
        )
        if built is None:
            return
        model, method = built
        total = count_parameters(model)
        found.parameters = count_by_kind(model) | {"all": total}
        rows = chosen_rows(model)
        if rows.padded:
            self._note(f"rows are padded on the {rows.side}: {rows.reason}")
        if material is not None:
            material = fitted(settings, material, model)
            if rows.unshared_reason:
                self._note(f"a prompt is computed for each of its answers: {rows.unshared_reason}")
            self._steps(settings, source, hardware, model, method, material, before)

    def _steps(
        self,
        settings: Recipe,
        source: ModelSource,
        hardware: Hardware,
        model: PreTrainedModel | PeftModel,
        method: Method,
        material: Material,
        before: int,
    ) -> None:
        """Steps, memory and time; `before` is the memory that was taken before the model."""
        found, stage, reference = self._found, material.stage, None
        in_advance = reference_spec(settings).precompute
        if stage.needs_reference:
            # Before its first step the policy itself is what it starts from: nothing is copied for it.
            reference = found.ask(
                "model", lambda: build_reference(settings, hardware, model, before=in_advance)
            )
            if reference is None:
                return
        estimate = partial(
            self._estimate, settings, source, hardware, model, stage, before=before, reference=reference
        )
        if isinstance(settings.stage, OnlineSpec):
            self._rollouts(settings, settings.stage, source, model, material, estimate)
            return
        steps = training_steps(settings, material, 1, 0, padded=chosen_rows(model).padded)
        if steps is None or not len(steps):
            return
        found.schedule = schedule = schedule_of(steps, settings.train)
        estimate(schedule, longest_shape(steps, schedule))
        if not self._probe or found.memory is None:
            return
        if not found.memory.fits:
            self._note("not probed: the estimated memory does not fit")
            return
        if in_advance and stage.needs_reference:
            self._note(
                "the probe asks the reference in every pass; training asks it once for each sample, before the first "
                "step, and keeps the answers in the cache"
            )
        self._say("measuring a few steps")
        found.probe = found.ask(
            "model", lambda: run_probe(settings, model, method, stage, steps, schedule, reference)
        )

    def _estimate(
        self,
        settings: Recipe,
        source: ModelSource,
        hardware: Hardware,
        model: PreTrainedModel | PeftModel,
        stage: Stage,
        schedule: Schedule,
        shape: PassShape,
        *,
        before: int,
        reference: Reference | None,
        sampling: int = 0,
    ) -> None:
        self._say("estimating memory")
        found = self._found
        found.memory = found.ask(
            "model",
            lambda: estimate_memory(
                settings, source, hardware, model, stage, schedule, shape, before, reference, sampling
            ),
        )
        if found.memory is not None and found.memory.rough is not None:
            self._note(found.memory.rough)

    def _rollouts(
        self,
        settings: Recipe,
        spec: OnlineSpec,
        source: ModelSource,
        model: PreTrainedModel | PeftModel,
        material: Material,
        estimate: Callable[..., None],
    ) -> None:
        """Steps and memory of a stage that draws its answers itself; whether its rewards can judge the prompts."""
        found = self._found
        supply = found.ask(
            "rewards", lambda: online_supply(settings, source, model, material, self._beside, self._note)
        )
        if supply is None or supply.steps is None:
            return
        plan = plan_rollouts(settings, material, model, len(supply.steps))
        if plan is None:
            return
        found.schedule = plan.schedule
        self._note(
            f"answers are taken to have {plan.longest_answer} tokens, the most that generation.max_new_tokens and the "
            "model's context let them have; time is not measured, for how long they become is not known"
        )
        if any(isinstance(reward, ModelRewardSpec) for reward in spec.rewards):
            self._note("reward models are not in the memory estimate")
        estimate(plan.schedule, plan.shape, sampling=plan.sampling)


def _require_one_process(hardware: Hardware) -> None:
    """Raise RecipeError where torchrun or the like started several."""
    if hardware.world_size > 1:
        raise RecipeError(
            f"luthier check runs in one process, and {hardware.world_size} were started; run it without torchrun"
        )


def _require_divisible(settings: Recipe, source: ModelSource) -> None:
    """Raise ModelError where the processes of the recipe cannot divide the model."""
    spec = settings.parallel
    count = None if spec.processes == "auto" else spec.nodes * spec.processes
    require_divisible(settings, load_config(settings.model, source), count)


def _datasets(settings: Recipe, data: PreparedData) -> list[DataSet]:
    parts = ["training"] * len(settings.data.train) + ["evaluation"] * len(settings.data.eval)
    return [_dataset(data, number, part) for number, part in enumerate(parts)]


def _dataset(data: PreparedData, number: int, part: str) -> DataSet:
    """Report `number` with the lengths of its samples; those held out for evaluation are among them."""
    report = data.reports[number]
    if part == "training":
        tables = [data.train, *([data.eval[DEV]] if DEV in data.eval else [])]
    else:
        tables = [data.eval[report.dataset]] if report.dataset in data.eval else [data.train]
    lengths = torch.cat([torch.from_numpy(table.lengths_of(report.dataset)) for table in tables]).numpy()
    return DataSet(report, part, histogram_of(lengths))


def _least_bytes(settings: Recipe, source: ModelSource) -> int:
    """The weights of the bare model, counted from its config alone. Raises ModelError where that cannot be read."""
    config = load_config(settings.model, source)
    dtype = DTYPES.get(settings.model.dtype, getattr(config, "dtype", None) or torch.float32)
    try:
        with torch.device("meta"):
            model = language_class(config).from_config(
                config, dtype=dtype, trust_remote_code=settings.model.trust_remote_code
            )
    except LOAD_ERRORS:
        return 0  # loading it will say better what is wrong
    return weight_bytes(model)


def _processes(settings: Recipe) -> int:
    """How many will train, on all machines."""
    given = settings.parallel.processes
    return settings.parallel.nodes * (max(1, torch.cuda.device_count()) if given == "auto" else given)
