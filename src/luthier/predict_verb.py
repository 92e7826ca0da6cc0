"""The verb `predict`: answers to the rows of data sets, kept line by line, and what they are worth.

predict(target, data=..., output=...)  ->  PredictResult
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from luthier import __version__
from luthier.answering import Answerer, open_model, recipe_in
from luthier.data.described import described
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.engine.protocol import Engine
from luthier.files import write_whole
from luthier.generation import GenerationError, Request
from luthier.measures.libraries import require_libraries
from luthier.model.load import fingerprint, locate
from luthier.predicting.progress import PredictionProgress
from luthier.predicting.questions import (
    Asked,
    Question,
    Source,
    Unusable,
    held_out_questions,
    label_text,
    media_identity,
    read_questions,
)
from luthier.predicting.record import RESULTS_NAME, Prediction, PredictionRecord
from luthier.predicting.results import (
    ORDERED_BY,
    Comparison,
    Measured,
    compare as compared,
    measure_predictions,
    read_comparable,
    require_same_rows,
)
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DatasetSpec, DataSpec, GenerationSpec, Recipe
from luthier.show import Say, quiet_libraries, speaker
from luthier.trained.source import Trained, run_of
from luthier.trainer.checkpoint import hash_file
from luthier.types import DataError, ModelError, RecipeError, RowError

_SEED = 42
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class PredictResult:
    """Where the predictions are, what they are, and what they are worth (the content of `predict_results.json`)."""

    output: Path
    predictions: list[Prediction]
    metrics: dict[str, Any]
    worst: list[Prediction]
    best: list[Prediction]

    def json(self) -> str:
        return json.dumps({"output": str(self.output), **self.metrics}, indent=2, ensure_ascii=False)


def predict(
    target: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    data: Sequence[str | Path] = (),
    output: str | Path | None = None,
    compare: str | Path | None = None,
    max_samples: int | None = None,
    base: str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> PredictResult:
    """Answer the rows of data sets and measure the answers; see `luthier.predict`.

    target: the folder of a run, checkpoint, adapter or model, a recipe (file or value), or a model's name. overrides:
    `generation.*` and `data.*` of its recipe, as on the command line. data: names in dataset_info.json, or files; what
    the recipe evaluates on where absent. output: `predictions` in the target's folder where absent; predictions that
    are there already, of the same model, data and settings, are not made again. compare: other predictions of the same
    rows. max_samples: the first rows of each data set.

    Raises RecipeError, DataError, ModelError and CheckpointError for what cannot be used or does not fit together.
    """
    quiet_libraries()
    say = speaker(quiet)
    require_libraries("luthier predict")
    settings = _settings(target, overrides, [str(name) for name in data])
    if max_samples is not None and max_samples < 1:
        raise RecipeError(f"max_samples={max_samples} should be at least 1")
    asked, identity = _asked(settings, max_samples)
    other = read_comparable(compare) if compare is not None else None
    answerer = open_model(settings.target, base=base, generation=settings.generation, device=device, say=say)
    if answerer.kind != "language":
        raise ModelError(f"{answerer.label} is a reward model, which scores answers: luthier score")
    folder = Path(output) if output is not None else _default_output(answerer.trained, settings)
    questions, unusable = _prepared(asked, answerer, settings.seed)
    if not questions:
        raise DataError(f"no row can be asked about; the first: {unusable[0].reason}")
    if other is not None:
        require_same_rows([blank for _, blank in questions], *other)
    shown = media_identity(request for request, _ in questions)
    whole = {"luthier": __version__, **_identity(answerer), **identity, **shown}
    record = PredictionRecord(folder, whole, overwrite=overwrite)
    predictions, speed = _answer(answerer.engine, answerer, questions, record, quiet=quiet)
    measured = measure_predictions(predictions)
    comparison = compared(measured, *other) if other is not None else None
    metrics = _report(measured, comparison, unusable, speed)
    write_whole(folder / RESULTS_NAME, json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    result = PredictResult(folder, predictions, metrics, *measured.extremes())
    _show(result, measured, comparison, unusable, say, quiet=quiet)
    return result


# --------------------------------------------------------------------------------------------------
# What is asked of what


@dataclass(frozen=True, slots=True)
class _Settings:
    """The model as it is opened, and the parts of its recipe that a prediction reads."""

    target: str | Path | Recipe
    data: DataSpec
    generation: GenerationSpec
    recipe: Recipe | None
    named: bool
    """Whether `data.eval` was named for this call, files by their paths among them."""

    @property
    def seed(self) -> int:
        """Of drawn tokens: each row has its own, so that none depends on which rows were answered before it."""
        if self.generation.seed is not None:
            return self.generation.seed
        return self.train_seed

    @property
    def train_seed(self) -> int:
        return self.recipe.train.seed if self.recipe is not None else _SEED


def _settings(target: str | Path | Recipe, overrides: Sequence[str], names: Sequence[str]) -> _Settings:
    """Raises RecipeError for overrides that would change the model, DataError where there is nothing to answer."""
    if not isinstance(target, Recipe) and (asked := recipe_in(target, overrides)) is not None:
        target, overrides = asked, ()
    recipe = target if isinstance(target, Recipe) else run_of(Path(target).expanduser())
    for word in overrides:
        if not word.startswith(("generation.", "data.")):
            raise RecipeError(
                f"{word}: predict takes settings of generation and data (generation.temperature=0.7); the model is as "
                "it was trained"
            )
    spec = recipe.data if recipe is not None else DataSpec()
    if not (names or spec.eval or (spec.train and spec.dev_split)) and not any(
        word.startswith("data.eval=") for word in overrides
    ):
        raise DataError("no data to answer: name a data set or a file (--data), or data.eval in the recipe")
    tree: dict[str, Any] = {"model": {"path": str(target)}, "data": spec.model_dump(mode="json")}
    if recipe is not None:
        tree["generation"] = recipe.generation.model_dump(mode="json")
    if names:
        tree["data"]["eval"] = list(names)
    changed = load_recipe(tree, overrides, to_export=True).recipe
    return _Settings(target, changed.data, changed.generation, recipe, bool(names))


def _asked(settings: _Settings, max_samples: int | None) -> tuple[list[Asked], dict[str, Any]]:
    """The rows, and what identifies them."""
    spec, recipe = settings.data, settings.recipe
    limit = spec.max_samples if max_samples is None else max_samples
    cache, token = (recipe.model.cache_dir, recipe.model.token) if recipe is not None else (None, None)
    source = Source(settings.train_seed, limit, cache, token)
    if not spec.eval:
        training = replace(source, max_samples=spec.max_samples)
        attrs = resolve_datasets(spec.train, spec)
        asked = held_out_questions(attrs, spec.dev_split, training, max_samples)
        identity = [training.fingerprint(attr) for attr in attrs]
        return asked, {"data": identity, "held_out": [spec.dev_split, settings.train_seed, max_samples]}
    if settings.named:
        known = recipe.data if recipe is not None else DataSpec()
        attrs = [_named(ref, spec, known) for ref in spec.eval]
    else:
        attrs = resolve_datasets(spec.eval, spec)
    twins = sorted({one.name for one in attrs if [two.name for two in attrs].count(one.name) > 1})
    if twins:
        raise DataError(f"two data sets are called {twins[0]!r}; give one of them another name")
    return read_questions(attrs, source), {"data": [source.fingerprint(attr) for attr in attrs]}


def _named(ref: str | DatasetSpec, spec: DataSpec, known: DataSpec) -> DatasetAttr:
    """A data set by its name, else a file by what the recipe (`known`) or its columns say of it."""
    file = Path(str(ref)).expanduser()
    if isinstance(ref, str) and file.is_file():
        return described(file, known)
    return resolve_datasets([ref], spec)[0]


def _identity(answerer: Answerer) -> dict[str, Any]:
    """What decides an answer besides its row, as JSON values."""
    trained = answerer.trained
    adapters = [
        {file.name: hash_file(file) for file in sorted(Path(folder).glob("adapter_*")) if file.is_file()}
        for folder in trained.adapters
    ]
    return {
        "model": {
            "base": fingerprint(locate(trained.model)),
            "adapters": adapters,
            "dtype": trained.model.dtype,
            "quantization": None
            if trained.model.quantization is None
            else trained.model.quantization.model_dump(mode="json"),
        },
        "template": answerer.template.fingerprint,
        "generation": {
            **asdict(answerer.settings()),
            "skip_special_tokens": answerer.spec.skip_special_tokens,
            **answerer.spec.template_variables,
            **({"engine": answerer.spec.engine} if answerer.spec.engine != "hf" else {}),
        },
    }


def _default_output(trained: Trained, settings: _Settings) -> Path:
    if isinstance(settings.target, Recipe):
        return Path(settings.target.train.output) / "predictions"
    folder = Path(trained.label)
    if folder.is_dir():
        beside = folder.name.startswith("checkpoint-")  # what is in a checkpoint is hashed
        return folder.parent / f"predictions-{folder.name}" if beside else folder / "predictions"
    raise RecipeError(f"{trained.label} has no folder of its own: say where predictions go with --output")


def _prepared(
    asked: Sequence[Asked], answerer: Answerer, seed: int
) -> tuple[list[tuple[Request, Prediction]], list[Unusable]]:
    """Each row's request with the prediction that its answer goes into, and the rows that cannot be asked."""
    ready: list[tuple[Request, Prediction]] = []
    unusable: list[Unusable] = []
    drawn = answerer.settings().temperature > 0
    skip = answerer.spec.skip_special_tokens
    for one in asked:
        if isinstance(one, Unusable):
            unusable.append(one)
            continue
        try:
            request, blank = _blank(one, answerer, {"seed": seed + one.index} if drawn else {}, skip)
        except (RowError, _NoRoom) as error:
            unusable.append(Unusable(one.index, one.dataset, one.row, str(error)))
        else:
            ready.append((request, blank))
    return ready, unusable


