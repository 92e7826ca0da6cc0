"""Reward modelling: which of two answers is better (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from luthier.data.encode import EncodeOptions
from luthier.data.pairs import pair_sample
from luthier.recipe.schema import RmSpec
from luthier.stages.answers import answers_batch
from luthier.stages.supervised import Separable
from luthier.types import (
    Batch,
    LossSum,
    ModelKind,
    Observed,
    Policy,
    RowKind,
    Sample,
    Term,
)


class RewardModelling(Separable):
    """The better answer's score should be the higher one, by the margin of the row, where it has one.

    Scores are read at the last token of a row, as the chat template writes it: what it puts after the stop token
    belongs to the row, so that a reward model in use, which is given whole texts, is asked what it learnt.
    """

    name = "rm"
    kind: RowKind = "pair"
    model: ModelKind = "reward"
    needs_reference = False
    terms: tuple[str, ...] = ("loss",)
    is_likelihood = False

    def __init__(self, spec: RmSpec, options: EncodeOptions, *, share_prompts: bool = False) -> None:
        self.spec, self.share_prompts = spec, share_prompts
        self.options = replace(options, train_after_stop=True)
        self.encode = partial(pair_sample, options=self.options)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return answers_batch(samples, share_prompts=self.share_prompts)

    def weight(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.labels is not None
        return {"loss": torch.ones_like(batch.labels).sum()}

    def loss(self, policy: Policy, batch: Batch, observed: Observed) -> LossSum:
        """sum over pairs of -log sigmoid(r_c - r_r - m) + center (r_c + r_r)^2, its weight the number of pairs.

        m is the row's margin, else the recipe's (Touvron et al., 2023, arXiv:2307.09288, section 3.2.2); the second
        part keeps rewards around 0 (Eisenstein et al., 2023, arXiv:2312.09244, section 2). A tie counts as half right.
        """
        assert batch.labels is not None
        chosen, rejected = policy.scores(batch).chunk(2)
        margin = torch.where(batch.labels.isnan(), self.spec.margin, batch.labels)
        losses = -functional.logsigmoid(chosen - rejected - margin)
        if self.spec.center:
            losses = losses + self.spec.center * (chosen + rejected).square()
        weight, apart = self.weight(batch)["loss"], (chosen - rejected).detach()
        numbers = {
            "accuracy": (apart.sign() + 1) / 2,
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": apart,
        }
        return LossSum(
            {"loss": Term(losses.sum(), weight)},
            {name: Term(values.sum(), weight) for name, values in numbers.items()},
            by_sample=Term(losses.detach(), torch.ones_like(batch.labels)),
        )
