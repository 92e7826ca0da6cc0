"""Supervised fine-tuning: the assistant's tokens are targets (Ouyang et al., 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from luthier.data.collate import flat_batch
from luthier.data.encode import EncodeOptions, sft_sample
from luthier.recipe.schema import SftSpec
from luthier.stages.supervised import negative_log_likelihood, supervised_weights
from luthier.types import Batch, Encoded, LossSum, Policy, Row, Sample, Template


class SupervisedFineTuning:
    """The weighted likelihood of the answers, given everything before them."""

    name = "sft"

    def __init__(self, spec: SftSpec, options: EncodeOptions) -> None:
        self.spec, self.options = spec, options

    def encode(self, row: Row, template: Template) -> Encoded:
        return sft_sample(row, template, self.options)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return flat_batch(samples)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": supervised_weights(batch).sum()}

    def loss(self, policy: Policy, batch: Batch) -> LossSum:
        return negative_log_likelihood(policy, batch, self.spec.label_smoothing)
