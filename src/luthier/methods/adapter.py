"""Adapters through PEFT. What is saved is the adapter; the base stays the base."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.adapter_files import (
    ADAPTER,
    attach_adapter,
    linear_names,
    missing_weights,
    require_base,
)
from luthier.methods.groups import checkpoints_activations, decay_groups, require_input_gradients
from luthier.methods.token_rows import fuse_token_rows
from luthier.model.base_record import remembered_base, write_base
from luthier.model.faults import reason
from luthier.model.multimodal import frozen_modules
from luthier.model.positions import loaded_positions, read_positions, stretch_loaded, write_positions
from luthier.model.processor import write_processor
from luthier.model.value_head import value_head, write_value_head
from luthier.model.vocabulary import (
    VocabularyChange,
    is_tied,
    read_record,
    resize_embeddings,
    token_modules,
    write_record,
)
from luthier.recipe.schema import AdapterSpec
from luthier.types import CheckpointError, ModelError

ATTACH_ERRORS = (UserWarning, ValueError, TypeError, RuntimeError, AssertionError, KeyError)
"""What PEFT raises where a configuration does not fit a model."""


class Adapter(ABC):
    """An adapter, continued from another or stacked on several where the recipe names some."""

    def __init__(self, spec: AdapterSpec, vocabulary: VocabularyChange) -> None:
        self.spec = spec
        self.vocabulary = vocabulary

    @property
    def targets(self) -> str | tuple[str, ...] | None:
        """The layers that the recipe names; None where PEFT knows them."""
        targets: str | tuple[str, ...] | None = getattr(self.spec, "targets", None)
        return targets

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The modules that train as a whole beside the adapter."""
        modules: tuple[str, ...] = getattr(self.spec, "modules_to_save", ())
        return modules

    @abstractmethod
    def configuration(self, model: PreTrainedModel, task: TaskType, trained: Mapping[str, Any]) -> PeftConfig:
        """PEFT's configuration of a fresh adapter; `trained` is what of the embeddings and the head trains."""

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Attach the adapter; the base is frozen, but for the rows of new tokens.

        Raises ModelError for targets that the model has not, and for adapters that do not go with its tokens.
        """
        adapters = list(self.spec.adapters)
        continued = adapters.pop() if self.spec.continues else None
        for folder in adapters:
            model = self.merged(model, folder)
        inner = model
        peft_model = self._new(model) if continued is None else self._continued(model, continued)
        if checkpoints_activations(model):
            # Without it the first checkpointed layer has no input that asks for a gradient.
            require_input_gradients(inner)
        fuse_token_rows(peft_model)
        return peft_model

    def merged(self, model: PreTrainedModel, folder: str) -> PreTrainedModel:
        """The model with an adapter added into its weights, the rows of new tokens among them."""
        attached = self._attach(model, folder, trainable=False)
        try:
            merged = attached.merge_and_unload()
        except (RuntimeError, ValueError) as error:
            kind = attached.peft_config[ADAPTER].peft_type
            raise ModelError(
                f"method.adapters: {folder} cannot be merged ({kind}): {reason(error)}"
            ) from error
        assert isinstance(merged, PreTrainedModel)
        return merged

    def _continued(self, model: PreTrainedModel, folder: str) -> PeftModel:
        if self.vocabulary.new_ids and read_record(folder) is None:
            raise ModelError(
                f"method.adapters: {folder} was trained before model.vocabulary added tokens, so it has no rows "
                "for them; set method.create_new_adapter: true to train them in an adapter on top of it"
            )
        return self._attach(model, folder, trainable=True)

    def _new(self, model: PreTrainedModel) -> PeftModel:
        scored = value_head(model) is not None
        if scored:
            self._refuse_adapter_on("score", "where the value head trains as a whole")
        self._require_names(model)
        task = TaskType.SEQ_CLS if scored else TaskType.CAUSAL_LM
        trained, linear = self.token_rows(model), linear_names(model)
        try:
            with warnings.catch_warnings():
                for text in ("fan_in_fan_out", "The following (rank|alpha)_pattern"):  # it mends both itself
                    warnings.filterwarnings("ignore", message=text)
                # Another size than the recipe's, chosen by PEFT, is not what the recipe says.
                warnings.filterwarnings("error", message=".*[Aa]djusted")
                config = self._spared(self.configuration(model, task, trained), model)
                require_base(model, config, f"method.type={self.spec.type}")  # type: ignore[attr-defined]
                peft_model = get_peft_model(model, config)
        except ATTACH_ERRORS as error:
            said = re.sub(r"^\[PEFT:.*?\] ", "", reason(error)).split(". ")[0]
            raise ModelError(f"{self._label()}: {said}; the linear layers are {linear}") from error
        assert isinstance(peft_model, PeftModel)
        return peft_model

    def _spared(self, config: PeftConfig, model: PreTrainedModel) -> PeftConfig:
        """The configuration, which leaves frozen parts of the model out."""
        spared: Any = config
        if (pattern := frozen_modules(model)) is None:
            return config
        if not hasattr(spared, "exclude_modules"):
            raise ModelError(
                f"method.type={self.spec.type}: {type(config).__name__} cannot leave parts of a model out; set "  # type: ignore[attr-defined]
                "model.frozen_parts: [] and name its layers, or choose method: lora"
            )
        spared.exclude_modules = pattern
        return config

    def _label(self) -> str:
        return "method" if self.targets is None else f"method.targets={self.targets!r}"

    def _require_names(self, model: PreTrainedModel) -> None:
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        for field, names in (("targets", self.targets), ("modules_to_save", self.modules_to_save)):
            listed = () if names is None or isinstance(names, str) else names
            missing = [name for name in listed if name.rsplit(".", 1)[-1] not in known]
            if missing:
                raise ModelError(
                    f"method.{field}: the model has no module {missing}; its linear layers are {linear_names(model)}"
                )

    def token_rows(self, model: PreTrainedModel) -> dict[str, Any]:
        """What of the embeddings and the head trains, as arguments of a PEFT configuration: whole matrices.

        Raises ModelError for new tokens of a model with one matrix for embeddings and head.
        """
        saved = self._saved(model)
        if self.vocabulary.new_ids:
            if is_tied(model):
                raise ModelError(
                    "model.vocabulary adds tokens, and embeddings and head are one matrix: only method: lora trains "
                    "rows of it"
                )
            names = {module: name for name, module in model.named_modules()}
            matrices = [names[module] for module in token_modules(model) if module is not None]
            saved += [name for name in matrices if not any(ends_with(name, module) for module in saved)]
        return {"modules_to_save": saved or None}

    def _saved(self, model: PreTrainedModel) -> list[str]:
        saved = list(self.modules_to_save)
        # PEFT names the value head by itself.
        return saved if value_head(model) is None else [name for name in saved if name != "score"]

    def _refuse_adapter_on(self, name: str, why: str, otherwise: str = "") -> None:
        """What trains by itself takes no adapter: it would be one too many."""
        targets = self.targets
        if targets is None or targets == "all-linear":  # the output head is not among them
            return
        if isinstance(targets, str):
            hit = re.fullmatch(targets, name) is not None
        else:
            hit = any(ends_with(name, target) for target in targets)
        if hit:
            raise ModelError(
                f"method.targets={targets!r} puts an adapter on {name}, {why}; leave it out{otherwise}"
            )

    def _attach(self, model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
        record = read_record(folder)
        if record is not None and record != self.vocabulary:
            raise ModelError(f"method.adapters: {folder} was trained with new tokens that this model lacks")
        return attach_adapter(model, folder, trainable=trainable)

    def parameter_groups(self, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay)

    def save(self, model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        # Never the base's own embeddings: with them PEFT writes copies that it cannot load again. Left to itself
        # it asks a hub for the base model's vocabulary size.
        given: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=[ADAPTER], **given)
        if value_head(model) is not None:
            write_value_head(folder, model.state_dict() if state is None else state)
        if self.vocabulary.is_needed:
            write_record(folder, self.vocabulary)
        positions = loaded_positions(model)
        if positions is not None:
            write_positions(folder, positions)
        write_processor(model, folder)
        base = remembered_base(model)
        if base is not None:
            write_base(folder, base)

    def load(self, model: PeftModel, folder: Path) -> None:
        """Put the adapter of `folder` into `model`. Raises CheckpointError where it does not fit exactly."""
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds no adapter (adapter_config.json)")
        if read_record(folder) != (self.vocabulary if self.vocabulary.is_needed else None):
            raise CheckpointError(
                f"{folder} was trained with another model.vocabulary than this run has (see its vocabulary.json)"
            )
        weights = self.read_weights(model, folder)
        try:
            result: Any = set_peft_model_state_dict(model, weights)
        except KeyError as error:  # PEFT looks saved modules up by name
            raise CheckpointError(f"{folder} does not fit the adapter: missing {error}") from error
        missing = missing_weights(model, result.missing_keys)
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the adapter: missing {missing[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )

    def read_weights(self, model: PeftModel, folder: Path) -> dict[str, Tensor]:
        """The weights of the adapter that trains, as `save` wrote them."""
        return dict(load_peft_weights(str(folder), device="cpu"))


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """A trained adapter on its plain base, as the run that saved it had it: its new tokens and its positions first.

    Raises ModelError where the base is not the one that the tokens were added to.
    """
    record = read_record(folder)
    if record is not None:
        resize_embeddings(base, record)
    positions = read_positions(folder)
    if positions is not None and positions != loaded_positions(base):
        stretch_loaded(base, positions)
    return PeftModel.from_pretrained(base, str(folder))


def ends_with(name: str, suffix: str) -> bool:
    """Whether the last parts of a module's full name are `suffix`."""
    return name == suffix or name.endswith(f".{suffix}")