class _NoRoom(GenerationError):
    """A prompt that leaves no room for an answer: it is that row's fault, and not the settings'."""


def _blank(
    question: Question, answerer: Answerer, call: Mapping[str, Any], skip: bool
) -> tuple[Request, Prediction]:
    request = answerer.request(question.prompt, **call)
    try:
        answerer.engine.limit(request)
    except GenerationError as error:
        raise _NoRoom(str(error)) from error
    label = label_text(question, answerer.template, skip_special_tokens=skip)
    prompt = answerer.template.decode(request.prompt)
    return request, Prediction(prompt, "", label, question.index, question.dataset, question.row)


# --------------------------------------------------------------------------------------------------
# Answers


def _answer(
    engine: Engine,
    answerer: Answerer,
    questions: Sequence[tuple[Request, Prediction]],
    record: PredictionRecord,
    *,
    quiet: bool,
) -> tuple[list[Prediction], dict[str, float]]:
    """All predictions in order, those that were there included, and how fast the new ones came."""
    left = [(request, blank) for request, blank in questions if blank.index not in record.done]
    progress = PredictionProgress(len(questions), done=len(questions) - len(left), quiet=quiet)
    with record, progress:
        for number, answer in engine.answers([request for request, _ in left]):
            done = replace(
                left[number][1],
                predict=answerer.text(answer),
                finish=answer.finish,
                tokens=len(answer.choices),
                bad_scores=answer.bad_scores,
            )
            record.add(done)
            progress.advance(done.tokens)
        seconds = progress.seconds
        ordered = record.put_in_order()
    speed = {
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(progress.rows / seconds, 3),
        "predict_tokens_per_second": round(progress.tokens / seconds, 3),
        "predicted_before": progress.done,
    }
    return ordered, speed


