"""A reward model with its template: conversations in, one number for each, as its run's evaluation computed them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from luthier.arrange import Material, eval_sets
from luthier.assemble import build_model
from luthier.data.described import described
from luthier.data.encode import EncodeOptions, media_of
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.prepare import PreparedData
from luthier.data.registry import DatasetAttr
from luthier.data.table import SampleTable
from luthier.data.template import load_template
from luthier.environment import detect_hardware
from luthier.material import fitted, load_tokens
from luthier.model.faults import read_json
from luthier.model.load import load_config, locate
from luthier.model.logprobs import ModelPolicy, chosen_rows
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import AdapterSpec, DataSpec, ModelSpec, QuantizationSpec, Recipe, RmSpec
from luthier.rewards.shared import SharedRewardModel
from luthier.show import quiet_libraries
from luthier.stages import build_stage
from luthier.trained.source import run_of
from luthier.trainer.precision import AUTOCAST
from luthier.types import Conversation, DataError, Encoded, Lost, ModelError, Row, RowError, Sample

_ROWS = "rows"


class Scorer:
    """A reward model with its template, ready to score rows.

    model: the folder of a reward model or of a reward adapter, or a name on the hub. base: the model below the adapter,
    where it is not what the adapter's run says. max_length: of a row in tokens; that of its run where absent.
    quantization: of the base while it loads, where it is not the run's. policy: a model on the same base, beside whose
    adapter the reward's is attached instead of loading the base again (`shared.why_apart` says where that is right).
    Raises ModelError for what is no reward model.
    """

    def __init__(
        self,
        model: str | Path,
        base: str | None = None,
        max_length: int | None = None,
        *,
        quantization: QuantizationSpec | None = None,
        policy: PeftModel | None = None,
    ) -> None:
        quiet_libraries()
        hardware = detect_hardware()
        self._folder, self._run = Path(model).expanduser(), _recipe_of(Path(model).expanduser())
        settings = self._settings(str(model), base, max_length, hardware, quantization)
        source = locate(settings.model)
        if not isinstance(settings.method, AdapterSpec):
            _require_classifier(settings.model, str(model))
        tokenizer, vocabulary = load_tokens(settings, source, lambda text: None)
        compatible = settings.data.rules == "llamafactory"
        template = load_template(tokenizer, settings.data, pieces=compatible)
        options = EncodeOptions.of(settings.data, "rm", llamafactory=compatible)
        stage, empty = (
            build_stage(settings.stage, options),
            PreparedData(SampleTable.of_mixed([]), {}, [], {}),
        )
        self._resolved, self._hardware = settings, hardware
        self._policy: ModelPolicy | SharedRewardModel
        arithmetic = AUTOCAST[settings.train.eval_precision]
        if policy is not None:
            self._policy, self._model = SharedRewardModel(policy, self._folder, arithmetic), policy
        else:
            built, _ = build_model(settings, source, hardware, vocabulary)
            self._model = built.eval().requires_grad_(False)
            self._policy = ModelPolicy(self._model, arithmetic)
        self._options = replace(options, train_after_stop=True)  # as stage rm does
        self._material = fitted(settings, Material(template, stage, empty), self._model)

    def _settings(
        self,
        model: str,
        base: str | None,
        max_length: int | None,
        hardware: Hardware,
        quantization: QuantizationSpec | None,
    ) -> Recipe:
        """The recipe of a run that only evaluates this model, as its own run did where it has one."""
        run, adapter = self._run, (self._folder / "adapter_config.json").is_file()
        if not adapter and not self._folder.exists() and _looks_local(model):
            raise ModelError(f"{model}: no such folder")
        spec: dict[str, Any] = {"path": model, "tokenizer": model}
        if adapter:
            trained_on = self._base()
            spec["path"] = base or trained_on
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
        if quantization is not None:
            spec["quantization"] = quantization.model_dump(mode="json")
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

    def encoded(self, row: Row | RowError) -> Encoded:
        """The sample of a row, or what is wrong with it."""
        if isinstance(row, RowError):
            return Encoded(lost=Lost(dropped=row.reason))
        if media_of(row.conversation):
            raise DataError(
                f"{row.source}, row {row.index}: it holds images, films or sounds, and scores are of text alone"
            )
        encode = feedback_sample if row.rejected is None else pair_sample
        return encode(row, self._material.template, self._options)

    def whole(self, index: int, conversation: Conversation) -> Sample:
        """The sample of a conversation that ends with an answer, whatever the answer is and however long it may be: an
        empty one and one that was cut are scored too.

        Raises DataError where the template cannot render it.
        """
        encoded = self._material.template.encode(conversation)
        span = encoded.answers[-1] if encoded.answers else None
        if span is None or not span.start:
            raise DataError("the template shows no prompt with an answer behind it")
        ids = np.asarray(encoded.input_ids[: span.end], np.int32)
        weights = np.repeat(np.array([0, 1], np.float32), [span.start, span.end - span.start])
        return Sample(ids, weights, _ROWS, index, (span.start,), 1.0)

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model has positions for, where its config says so."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) else None

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
        for indices in plan.passes[0]:
            chosen = [samples[index] for index in indices]
            scores_R = self._policy.scores(material.stage.collate(chosen).to(self._hardware.device)).tolist()
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
