"""Adapters of PEFT beside LoRA: some with fields of their own in the recipe, all others by their name in PEFT."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from peft import IA3Config, MissConfig, OFTConfig, PeftConfig, TaskType, VeraConfig
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from luthier.methods.adapter import Adapter
from luthier.model.faults import reason
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.schema import AdapterSpec, Ia3Spec, MissSpec, OftSpec, PeftSpec, TargetedSpec, VeraSpec
from luthier.types import RecipeError

Fields = dict[str, Any]


def _targets(spec: TargetedSpec) -> str | list[str]:
    return spec.targets if isinstance(spec.targets, str) else list(spec.targets)


def _oft(spec: OftSpec) -> tuple[type[PeftConfig], Fields]:
    cayley: Fields = {"use_cayley_neumann": spec.neumann_terms is not None}
    if spec.neumann_terms is not None:
        cayley["num_cayley_neumann_terms"] = spec.neumann_terms
    sizes = {"r": spec.blocks, "oft_block_size": spec.block_size}
    return OFTConfig, {"target_modules": _targets(spec), "module_dropout": spec.dropout, **sizes, **cayley}


def _vera(spec: VeraSpec) -> tuple[type[PeftConfig], Fields]:
    return VeraConfig, {
        "target_modules": _targets(spec),
        "r": spec.rank,
        "vera_dropout": spec.dropout,
        "projection_prng_key": spec.seed,
        "d_initial": spec.initial_scale,
    }


def _ia3(spec: Ia3Spec) -> tuple[type[PeftConfig], Fields]:
    names = {"target_modules": spec.targets, "feedforward_modules": spec.feedforward}
    return IA3Config, {
        name: list(value) if isinstance(value, tuple) else value for name, value in names.items()
    }


def _miss(spec: MissSpec) -> tuple[type[PeftConfig], Fields]:
    return MissConfig, {
        "target_modules": _targets(spec),
        "r": spec.rank,
        "miss_dropout": spec.dropout,
        "mini_r": spec.mini_rank,
        "init_weights": True if spec.init == "default" else spec.init,
    }


def _named(spec: PeftSpec) -> tuple[type[PeftConfig], Fields]:
    """A tuner by its name. Raises RecipeError for what PEFT does not know, and what would not be exact."""
    fields = dict(spec.config)
    kind = str(fields.pop("peft_type")).upper()
    kinds: dict[str, Any] = {name.value: config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in kinds:
        usable = sorted(name for name in kinds if refusal(name) is None)
        raise RecipeError(f"method.config.peft_type={kind!r}{_hint(kind, usable)}; choose from {usable}")
    why = refusal(kind)
    if why is not None:
        raise RecipeError(f"method.config.peft_type={kind}: {why}")
    config = kinds[kind]
    settings = {field.name for field in dataclasses.fields(PeftConfig)}
    known = {field.name for field in dataclasses.fields(config)} - settings
    for name in fields:
        if name in settings:
            raise RecipeError(f"method.config.{name} is set by the run; remove it")
        if name not in known:
            raise RecipeError(
                f"method.config.{name} is no field of {config.__name__}{_hint(name, sorted(known))}; "
                f"it has {sorted(known)}"
            )
    if "target_modules" in known and kind not in _OWN_TARGETS:
        fields.setdefault("target_modules", "all-linear")
    return config, fields


_OWN_TARGETS = ("IA3", "LN_TUNING")
"""Tuners that do not go on all linear layers: PEFT knows which ones they take, by kind of model."""
_OWN_FORM = "it has a form of its own; write method: {type: %s}"
_REFUSED = {
    "LORA": _OWN_FORM % "lora",
    "ADALORA": "it needs a call after every step that moves ranks between layers, which this loop does not make",
    "ADAPTION_PROMPT": "it adds prompt tokens to every sequence, and a flat batch has many sequences in one row",
    "XLORA": "it mixes adapters that were trained before; stack them with method.adapters",
    "POLY": "it needs the number of a task with every row",
    "SHADOW": "its layers hand on more than one tensor, and the model's own layers take one",
    "TRAINABLE_TOKENS": "write method: {type: lora, trainable_tokens: [...]}",
}


def refusal(kind: str) -> str | None:
    """Why the tuner `kind` of PEFT cannot be trained here; None where it can."""
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]  # type: ignore[index]
    if issubclass(config, PromptLearningConfig):
        return "it puts learnt tokens before a sequence, and a flat batch has many sequences in one row"
    return _REFUSED.get(kind)


def _hint(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


CONFIGURATIONS: dict[str, Callable[[Any], tuple[type[PeftConfig], Fields]]] = {
    "oft": _oft,
    "vera": _vera,
    "ia3": _ia3,
    "miss": _miss,
    "peft": _named,
}


class Tuner(Adapter):
    """An adapter whose arithmetic, saving and merging are all PEFT's."""

    def __init__(self, spec: AdapterSpec, vocabulary: VocabularyChange) -> None:
        super().__init__(spec, vocabulary)
        self._kind, self._fields = CONFIGURATIONS[spec.type](spec)  # type: ignore[attr-defined]
        self._try()

    def _try(self) -> None:
        """Raise RecipeError for values that the configuration does not take, whatever the model."""
        try:
            self._kind(**self._fields)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"method does not make a {self._kind.__name__}: {reason(error)}") from error

    @property
    def targets(self) -> str | tuple[str, ...] | None:
        targets = self._fields.get("target_modules")
        return tuple(targets) if isinstance(targets, list | tuple) else targets

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        named: Any = self._fields.get("modules_to_save") or getattr(self.spec, "modules_to_save", ())
        return tuple(named)

    def configuration(self, model: PreTrainedModel, task: TaskType, trained: Mapping[str, Any]) -> PeftConfig:
        fields = {**self._fields, **{name: value for name, value in trained.items() if value is not None}}
        return self._kind(task_type=task, **fields)