def _report(
    measured: Measured,
    comparison: Comparison | None,
    unusable: Sequence[Unusable],
    speed: Mapping[str, float],
) -> dict[str, Any]:
    report = {"rows": len(measured.predictions), **measured.to_dict(), **speed}
    report["not_answered"] = [one.to_dict() for one in unusable]
    if comparison is not None:
        report["compare"] = comparison.to_dict()
    return report


def _show(
    result: PredictResult,
    measured: Measured,
    comparison: Comparison | None,
    unusable: Sequence[Unusable],
    say: Say,
    *,
    quiet: bool,
) -> None:
    """Numbers in a table, then the worst and best rows."""
    if quiet:
        return
    for title, rows in (("worst", result.worst), ("best", result.best)):
        for one in rows:
            score = measured.scores.rows[ORDERED_BY][measured.predictions.index(one)]
            where = f"{one.dataset}, row {one.row}" if one.dataset else f"row {one.index}"
            say(f"[bold]{title}[/] ({escape(where)}, {ORDERED_BY} {score:.1f}, {one.finish})")
            for name in ("label", "predict"):
                say(f"  [dim]{name}[/] {escape(_short(getattr(one, name)))}")
    say(_table(measured, comparison))
    if unusable:
        first = unusable[0]
        say(
            f"{len(unusable)} rows were not answered; {escape(first.dataset)}, row {first.row}: "
            f"{escape(first.reason)}"
        )
    finish = ", ".join(f"{count} {name}" for name, count in result.metrics["finish"].items())
    say(
        f"{len(result.predictions)} rows ({finish}), "
        f"{result.metrics['predict_tokens_per_second']:.1f} tokens/s: {escape(str(result.output))}"
    )


def _short(text: str) -> str:
    line = " ⏎ ".join(text.splitlines())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + "…"


def _table(measured: Measured, comparison: Comparison | None) -> Any:
    table = Table(box=None, pad_edge=False)
    for heading in ("metric", "value", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    if comparison is not None:
        for heading in ("other", "difference", "95 % interval"):
            table.add_column(heading, justify="right")
    for name, one in measured.numbers.items():
        cells = [name, f"{one.value:.2f}", f"{one.low:.2f} to {one.high:.2f}"]
        if comparison is not None:
            gap = comparison.differences[name]
            cells += [
                f"{comparison.theirs[name]:.2f}",
                f"{gap.value:+.2f}",
                f"{gap.low:+.2f} to {gap.high:+.2f}",
            ]
        table.add_row(*cells)
    return table
