"""What all checks share: the user's model, template and rows, loaded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from luthier.arrange import Material, samples_of
from luthier.assemble import build_model
from luthier.data.collate import flat_batch, rows_of
from luthier.data.formats import to_row
from luthier.data.read import read_rows
from luthier.data.registry import resolve_datasets
from luthier.generation import Generation
from luthier.material import fitted, load_tokens, read_material
from luthier.model.dropout import drop_nothing
from luthier.model.load import ModelSource, locate
from luthier.model.logprobs import ModelPolicy
from luthier.model.probes import coarsest
from luthier.model.reference import Reference, StartingPoint
from luthier.model.vocabulary import VocabularyChange
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.resolve import Hardware
from luthier.recipe.schema import OnlineSpec, Recipe
from luthier.references import build_reference
from luthier.selfcheck.rollout_checks import drawn
from luthier.show import Say
from luthier.types import DataError, Method, Row, Sample, Stage

MAX_TOKENS = 1024
"""Tokens of the rows that the numeric checks run on: enough for several chunks, minutes on a laptop."""
MAX_ROWS = 24

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of one log-probability, in nats. A leak or a shifted mask moves them by whole nats."""
AWAY = 0.01
"""How far the policy is moved from a reference that is a copy of it, as a part of the spread of each weight."""
GRADIENT_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of a gradient, relative to its norm."""


@dataclass
class Bench:
    """One recipe on one machine, ready for measurements. `folder` is for files that the checks write."""

    loaded: LoadedRecipe
    hardware: Hardware
    folder: Path
    say: Say

    @property
    def settings(self) -> Recipe:
        return self.loaded.recipe

    @property
    def beside(self) -> Path | None:
        """The folder of the recipe, where files that it names may be."""
        return None if self.loaded.path is None else self.loaded.path.parent

    @property
    def _quiet(self) -> Recipe:
        """The recipe without the noise that it puts on embeddings: two forms of one computation are compared."""
        train = self.settings.train.model_copy(update={"neftune_alpha": 0.0})
        return self.settings.model_copy(update={"train": train})

    @cached_property
    def source(self) -> ModelSource:
        return locate(self.settings.model)

    @cached_property
    def tokens(self) -> tuple[PreTrainedTokenizerFast, VocabularyChange]:
        return load_tokens(self.settings, self.source, self.say)

    @cached_property
    def material(self) -> Material:
        return read_material(self.settings, self.tokens[0], self.say)

    @cached_property
    def stage(self) -> Stage:
        """The stage as this model trains it: prompts of several answers computed once where it allows that."""
        return fitted(self.settings, self.material, self.model).stage

    @property
    def scores(self) -> bool:
        """Whether the model is a reward model, which gives a row one number."""
        return self.material.stage.model == "reward"

    @cached_property
    def built(self) -> tuple[PreTrainedModel | PeftModel, Method, Reference | None]:
        """The model ready to train, and what it is compared with.

        Where an adapter starts as zero it is given weights, and where the reference is a copy of the policy the policy
        is moved away from it: so both count. Where a divergence is estimated from answers to other prompts, the policy
        is moved towards them: below 0 the estimate is cut off, and nothing could be seen of it.
        """
        # A check that needs no gradient may be the first to ask, and the self-test follows gradients.
        with torch.enable_grad():
            model, method = build_model(
                self._quiet, self.source, self.hardware, self.tokens[1], material=self.material, say=self.say
            )
        reference = None
        if self.material.stage.needs_reference:
            reference = build_reference(self.settings, self.hardware, model)
        _shake(model, AWAY if isinstance(reference, StartingPoint) else 0.0)
        drop_nothing(model)
        model.eval()
        if self.material.stage.needs_mismatched:
            _favour(model, [rows_of(sample)[1] for sample in self.samples])
        return model, method, reference

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        return self.built[0]

    @property
    def method(self) -> Method:
        return self.built[1]

    @property
    def reference(self) -> Reference | None:
        return self.built[2]

    @property
    def device(self) -> torch.device:
        return torch.device(self.hardware.device)

    @cached_property
    def arithmetic(self) -> torch.dtype:
        """The least exact type that takes part."""
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.train.precision)
        return coarsest(self.model, autocast or next(self.model.parameters()).dtype)

    def autocast(self) -> torch.autocast:
        """The arithmetic that training uses."""
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.train.precision)
        return torch.autocast(self.hardware.device, dtype=wanted, enabled=wanted is not None)

    @property
    def bound(self) -> float:
        return BOUNDS[self.arithmetic]

    @property
    def gradient_bound(self) -> float:
        return GRADIENT_BOUNDS[self.arithmetic]

    @cached_property
    def _drawn(self) -> tuple[list[Sample], list[Generation]]:
        return drawn(self, self.material.data.train)

    @property
    def answers(self) -> list[Generation]:
        """Of a stage that learns from answers of its own: those of `samples`, in their order."""
        return self._drawn[1]

    @cached_property
    def samples(self) -> list[Sample]:
        """Supervised samples from all over the training data, `MAX_TOKENS` in all, two at least; of a stage that learns
        from answers of its own, a few prompts with such answers."""
        if isinstance(self.settings.stage, OnlineSpec):
            return self._drawn[0]
        spec = self.settings.data
        table = samples_of(self.material.stage, self.material.data.train, spec.max_length)
        chosen: list[Sample] = []
        step = max(1, len(table) // MAX_ROWS)
        for index in range(0, len(table), step):
            sample = table[index]
            room = MAX_TOKENS - sum(len(one) for one in chosen)
            if (sample.weights[1:] > 0).any() and (len(sample) <= room or len(chosen) < 2):
                chosen.append(sample)
        if len(chosen) < 2:
            raise DataError("selfcheck needs at least two training rows with something to learn")
        return chosen

    @cached_property
    def sequences(self) -> list[Sample]:
        """The samples as plain rows: of answers that continue a prompt, each with a copy of it."""
        return [row for sample in self.samples for row in rows_of(sample)]

    @cached_property
    def rows(self) -> list[Row]:
        """The first training rows as they are before tokens; rows that cannot be used are left out."""
        spec = self.settings.data
        found: list[Row] = []
        for attr in resolve_datasets(spec.train, spec):
            first = replace(attr, num_samples=None)
            for raw in read_rows(first, max_samples=MAX_ROWS):
                try:
                    found.append(to_row(raw, attr, self.material.stage.kind))
                except DataError:
                    continue
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients of all that trains; clears them."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.detach().double().cpu()
                parameter.grad = None
        return found


def _shake(model: nn.Module, away: float) -> None:
    """Weights for matrices that train and are all zero; `away` times their spread of noise for all that train."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            zero = parameter.ndim > 1 and not parameter.any()
            size = 0.02 if zero else away * float(parameter.float().std(correction=0))
            if size:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter))


def _favour(model: nn.Module, rows: Sequence[Sample]) -> None:
    """One step up the gradient of these rows' log-probability, as long as to gain about a nat for each."""
    device = next(model.parameters()).device
    with torch.enable_grad():
        gained = ModelPolicy(model).logprobs(flat_batch(rows).to(device)).logprobs.sum()
        torch.autograd.backward(gained)
    moved = [(one, one.grad) for one in model.parameters() if one.grad is not None]
    size = sum(float(gradient.double().square().sum()) for _, gradient in moved)
    with torch.no_grad():
        for parameter, gradient in moved:
            parameter.add_(gradient, alpha=len(rows) / size if size else 0.0)
            parameter.grad = None


def relative_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """|found - expected| / |expected| over all tensors together; infinite where names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    size = sum(float(tensor.square().sum()) for tensor in expected.values())
    return float((apart / size) ** 0.5) if size else float("inf") if apart else 0.0


def largest(values: Sequence[float]) -> float:
    return max(values, default=0.0)
