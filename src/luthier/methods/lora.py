"""Low-rank adapters through PEFT. What is saved is the adapter; the base stays the base."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.adapter_files import attach_adapter, linear_names
from luthier.methods.fused import fuse_lora
from luthier.methods.groups import checkpoints_activations, decay_groups
from luthier.methods.token_rows import fuse_token_rows
from luthier.model.faults import reason
from luthier.model.positions import loaded_positions, read_positions, stretch_loaded, write_positions
from luthier.model.value_head import value_head, write_value_head
from luthier.model.vocabulary import (
    VocabularyChange,
    is_tied,
    read_record,
    resize_embeddings,
    token_modules,
    write_record,
)
from luthier.recipe.schema import LoraSpec
from luthier.types import CheckpointError, ModelError


class Lora:
    """LoRA (Hu et al., 2021), continued from adapters or stacked on them where the recipe names some."""

    def __init__(self, spec: LoraSpec, vocabulary: VocabularyChange) -> None:
        self.spec = spec
        self.vocabulary = vocabulary

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Attach the adapter; the base is frozen, but for the rows of new tokens.

        Raises ModelError for targets that the model has not, and for adapters that do not go with its tokens.
        """
        adapters = list(self.spec.adapters)
        continued = adapters.pop() if adapters and not self.spec.create_new_adapter else None
        for folder in adapters:
            model = self.merged(model, folder)
        peft_model = self._new(model) if continued is None else self._continued(model, continued)
        if checkpoints_activations(model):
            # Without it the first checkpointed layer has no input that asks for a gradient.
            model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        fuse_lora(peft_model)
        fuse_token_rows(peft_model)
        return peft_model

    def merged(self, model: PreTrainedModel, folder: str) -> PreTrainedModel:
        """The model with an adapter added into its weights, the rows of new tokens among them."""
        merged = self._attach(model, folder, trainable=False).merge_and_unload()
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
        spec, scored = self.spec, value_head(model) is not None
        if scored:
            self._refuse_adapter_on("score", "where the value head trains as a whole")
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS if scored else TaskType.CAUSAL_LM,
            r=spec.rank,
            lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.rank,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
            **self._token_rows(model),
        )
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        linear = linear_names(model)
        for field, names in (("targets", spec.targets), ("modules_to_save", spec.modules_to_save)):
            missing = (
                [] if isinstance(names, str) else [n for n in names if n.rsplit(".", 1)[-1] not in known]
            )
            if missing:
                raise ModelError(
                    f"method.{field}: the model has no module {missing}; its linear layers are {linear}"
                )
        try:
            with warnings.catch_warnings():
                for text in ("fan_in_fan_out", "The following (rank|alpha)_pattern"):  # it mends both itself
                    warnings.filterwarnings("ignore", message=text)
                peft_model = get_peft_model(model, config)
        except ValueError as error:
            said = re.sub(r"^\[PEFT:.*?\] ", "", reason(error)).split(". ")[0]
            raise ModelError(
                f"method.targets={spec.targets!r}: {said}; the linear layers are {linear}"
            ) from error
        assert isinstance(peft_model, PeftModel)
        return peft_model

    def _token_rows(self, model: PreTrainedModel) -> dict[str, Any]:
        """What of the embeddings and the head trains, as arguments of a `LoraConfig`: the rows of new tokens,
        or a whole matrix that the recipe names."""
        saved, ids = list(self.spec.modules_to_save), list(self.vocabulary.new_ids)
        if value_head(model) is not None:
            saved = [name for name in saved if name != "score"]  # PEFT names it by itself
        if not ids:
            return {"modules_to_save": saved or None}
        names = {module: name for name, module in model.named_modules()}
        embedding, head = token_modules(model)
        matrices = [names[module] for module in (embedding, head) if module is not None]
        for name in matrices:
            self._refuse_adapter_on(
                name,
                "where the rows of the new tokens of model.vocabulary train",
                ", or name it in method.modules_to_save to train all of it",
            )
        whole = [name for name in matrices if any(_ends_with(name, module) for module in saved)]
        others = [module for module in saved if not any(_ends_with(name, module) for name in whole)]
        if head is not None and head.bias is not None and matrices[1] not in whole:
            # PEFT's trained rows forget the bias of a head, wherever the adapter is loaded.
            whole.append(matrices[1])
        if is_tied(model):
            if whole:
                # One matrix: PEFT trains one copy for both only where it is asked, and given the first's name.
                return {"modules_to_save": [*others, matrices[0]], "ensure_weight_tying": True}
            matrices = matrices[:1]
        rows = {name: ids for name in matrices if name not in whole}
        return {"modules_to_save": [*others, *whole] or None, "trainable_token_indices": rows or None}

    def _refuse_adapter_on(self, name: str, why: str, otherwise: str = "") -> None:
        """What trains by itself takes no low-rank adapter: it would be one too many."""
        targets = self.spec.targets
        if targets == "all-linear":  # the output head is not among them
            return
        if isinstance(targets, str):
            hit = re.fullmatch(targets, name) is not None
        else:
            hit = any(_ends_with(name, target) for target in targets)
        if hit:
            raise ModelError(
                f"method.targets={targets!r} puts an adapter on {name}, {why}; leave it out{otherwise}"
            )

    def _attach(self, model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
        record = read_record(folder)
        if record is not None and record != self.vocabulary:
            raise ModelError(f"method.adapters: {folder} was trained with new tokens that this model lacks")
        return attach_adapter(model, folder, trainable=trainable)

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay)

    def save(self, model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        # Never the base's own embeddings: with them PEFT writes copies that it cannot load again. Left to itself
        # it asks a hub for the base model's vocabulary size.
        given: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(str(folder), save_embedding_layers=False, **given)
        if value_head(model) is not None:
            write_value_head(folder, model.state_dict() if state is None else state)
        if self.vocabulary.is_needed:
            write_record(folder, self.vocabulary)
        positions = loaded_positions(model)
        if positions is not None:
            write_positions(folder, positions)

    def load(self, model: PeftModel, folder: Path) -> None:
        """Put the adapter of `folder` into `model`. Raises CheckpointError where it does not fit exactly."""
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds no adapter (adapter_config.json)")
        if read_record(folder) != (self.vocabulary if self.vocabulary.is_needed else None):
            raise CheckpointError(
                f"{folder} was trained with another model.vocabulary than this run has (see its vocabulary.json)"
            )
        weights = load_peft_weights(str(folder), device="cpu")
        try:
            result: Any = set_peft_model_state_dict(model, weights)
        except KeyError as error:  # PEFT looks saved modules up by name
            raise CheckpointError(f"{folder} does not fit the adapter: missing {error}") from error
        parts = (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")
        # A tied matrix is saved once and stands under two names; of those `named_parameters` gives the first.
        own = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
        adapter = [name for name in result.missing_keys if name in own]
        if adapter or result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the adapter: missing {adapter[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )


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


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
