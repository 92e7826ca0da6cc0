"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685), and how they start, scale and learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods.adapter import Adapter, ends_with, load_adapter
from luthier.methods.adapter_files import ADAPTER, linear_names
from luthier.methods.full import decoder_layers
from luthier.methods.fused import fuse_lora
from luthier.methods.groups import decay_groups
from luthier.methods.lora_data import most_components, start_from_covariance, start_from_inputs, take_ranks
from luthier.methods.lora_loftq import start_from_rounding
from luthier.methods.lora_start import add_start, has_start, start_from_weights, take_start, write_plain
from luthier.model.calibration import Calibration
from luthier.model.vocabulary import is_tied, token_modules
from luthier.recipe.schema import LoraSpec
from luthier.types import ModelError


class Lora(Adapter):
    """LoRA with rsLoRA's scale, DoRA's magnitudes, PiSSA's and OLoRA's start, LoRA+'s rates and LoRA-FA."""

    spec: LoraSpec

    def apply(self, model: PreTrainedModel) -> PeftModel:
        """As `Adapter.apply`. Where `num_calibration_samples` or `needs_original_weights` says so, the adapter begins
        with `calibrate` or `make_up_for_rounding`, or with `load`; until then it does nothing."""
        peft_model = super().apply(model)
        self._hold_a(peft_model)
        fuse_lora(peft_model)
        return peft_model

    def _hold_a(self, model: PeftModel) -> None:
        if self.spec.freeze_a:
            for layer in lora_layers(model).values():
                for matrices in (layer.lora_A, layer.lora_embedding_A):
                    if ADAPTER in matrices:
                        matrices[ADAPTER].requires_grad_(False)

    @property
    def num_calibration_samples(self) -> int:
        """How many samples of the training data the adapter wants to see before its first step; 0: it never looks."""
        looks = self.spec.init in ("eva", "corda") and not self.spec.continues
        return self.spec.calibration_samples if looks else 0

    @property
    def needs_original_weights(self) -> bool:
        """Whether the adapter starts from what rounding took off the base."""
        return self.spec.init == "loftq" and not self.spec.continues

    def calibrate(self, model: PeftModel, calibration: Calibration) -> None:
        """Begin from what the layers of `model` (its target forward installed) are given on rows of the run.

        Raises ModelError where the rows do not suffice.
        """
        if self.spec.init == "eva":
            start_from_inputs(model, calibration, self.spec.eva_rho, self.spec.eva_tau)
        else:
            start_from_covariance(model, calibration, self.spec.corda_mode)
        self._hold_a(model)

    def make_up_for_rounding(
        self, model: PeftModel, original: Callable[[str], Tensor], say: Callable[[str], None]
    ) -> None:
        """Begin from what rounding took off the base; see `start_from_rounding`."""
        start_from_rounding(model, original, self.spec.init_iterations, say)

    def least_tokens(self, model: PeftModel) -> int:
        """Fewest tokens of a pass of `calibrate`. Raises ModelError for layers that cannot be calibrated."""
        return most_components(model, self.spec.eva_rho) if self.spec.init == "eva" else 1

    def configuration(self, model: PreTrainedModel, task: TaskType, trained: Mapping[str, Any]) -> PeftConfig:
        spec = self.spec
        own_init = spec.init in ("gaussian", "orthogonal")
        return LoraConfig(
            task_type=task,
            r=spec.rank,
            lora_alpha=spec.alpha if spec.alpha is not None else 2 * spec.rank,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=self._target_modules(model),
            use_rslora=spec.rslora,
            use_dora=spec.dora,
            init_lora_weights=spec.init if own_init else True,  # type: ignore[arg-type]
            bias=spec.bias,
            layers_to_transform=list(spec.layers) or None,
            layers_pattern=spec.layers_pattern,
            rank_pattern=dict(spec.rank_pattern),
            alpha_pattern=dict(spec.alpha_pattern),
            target_parameters=list(spec.target_parameters) or None,
            **trained,
        )

    def _target_modules(self, model: PreTrainedModel) -> str | list[str]:
        spec = self.spec
        if not isinstance(spec.targets, str):
            return list(spec.targets)
        # PEFT counts layers only for modules that are named.
        return linear_names(decoder_layers(model)[1]) if spec.layers else spec.targets

    def _new(self, model: PreTrainedModel) -> PeftModel:
        spec = self.spec
        if spec.layers and spec.layers_pattern is None:
            _, layers = decoder_layers(model)
            wrong = [number for number in spec.layers if not 0 <= number < len(layers)]
            if wrong:
                raise ModelError(f"method.layers: no layer {wrong[0]}; the model has 0 to {len(layers) - 1}")
        own = [name for name, _ in model.named_parameters()]
        for parameter in spec.target_parameters:
            if not any(ends_with(name, parameter) for name in own):
                raise ModelError(f"method.target_parameters: the model has no parameter {parameter!r}")
        peft_model = super()._new(model)
        self._require_patterns(peft_model)
        if spec.init in ("pissa", "olora"):
            start_from_weights(peft_model, spec.init, spec.init_iterations)
        elif spec.init == "corda":
            add_start(peft_model, spec.init)
        return peft_model

    def _require_patterns(self, model: PeftModel) -> None:
        """PEFT says nothing of a pattern that no layer has. Raises ModelError for it."""
        names = [name.removeprefix("base_model.model.") for name in lora_layers(model)]
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.spec, field):
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                    raise ModelError(
                        f"method.{field}: {pattern!r} is the name of no adapted layer; "
                        f"they are {sorted(names)[:6]}, ..."
                    )

    def token_rows(self, model: PreTrainedModel) -> dict[str, Any]:
        """What of the embeddings and the head trains: rows of tokens, or a whole matrix that the recipe names."""
        saved = self._saved(model)
        ids = sorted({*self.vocabulary.new_ids, *self.spec.trainable_tokens})
        if not ids:
            return {"modules_to_save": saved or None}
        if self.spec.init == "eva":
            raise ModelError(
                "method.init=eva does not go with new tokens of model.vocabulary, whose rows train: PEFT would take "
                "the embeddings for one of the layers that it looks into; choose init: default"
            )
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        if ids[0] < 0 or ids[-1] >= rows:
            raise ModelError(f"method.trainable_tokens: the model has tokens 0 to {rows - 1}, not {ids}")
        names = {module: name for name, module in model.named_modules()}
        embedding, head = token_modules(model)
        matrices = [names[module] for module in (embedding, head) if module is not None]
        for name in matrices:
            self._refuse_adapter_on(
                name,
                "where the rows of the new tokens of model.vocabulary train"
                if self.vocabulary.new_ids
                else "where the rows of method.trainable_tokens train",
                ", or name it in method.modules_to_save to train all of it",
            )
        whole = [name for name in matrices if any(ends_with(name, module) for module in saved)]
        others = [module for module in saved if not any(ends_with(name, module) for name in whole)]
        if head is not None and head.bias is not None and matrices[1] not in whole:
            # PEFT's trained rows forget the bias of a head, wherever the adapter is loaded.
            whole.append(matrices[1])
        if is_tied(model):
            if whole:
                # One matrix: PEFT trains one copy for both only where it is asked, and given the first's name.
                return {"modules_to_save": [*others, matrices[0]], "ensure_weight_tying": True}
            matrices = matrices[:1]
        trained = {name: ids for name in matrices if name not in whole}
        return {"modules_to_save": [*others, *whole] or None, "trainable_token_indices": trained or None}

    def parameter_groups(self, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        """Decayed and not decayed, and with `lora_plus_ratio` each of these apart for B (arXiv:2402.12354)."""
        groups, ratio = decay_groups(model, weight_decay), self.spec.lora_plus_ratio
        if ratio is None:
            return groups
        rates = {}
        for name, parameter in model.named_parameters():
            if ".lora_embedding_B." in name:
                chosen = self.spec.lora_plus_embedding_lr
                rates[id(parameter)] = lr * ratio if chosen is None else chosen
            elif (
                ".lora_B." in name or parameter.ndim == 1
            ):  # magnitudes and biases go with B in its authors' code
                rates[id(parameter)] = lr * ratio
        split = []
        for group in groups:
            for rate in (lr, *sorted(set(rates.values()) - {lr})):
                members = [p for p in group["params"] if rates.get(id(p), lr) == rate]
                if members:
                    split.append({**group, "params": members, "lr": rate})
        return split

    def save(self, model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        super().save(model, folder, state)
        if has_start(model):
            write_plain(folder, model.state_dict() if state is None else state)

    def take_shapes(self, model: PeftModel, folder: Path) -> None:
        """Give a fresh adapter the ranks of the saved one, where they were chosen by what the data looked like."""
        if self.spec.init == "eva" and not self.spec.continues:
            take_ranks(model, super().read_weights(model, folder))
            self._hold_a(model)

    def read_weights(self, model: PeftModel, folder: Path) -> dict[str, Tensor]:
        self.take_shapes(model, folder)
        weights = super().read_weights(model, folder)
        return take_start(model, weights, folder) if has_start(model) else weights


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


__all__ = ["Lora", "load_adapter", "lora_layers"]
