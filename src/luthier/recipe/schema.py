"""The recipe: one run as one frozen, typed value. It knows nothing of torch, files or devices.

Every choice between kinds is a tagged union (`type: lora`), so a field that does not belong to the kind
chosen is an error, not silence. Field descriptions become the JSON Schema that editors show.
"""

from __future__ import annotations

from pydantic import model_validator

from luthier.recipe.base import Spec
from luthier.recipe.data import ColumnSpec, DatasetSpec, DataSpec, TagSpec, TemplateSpec
from luthier.recipe.method import FreezeSpec, FullSpec, LoraSpec, MethodSpec
from luthier.recipe.model import EMBEDDED_MODEL, ModelSpec, RopeScalingSpec, VocabularySpec
from luthier.recipe.optim import AdamwSpec, AnyOptimSpec, OptimSpec, ScheduleName, SgdSpec
from luthier.recipe.quantization import BitsAndBytesSpec, HqqSpec, QuantizationSpec, TorchaoSpec
from luthier.recipe.stage import (
    DpoSpec,
    KtoSpec,
    PtSpec,
    ReferenceSpec,
    RmSpec,
    SftSpec,
    StageSpec,
)
from luthier.recipe.train import BadNumbersSpec, CompileSpec, EarlyStoppingSpec, HubSpec, TrainSpec

__all__ = [
    "EMBEDDED_MODEL",
    "AdamwSpec",
    "AnyOptimSpec",
    "BadNumbersSpec",
    "BitsAndBytesSpec",
    "ColumnSpec",
    "CompileSpec",
    "DataSpec",
    "DatasetSpec",
    "DpoSpec",
    "EarlyStoppingSpec",
    "FreezeSpec",
    "FullSpec",
    "HqqSpec",
    "HubSpec",
    "KtoSpec",
    "LoraSpec",
    "MethodSpec",
    "ModelSpec",
    "OptimSpec",
    "PtSpec",
    "QuantizationSpec",
    "Recipe",
    "ReferenceSpec",
    "RmSpec",
    "RopeScalingSpec",
    "ScheduleName",
    "SftSpec",
    "SgdSpec",
    "Spec",
    "StageSpec",
    "TagSpec",
    "TemplateSpec",
    "TorchaoSpec",
    "TrainSpec",
    "VocabularySpec",
]


class Recipe(Spec):
    """The whole run."""

    model: ModelSpec
    data: DataSpec = DataSpec()
    stage: StageSpec = SftSpec()
    method: MethodSpec = LoraSpec()
    optim: AnyOptimSpec = AdamwSpec()
    train: TrainSpec = TrainSpec()

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if not self.train.eval_only and not self.data.train:
            raise ValueError("data.train is empty: name at least one data set")
        if self.train.eval_only and not self.data.eval and not self.data.dev_split:
            raise ValueError("train.eval_only needs data.eval or data.dev_split")
        train = self.train
        if train.eval_every is not None and not self.data.eval and not self.data.dev_split:
            raise ValueError("train.eval_every needs something to evaluate on: data.eval or data.dev_split")
        if train.load_best and train.eval_every is None:
            raise ValueError("train.load_best needs train.eval_every: the best is chosen at evaluations")
        if train.load_best and train.save_every != train.eval_every:
            steps = (train.save_every, train.eval_every)
            if not all(isinstance(value, int) for value in steps) or steps[0] % steps[1]:  # type: ignore[operator]
                raise ValueError(
                    "train.load_best needs checkpoints at evaluations: make save_every equal to eval_every"
                )
        return self

    @model_validator(mode="after")
    def _what_the_stage_has(self) -> Recipe:
        stage = self.stage
        if isinstance(stage, RmSpec) and self.train.metrics:
            raise ValueError(
                "train.metrics does not go with stage: rm, which predicts no tokens; evaluations report the accuracy "
                "and the margin of the scores of themselves"
            )
        if getattr(stage, "reference", None) == "base" and not isinstance(self.method, LoraSpec):
            raise ValueError(
                f"stage.reference: base is the model below adapters, and method: {self.method.type} has none; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _what_a_quantized_base_takes(self) -> Recipe:
        if self.model.quantization is None:
            return self
        method = self.method
        if isinstance(method, FullSpec | FreezeSpec):
            raise ValueError(
                f"model.quantization: rounded weights cannot train, and method: {method.type} trains the model's own; "
                "give method.type: lora, or leave quantization out"
            )
        if isinstance(method, LoraSpec) and (method.create_new_adapter or len(method.adapters) > 1):
            raise ValueError(
                "model.quantization: adding an adapter into rounded weights would round them anew; name one adapter "
                "in method.adapters and go on with it, or add it into the plain base first"
            )
        return self
