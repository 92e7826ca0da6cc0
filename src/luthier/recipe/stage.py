"""The stage part of a recipe: what is learnt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from luthier.recipe.base import Spec
from luthier.recipe.online import GrpoSpec, PpoSpec
from luthier.recipe.reference import Reference, is_precomputed


class PtSpec(Spec):
    """Continued pre-training: every token of plain text is a target."""

    type: Literal["pt"] = "pt"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class SftSpec(Spec):
    """Supervised fine-tuning: the assistant's tokens are targets."""

    type: Literal["sft"] = "sft"
    loss: Literal["cross_entropy", "dft", "asft", "eaft"] = "cross_entropy"
    """dft weights each token by its own probability, asft adds a divergence from the reference, eaft weights by
    entropy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of cross_entropy alone."""
    kl_weight: float = Field(default=0.1, ge=0)
    """Of asft: the weight of the divergence from the reference."""
    entropy_power: float = Field(default=1.0, ge=0)
    """Of eaft: the power of the entropy."""
    reference: Reference = "start"
    """Of asft."""

    @model_validator(mode="after")
    def _smoothing_of_cross_entropy(self) -> SftSpec:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"stage.label_smoothing belongs to loss: cross_entropy, not to {self.loss}")
        return self

    @model_validator(mode="after")
    def _reference_of_asft(self) -> SftSpec:
        if self.loss != "asft":
            if self.reference != "start":
                raise ValueError(f"stage.reference belongs to loss: asft, not to {self.loss}")
        elif is_precomputed(self.reference):
            raise ValueError(
                "stage.reference: asft compares whole distributions, which are too large to keep; leave out precompute"
            )
        return self


class RmSpec(Spec):
    """Reward modelling: a value head learns which of two answers is better (Bradley and Terry, 1952)."""

    type: Literal["rm"] = "rm"
    margin: float = Field(default=0.0, ge=0)
    """By how much the better answer should win where the data has no column for it."""
    center: float = Field(default=0.0, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0."""
    share_prompts: bool = True
    """Compute the prompt of a pair once, where the model allows it."""


PairLossName = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "kto_pair",
    "bco_pair",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "orpo",
    "simpo",
    "cpo",
]

SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
"""Losses that know label smoothing."""
DIVERGENT = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
"""Losses that are functions of f-divergence scores."""
REFERENCE_FREE = ("orpo", "simpo", "cpo")
"""Losses that need no reference."""


class DpoSpec(Spec):
    """Preference learning from pairs of answers without a reward model."""

    type: Literal["dpo"] = "dpo"
    loss: PairLossName | dict[PairLossName, Annotated[float, Field(gt=0)]] = "sigmoid"
    """One loss, or several with their weights."""
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of pairs whose order is taken to be wrong."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood per token of the better answer, added to the loss."""
    gamma: float = Field(default=0.5, ge=0)
    """Of simpo: the target margin of the rewards."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """Weight of the log-probabilities beyond the shorter answer's length (LD-DPO)."""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """The f-divergence that the policy is held to the reference by (f-DPO)."""
    divergence_alpha: float = Field(default=0.5, ge=0, le=1)
    """Of divergence: alpha; 0 is the reverse KL, 1 the forward one. TRL's coefficient is 1 minus this."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Of discopop: its temperature."""
    bco_shift: Literal["step", "none"] = "step"
    """Of bco_pair: whether the mean reward of the step is subtracted; TRL does not."""
    reference: Reference = "start"
    """Not of orpo, simpo and cpo, which have none."""
    share_prompts: bool = True
    """Compute the prompt of a pair once, where the model allows it."""

    @property
    def losses(self) -> dict[PairLossName, float]:
        """Every loss with its weight."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @model_validator(mode="after")
    def _options_of_the_losses(self) -> DpoSpec:
        if not self.losses:
            raise ValueError("stage.loss is empty: name at least one loss")
        names = list(self.losses)
        if self.label_smoothing and not set(names) & set(SMOOTHED):
            raise ValueError(
                f"stage.label_smoothing has no meaning for {', '.join(names)}; it has one for {', '.join(SMOOTHED)}"
            )
        if "robust" in names and self.label_smoothing >= 0.5:
            raise ValueError("stage.label_smoothing should be below 0.5 for robust")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError(
                "stage.label_smoothing should be above 0 for exo_pair, whose labels are never certain (1e-3 is common)"
            )
        others = [name for name in names if name not in DIVERGENT]
        if self.divergence != "reverse_kl" and others:
            raise ValueError(f"stage.divergence: {self.divergence} has no meaning for {', '.join(others)}")
        if self.reference != "start" and set(names) <= set(REFERENCE_FREE):
            raise ValueError(f"stage.reference: {', '.join(names)} need no reference; leave it out")
        self._check_options_of_one()
        return self

    def _check_options_of_one(self) -> None:
        """Raises ValueError for an option of a loss that is not trained."""
        owners: dict[str, PairLossName] = {
            "gamma": "simpo",
            "discopop_tau": "discopop",
            "bco_shift": "bco_pair",
        }
        for option, owner in owners.items():
            if owner not in self.losses and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"stage.{option} belongs to loss: {owner}, not to {', '.join(self.losses)}")
        if self.divergence != "alpha" and self.divergence_alpha != 0.5:
            raise ValueError(f"stage.divergence_alpha belongs to divergence: alpha, not to {self.divergence}")


class KtoSpec(Spec):
    """Learning from answers that are each marked as desirable or not (Ethayarajh et al., 2024, arXiv:2402.01306)."""

    type: Literal["kto"] = "kto"
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    desirable_weight: float = Field(default=1.0, ge=0)
    undesirable_weight: float = Field(default=1.0, ge=0)
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean negative log-likelihood per token of the desirable answers, added to the loss."""
    reference: Reference = "start"

    @model_validator(mode="after")
    def _something_to_learn(self) -> KtoSpec:
        if not (self.desirable_weight or self.undesirable_weight or self.sft_weight):
            raise ValueError("desirable_weight and undesirable_weight are both 0: no row has a loss")
        return self


StageSpec = Annotated[
    PtSpec | SftSpec | RmSpec | DpoSpec | KtoSpec | PpoSpec | GrpoSpec, Field(discriminator="type")
]
