"""The recipe: one run as one frozen, typed value. It knows nothing of torch, files or devices.

Every choice between kinds is a tagged union (`type: lora`), so a field that does not belong to the kind
chosen is an error, not silence. Field descriptions become the JSON Schema that editors show.
"""

from __future__ import annotations

from pydantic import model_validator

from luthier.recipe.base import Spec
from luthier.recipe.data import ColumnSpec, DatasetSpec, DataSpec, TagSpec, TemplateSpec
from luthier.recipe.export import ExportSpec
from luthier.recipe.generation import GenerationSpec
from luthier.recipe.method import (
    AdapterSpec,
    FreezeSpec,
    FullSpec,
    Ia3Spec,
    LlamaProSpec,
    LoraSpec,
    MethodSpec,
    MissSpec,
    OftSpec,
    PeftSpec,
    TargetedSpec,
    VeraSpec,
)
from luthier.recipe.model import EMBEDDED_MODEL, CheckpointingSpec, ModelSpec, RopeScalingSpec, VocabularySpec
from luthier.recipe.online import (
    ExactMatchSpec,
    FunctionRewardSpec,
    GrpoSpec,
    HttpRewardSpec,
    KlSpec,
    LengthSpec,
    MathVerifySpec,
    ModelRewardSpec,
    NumericSpec,
    OnlineSpec,
    PpoSpec,
    ReasoningGymSpec,
    RegexSpec,
    RewardKlSpec,
    RewardSpec,
)
from luthier.recipe.online_rules import require_online
from luthier.recipe.optim import (
    AT_EVALUATIONS,
    AdafactorSpec,
    AdalomoSpec,
    AdamMiniSpec,
    AdamwSpec,
    AnyOptimSpec,
    ApolloSpec,
    BadamRatioSpec,
    BadamSpec,
    GaloreSpec,
    GroupSpec,
    LionSpec,
    LomoSpec,
    LowRankSpec,
    MuonSpec,
    OptimSpec,
    ScheduleFreeSpec,
    ScheduleName,
    SgdSpec,
)
from luthier.recipe.parallel import DdpSpec, DeepSpeedSpec, Fsdp2Spec, ParallelSpec, TensorSpec
from luthier.recipe.quantization import BitsAndBytesSpec, HqqSpec, QuantizationSpec, TorchaoSpec
from luthier.recipe.reference import ReferenceSpec
from luthier.recipe.stage import (
    DpoSpec,
    KtoSpec,
    PtSpec,
    RmSpec,
    SftSpec,
    StageSpec,
)
from luthier.recipe.streaming import require_streamable
from luthier.recipe.train import (
    BadNumbersSpec,
    CompileSpec,
    EarlyStoppingSpec,
    GenerateAtEvalSpec,
    HubSpec,
    TrainSpec,
)

