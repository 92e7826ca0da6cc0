"""Low-rank adapters through PEFT. What is saved is the adapter; the base stays the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.fused import fuse_lora
from luthier.methods.groups import checkpoints_activations, decay_groups
from luthier.recipe.schema import LoraSpec
from luthier.types import CheckpointError, ModelError


class Lora:
    """LoRA (Hu et al., 2021), continued from adapters or stacked on them where the recipe names some."""

    def __init__(self, spec: LoraSpec) -> None:
        self.spec = spec

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """Attach the adapter; the base is frozen. Raises ModelError for targets that the model has not."""
        adapters = list(self.spec.adapters)
        continued = adapters.pop() if adapters and not self.spec.create_new_adapter else None
        for folder in adapters:
            merged = self._attach(model, folder, trainable=False).merge_and_unload()
            assert isinstance(merged, PreTrainedModel)
            model = merged
        peft_model = self._new(model) if continued is None else self._attach(model, continued, trainable=True)
        if checkpoints_activations(model):
            # Without it the first checkpointed layer has no input that asks for a gradient.
            model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        fuse_lora(peft_model)
        return peft_model

    def _new(self, model: PreTrainedModel) -> PeftModel:
        spec = self.spec
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=spec.rank,
            lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.rank,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=spec.targets if isinstance(spec.targets, str) else list(spec.targets),
            modules_to_save=list(spec.modules_to_save) or None,
        )
        known = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        for field, names in (("targets", spec.targets), ("modules_to_save", spec.modules_to_save)):
            missing = (
                [] if isinstance(names, str) else [n for n in names if n.rsplit(".", 1)[-1] not in known]
            )
            if missing:
                linear = sorted(
                    {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
                )
                raise ModelError(
                    f"method.{field}: the model has no module {missing}; its linear layers are {linear}"
                )
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"method.targets={spec.targets!r}: {error}") from error
        assert isinstance(peft_model, PeftModel)
        return peft_model

    def _attach(self, model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
        if not (Path(folder) / "adapter_config.json").is_file() and Path(folder).exists():
            raise ModelError(
                f"method.adapters: {folder} holds no adapter_config.json, so it is not an adapter"
            )
        try:
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"method.adapters: {folder} could not be loaded: {error}") from error

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        return decay_groups(model, weight_decay)

    def save(self, model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        # Never the base's own embeddings: with them PEFT writes copies that it cannot load again. Left to itself
        # it asks a hub for the base model's vocabulary size.
        given: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(str(folder), save_embedding_layers=False, **given)

    def load(self, model: PeftModel, folder: Path) -> None:
        """Put the adapter of `folder` into `model`. Raises CheckpointError where it does not fit exactly."""
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds no adapter (adapter_config.json)")
        weights = load_peft_weights(str(folder), device="cpu")
        result: Any = set_peft_model_state_dict(model, weights)
        adapter = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
        if adapter or result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the adapter: missing {adapter[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )
