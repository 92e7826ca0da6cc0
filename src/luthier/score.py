"""The verb `score`: what a reward model says of answers, one number each, as its run's evaluation computed them.

score_file(model, file, ...)          rows of a data file: answers, or pairs of them
score_text(model, prompt, text, ...)  one answer
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.arrange import Material, eval_sets
from luthier.assemble import build_model, fitted, load_tokens
from luthier.data.described import described
from luthier.data.encode import EncodeOptions
from luthier.data.formats import to_row
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.prepare import PreparedData
from luthier.data.read import read_rows
from luthier.data.registry import DatasetAttr
from luthier.data.table import SampleTable
from luthier.data.template import load_template
from luthier.environment import detect_hardware
from luthier.files import write_whole
from luthier.model.faults import read_json
from luthier.model.load import load_config, locate
from luthier.model.logprobs import ModelPolicy, chosen_rows
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import AdapterSpec, DataSpec, ModelSpec, Recipe, RmSpec
from luthier.show import quiet_libraries
from luthier.stages import build_stage
from luthier.trained.source import run_of
from luthier.trainer.precision import AUTOCAST
from luthier.types import Conversation, DataError, Encoded, Lost, Message, ModelError, Row, RowError, Sample

_ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Scored:
    """One row: a score, those of a better and a worse answer, or the reason why there is none."""

    index: int
    scores: tuple[float, ...] = ()
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.reason is not None:
            return {"index": self.index, "score": None, "reason": self.reason}
        if len(self.scores) == 1:
            return {"index": self.index, "score": self.scores[0]}
        return {"index": self.index, "score_chosen": self.scores[0], "score_rejected": self.scores[1]}


@dataclass(frozen=True, slots=True)
class Scores:
    """All rows in the order of their file."""

    rows: list[Scored] = field(default_factory=list)

    def lines(self) -> str:
        """One JSON object for each row."""
        return "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in self.rows)

    def summary(self) -> dict[str, float]:
        """How many rows have scores and how many have none, the mean score, and of pairs the accuracy (a tie is half
        right) and the mean margin."""
        scored = [row.scores for row in self.rows if row.reason is None]
        numbers: dict[str, float] = {"rows": len(scored), "not_scored": len(self.rows) - len(scored)}
        if not scored:
            return numbers
        every = [score for scores in scored for score in scores]
        numbers["mean_score"] = sum(every) / len(every)
        apart = [scores[0] - scores[1] for scores in scored if len(scores) == 2]
        if apart:
            numbers["accuracy"] = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in apart) / len(apart)
            numbers["mean_margin"] = sum(apart) / len(apart)
        return numbers


def score_file(
    model: str | Path,
    file: str | Path,
    *,
    output: Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    max_length: int | None = None,
) -> Scores:
    """Score the rows of a JSON, JSONL, CSV or Parquet file; written to `output`, where given, as JSON lines.

    model: the folder of a reward model or of a reward adapter, or a name on the hub. base: the model below the adapter,
    where it is not what the adapter's run says. max_length: of a row in tokens; that of its run where absent.
    Raises ModelError for what is no reward model, DataError for a file that cannot be read or is in the way.
    """
    if output is not None and output.exists() and not overwrite:
        raise DataError(f"{output} exists already; choose another file or give --overwrite")
    scorer = Scorer(model, base, max_length)
    attr = scorer.described(Path(file))
    scores = scorer.scores(_rows(attr))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, scores.lines())
    return scores


def score_text(
    model: str | Path, prompt: str, text: str, *, base: str | None = None, max_length: int | None = None
) -> Scores:
    """The score of `text` as the answer to `prompt`. Raises ModelError, and DataError where it cannot be scored."""
    scorer = Scorer(model, base, max_length)
    row = Row("text", 0, Conversation((Message("user", prompt), Message("assistant", text))), desirable=True)
    scores = scorer.scores(iter([(0, row)]))
    if scores.rows[0].reason is not None:
        raise DataError(f"the answer cannot be scored: {scores.rows[0].reason}")
    return scores


# --------------------------------------------------------------------------------------------------
# The model


class Scorer:
    """A reward model with its template, ready to score rows."""

    def __init__(self, model: str | Path, base: str | None, max_length: int | None) -> None:
        quiet_libraries()
        hardware = detect_hardware()
        self._folder, self._run = Path(model).expanduser(), _recipe_of(Path(model).expanduser())
        settings = self._settings(str(model), base, max_length, hardware)
        source = locate(settings.model)
        if not isinstance(settings.method, AdapterSpec):
            _require_classifier(settings.model, str(model))
        tokenizer, vocabulary = load_tokens(settings, source, lambda text: None)
        compatible = settings.data.rules == "llamafactory"
        template = load_template(tokenizer, settings.data, pieces=compatible)
        options = EncodeOptions.of(settings.data, "rm", llamafactory=compatible)
        built, _ = build_model(settings, source, hardware, vocabulary)
        stage, empty = (
            build_stage(settings.stage, options),
            PreparedData(SampleTable.of_mixed([]), {}, [], {}),
        )
        self._resolved, self._model, self._hardware = settings, built.eval(), hardware
        self._options = replace(options, train_after_stop=True)  # as stage rm does
        self._material = fitted(settings, Material(template, stage, empty), built)

    def _settings(self, model: str, base: str | None, max_length: int | None, hardware: Hardware) -> Recipe:
        """The recipe of a run that only evaluates this model, as its own run did where it has one."""
        run, adapter = self._run, (self._folder / "adapter_config.json").is_file()
        if not adapter and not self._folder.exists() and _looks_local(model):
            raise ModelError(f"{model}: no such folder")
        spec: dict[str, Any] = {"path": model, "tokenizer": model}
        if adapter:
            spec["path"] = base or self._base()
        method = {"type": "lora", "adapters": [*self._merged(), model]} if adapter else {"type": "full"}
        data: dict[str, Any] = {"train": [_ROWS]}
        train: dict[str, Any] = {}
        if run is not None:
            kept = ("dtype", "quantization", "rows", "padding_side", "trust_remote_code", "upcast_layernorm")
            spec |= run.model.model_dump(mode="json", include=set(kept))
            spec |= {} if adapter else {"dtype": run.model.saved_dtype}
            data |= {name: getattr(run.data, name) for name in ("max_length", "overflow", "rules")}
            data["parse_special_tokens"] = run.data.parse_special_tokens
            if run.data.rules == "llamafactory":
                data |= run.data.model_dump(include={"template", "default_system"}, exclude_none=True)
            names = ("tokens_per_pass", "precision", "eval_precision", "seed")
            train |= {name: getattr(run.train, name) for name in names}
        elif hardware.device == "cuda" and hardware.bf16:
            spec["dtype"] = "bfloat16"
        if max_length is not None:
            data["max_length"] = max_length
        stage = {"type": "rm", "share_prompts": _stage_of(run).share_prompts}
        tree = {"model": spec, "data": data, "stage": stage, "method": method, "train": train}
        return resolve(load_recipe(tree), hardware).recipe

    def _base(self) -> str:
        """What the adapter was trained on. Raises ModelError where it is no reward adapter."""
        config = read_json(self._folder / "adapter_config.json", str(self._folder))
        if config.get("task_type") != "SEQ_CLS":
            raise ModelError(
                f"{self._folder} is an adapter of a language model; scores come from a reward model (stage.type: rm)"
            )
        return self._run.model.path if self._run is not None else str(config.get("base_model_name_or_path"))

    def _merged(self) -> Sequence[str]:
        """The adapters that are merged into the base below this one."""
        method = None if self._run is None else self._run.method
        if not isinstance(method, AdapterSpec):
            return ()
        return method.adapters if method.create_new_adapter else method.adapters[:-1]

    def described(self, file: Path) -> DatasetAttr:
        """What the columns of a data file mean: as the run's recipe says of it, or by their names."""
        return described(file, self._run.data if self._run is not None else DataSpec())

    def scores(self, rows: Iterator[tuple[int, Row | RowError]]) -> Scores:
        found: dict[int, Scored] = {}
        samples: list[Sample] = []
        for index, row in rows:
            encoded = self.encoded(row)
            if encoded.samples:
                samples += encoded.samples
            else:
                found[index] = Scored(index, reason=encoded.lost.dropped)
        for index, numbers in self.numbers(samples).items():
            found[index] = Scored(index, numbers)
        return Scores([found[index] for index in sorted(found)])

    def encoded(self, row: Row | RowError) -> Encoded:
        """The sample of a row, or what is wrong with it."""
        if isinstance(row, RowError):
            return Encoded(lost=Lost(dropped=row.reason))
        encode = feedback_sample if row.rejected is None else pair_sample
        return encode(row, self._material.template, self._options)

    @torch.no_grad()
    def numbers(self, samples: list[Sample]) -> dict[int, tuple[float, ...]]:
        """The score of each sample, or those of its two answers, by the sample's index."""
        return {sample.index: numbers for sample, numbers in self._computed(samples)}

    def _computed(self, samples: list[Sample]) -> Iterator[tuple[Sample, tuple[float, ...]]]:
        """The scores of each sample, in the passes of an evaluation."""
        if not samples:
            return
        settings, table = self._resolved, SampleTable.of_mixed(samples)
        material = Material(
            self._material.template, self._material.stage, PreparedData(table, {_ROWS: table}, [], {})
        )
        plan = eval_sets(settings, material, 1, padded=chosen_rows(self._model).padded)[_ROWS]
        policy = ModelPolicy(self._model, AUTOCAST[settings.train.eval_precision])
        for indices in plan.passes[0]:
            chosen = [samples[index] for index in indices]
            scores_R = policy.scores(material.stage.collate(chosen).to(self._hardware.device)).tolist()
            for number, sample in enumerate(chosen):
                yield sample, tuple(scores_R[number :: len(chosen)])