__all__ = [
    "EMBEDDED_MODEL",
    "AdafactorSpec",
    "AdalomoSpec",
    "AdamMiniSpec",
    "AdamwSpec",
    "AdapterSpec",
    "AnyOptimSpec",
    "ApolloSpec",
    "BadNumbersSpec",
    "BadamRatioSpec",
    "BadamSpec",
    "BitsAndBytesSpec",
    "CheckpointingSpec",
    "ColumnSpec",
    "CompileSpec",
    "DataSpec",
    "DatasetSpec",
    "DdpSpec",
    "DeepSpeedSpec",
    "DpoSpec",
    "EarlyStoppingSpec",
    "ExactMatchSpec",
    "ExportSpec",
    "FreezeSpec",
    "Fsdp2Spec",
    "FullSpec",
    "FunctionRewardSpec",
    "GaloreSpec",
    "GenerateAtEvalSpec",
    "GenerationSpec",
    "GroupSpec",
    "GrpoSpec",
    "HqqSpec",
    "HttpRewardSpec",
    "HubSpec",
    "Ia3Spec",
    "KlSpec",
    "KtoSpec",
    "LengthSpec",
    "LionSpec",
    "LlamaProSpec",
    "LomoSpec",
    "LoraSpec",
    "LowRankSpec",
    "MathVerifySpec",
    "MethodSpec",
    "MissSpec",
    "ModelRewardSpec",
    "ModelSpec",
    "MuonSpec",
    "NumericSpec",
    "OftSpec",
    "OnlineSpec",
    "OptimSpec",
    "ParallelSpec",
    "PeftSpec",
    "PpoSpec",
    "PtSpec",
    "QuantizationSpec",
    "ReasoningGymSpec",
    "Recipe",
    "ReferenceSpec",
    "RegexSpec",
    "RewardKlSpec",
    "RewardSpec",
    "RmSpec",
    "RopeScalingSpec",
    "ScheduleFreeSpec",
    "ScheduleName",
    "SftSpec",
    "SgdSpec",
    "Spec",
    "StageSpec",
    "TagSpec",
    "TargetedSpec",
    "TemplateSpec",
    "TensorSpec",
    "TorchaoSpec",
    "TrainSpec",
    "VeraSpec",
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
    parallel: ParallelSpec = DdpSpec()
    generation: GenerationSpec = GenerationSpec()
    export: ExportSpec = ExportSpec()

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        train, data = self.train, self.data
        others = bool(data.eval) or self.export.output is not None or "generation" in self.model_fields_set
        if not (train.eval_only or data.train or others):
            raise ValueError("data.train is empty: name at least one data set")
        if self.train.eval_only and not self.data.eval and not self.data.dev_split:
            raise ValueError("train.eval_only needs data.eval or data.dev_split")
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
    def _what_the_optimizer_needs(self) -> Recipe:
        optim, train = self.optim, self.train
        by_blocks = isinstance(optim, LowRankSpec | BadamSpec | BadamRatioSpec)
        if by_blocks and isinstance(self.method, AdapterSpec):
            raise ValueError(
                f"optim.type: {optim.type} saves memory where whole weights train, and adapters are small already; "
                "write method: {type: full}, or optim: {type: adamw}"
            )
        if optim.in_backward:
            late = {
                "train.precision: fp16": train.precision == "fp16",
                "train.bad_numbers.action: skip": train.bad_numbers.action == "skip",
                "train.fit_memory": train.fit_memory,
            }
            for key, given in late.items():
                if given:
                    raise ValueError(
                        f"{key} does not go with optim.type: {optim.type}, which has changed the parameters "
                        "by the end of the backward pass; remove it"
                    )
        if optim.schedule in AT_EVALUATIONS and optim.schedule_function is None and train.eval_every is None:
            raise ValueError(
                f"optim.schedule: {optim.schedule} takes its steps at evaluations; give train.eval_every"
            )
        return self

    @model_validator(mode="after")
    def _what_the_stage_has(self) -> Recipe:
        stage = self.stage
        if self.data.stream is not None:
            require_streamable(stage, self.data, self.train)
        self._require_learnt()
        if isinstance(stage, OnlineSpec):
            require_online(stage, self.data, self.train, self.generation, self.method, self.optim)
        if self.train.generate_at_eval is not None:
            self._require_answers()
        if isinstance(stage, RmSpec) and self.train.metrics:
            raise ValueError(
                "train.metrics does not go with stage: rm, which predicts no tokens; evaluations report the accuracy "
                "and the margin of the scores of themselves"
            )
        if getattr(stage, "reference", None) == "base" and not isinstance(self.method, AdapterSpec):
            raise ValueError(
                f"stage.reference: base is the model below adapters, and method: {self.method.type} has none; "
                "leave it out"
            )
        return self

    def _require_learnt(self) -> None:
        """What says which tokens of a conversation are learnt is for sft; ppo and grpo have rules of their own."""
        data, stage = self.data, self.stage.type
        if data.train_on_prompt and data.mask_history:
            raise ValueError(
                "data.mask_history learns the last answer alone, and data.train_on_prompt everything; keep one of them"
            )
        does = {"pt": "learns every token", **dict.fromkeys(("rm", "dpo", "kto"), "compares whole answers")}
        chosen = {
            "train_on_prompt": data.train_on_prompt,
            "mask_history": data.mask_history,
            "train_roles": data.train_roles != ("assistant",),
        }
        for key, is_given in chosen.items():
            if is_given and stage in does:
                raise ValueError(
                    f"data.{key} does not go with stage: {stage}, which {does[stage]}; leave it out, or give stage: sft"
                )

    def _require_answers(self) -> None:
        key, data = "train.generate_at_eval", self.data
        if not isinstance(self.stage, SftSpec):
            raise ValueError(f"{key} goes with stage: sft, and this is {self.stage.type}; remove it")
        if not data.eval and not data.dev_split:
            raise ValueError(f"{key} needs something to evaluate on: data.eval or data.dev_split")
        if data.train_on_prompt or data.overflow == "split":
            wrong = "train_on_prompt: true" if data.train_on_prompt else "overflow: split"
            raise ValueError(
                f"{key} does not go with data.{wrong}: where an answer begins is not known then; remove one of them"
            )

    @model_validator(mode="after")
    def _what_a_quantized_base_takes(self) -> Recipe:
        method = self.method
        if self.model.quantization is None:
            if getattr(method, "init", None) == "loftq":
                raise ValueError(
                    "method.init: loftq makes up for the rounding of the base, from the weights in its files; give "
                    "model.quantization (files that are quantized already do not hold them), or another init"
                )
            return self
        if not isinstance(method, AdapterSpec):
            raise ValueError(
                f"model.quantization: rounded weights cannot train, and method: {method.type} trains the model's own; "
                "give method.type: lora, or leave quantization out"
            )
        if method.create_new_adapter or len(method.adapters) > 1:
            raise ValueError(
                "model.quantization: adding an adapter into rounded weights would round them anew; name one adapter "
                "in method.adapters and go on with it, or add it into the plain base first"
            )
        return self