def _recipe_of(folder: Path) -> Recipe | None:
    """The recipe of the run that a folder, or the one around a checkpoint, holds.

    Raises ModelError where it is of another stage.
    """
    recipe = run_of(folder)
    if recipe is not None and not isinstance(recipe.stage, RmSpec):
        raise ModelError(
            f"{folder} is a run of stage {recipe.stage.type}; scores come from a reward model (stage.type: rm)"
        )
    return recipe


def _stage_of(run: Recipe | None) -> RmSpec:
    return run.stage if run is not None and isinstance(run.stage, RmSpec) else RmSpec()


def _require_classifier(spec: ModelSpec, name: str) -> None:
    """Raise ModelError for a model without a value head of its own: it would get a random one."""
    config = load_config(spec, locate(spec))
    kinds = config.architectures or [config.model_type]
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(
            f"{name} is no reward model but a {kinds[0]}; scores come from a model with a value head "
            "(ForSequenceClassification with one label), such as stage.type: rm trains"
        )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


# --------------------------------------------------------------------------------------------------
# The rows


def _rows(attr: DatasetAttr) -> Iterator[tuple[int, Row | RowError]]:
    """The rows of a file, answers as if they were wanted; a row that cannot be used as what is wrong with it."""
    for raw in read_rows(attr):
        try:
            if attr.ranking:
                yield raw.index, to_row(raw, attr, "pair")
            else:
                row = to_row(raw, attr, "conversation")
                yield raw.index, Row(row.source, row.index, row.conversation, desirable=True)
        except RowError as error:
            yield raw.index, error
