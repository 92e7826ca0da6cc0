"""Optimizers from their part of the recipe: one table, one function for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor as TransformersAdafactor

from luthier.optim.adam_mini import AdamMini, adam_mini_blocks
from luthier.optim.apart import step_apart
from luthier.optim.apollo import Apollo
from luthier.optim.badam import BlockAdam, RatioAdam, layer_blocks, trains_in_ratio
from luthier.optim.combined import Combined
from luthier.optim.galore import GaLore
from luthier.optim.groups import cut_groups
from luthier.optim.lion import Lion
from luthier.optim.lomo import AdaLomo, Lomo
from luthier.optim.parameterwise import ExactState, Groups
from luthier.optim.roles import Place, is_target, places
from luthier.optim.schedule_free import ScheduleFreeAdamW
from luthier.recipe.schema import (
    AdafactorSpec,
    AdalomoSpec,
    AdamMiniSpec,
    AdamwSpec,
    ApolloSpec,
    BadamRatioSpec,
    BadamSpec,
    GaloreSpec,
    LionSpec,
    LomoSpec,
    LowRankSpec,
    MuonSpec,
    OptimSpec,
    ScheduleFreeSpec,
    SgdSpec,
)
from luthier.types import RecipeError


@dataclass(frozen=True, slots=True)
class Material:
    """What an optimizer is built from: groups that carry their own lr and weight_decay, and the model around them."""

    groups: Groups
    model: nn.Module

    def split(self, chosen: Callable[[Place, Tensor], bool]) -> tuple[Groups, Groups]:
        """Every group twice: with its parameters that are chosen, and with the others; empty ones are left out."""
        found = places(self.model)
        halves: tuple[Groups, Groups] = ([], [])
        for group in self.groups:
            parts: tuple[list[Tensor], list[Tensor]] = ([], [])
            for parameter in group["params"]:
                parts[not chosen(found[id(parameter)], parameter)].append(parameter)
            for half, part in zip(halves, parts, strict=True):
                if part:
                    half.append({**group, "params": part})
        return halves


class Adafactor(ExactState, TransformersAdafactor):
    """transformers' Adafactor; its float32 factors survive loading beside bfloat16 parameters."""


def _adamw(spec: AdamwSpec, given: Material) -> Optimizer:
    options: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    if spec.bits == 32 and not spec.paged:
        adamw = torch.optim.AdamW(given.groups, **options, fused=True)
        step_apart(adamw)
        return adamw
    from bitsandbytes.optim import AdamW

    if spec.bits == 32:
        return AdamW(given.groups, **options, is_paged=True)  # type: ignore[no-any-return]
    # A token that is seen rarely has moments far below its neighbours'; blocks of 8-bit numbers would lose them.
    embeddings, others = given.split(lambda place, parameter: place.role == "embedding")
    inner: list[Optimizer] = [torch.optim.AdamW(embeddings, **options, fused=True)] if embeddings else []
    if others:
        inner.append(AdamW(others, **options, optim_bits=8, is_paged=spec.paged))
    return Combined(inner, {"lr": spec.lr})


def _sgd(spec: SgdSpec, given: Material) -> Optimizer:
    return torch.optim.SGD(given.groups, lr=spec.lr, momentum=spec.momentum)


def _lion(spec: LionSpec, given: Material) -> Optimizer:
    if spec.bits == 32 and not spec.paged:
        return Lion(given.groups, {"lr": spec.lr, "betas": spec.betas})
    from bitsandbytes.optim import Lion as BitsandbytesLion

    options: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas}
    if spec.bits == 32:
        return BitsandbytesLion(given.groups, **options, is_paged=True)  # type: ignore[no-any-return]
    embeddings, others = given.split(lambda place, parameter: place.role == "embedding")
    inner: list[Optimizer] = [Lion(embeddings, options)] if embeddings else []
    if others:
        inner.append(BitsandbytesLion(others, **options, optim_bits=8, is_paged=spec.paged))
    return Combined(inner, {"lr": spec.lr})


def _adafactor(spec: AdafactorSpec, given: Material) -> Optimizer:
    return Adafactor(  # type: ignore[no-untyped-call]
        given.groups,
        lr=spec.lr,
        eps=spec.eps,
        clip_threshold=spec.clip_threshold,
        decay_rate=spec.decay_rate,
        scale_parameter=spec.scale_parameter,
        relative_step=False,  # it would pass over the recipe's learning rate and schedule
    )


def _muon(spec: MuonSpec, given: Material) -> Optimizer:
    matrices, others = given.split(lambda place, parameter: place.role == "matrix")
    inner: list[Optimizer] = []
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            ns_steps=spec.ns_steps,
            adjust_lr_fn=spec.adjust_lr,
        )
        inner.append(muon)
    if others:
        inner.append(torch.optim.AdamW(others, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True))
    return Combined(inner, {"lr": spec.lr})


def _schedule_free(spec: ScheduleFreeSpec, given: Material) -> Optimizer:
    options = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    return ScheduleFreeAdamW(given.groups, options | {"weight_lr_power": spec.weight_lr_power, "r": spec.r})


def _low_rank_groups(spec: LowRankSpec, given: Material, options: dict[str, Any]) -> Groups:
    projected, others = given.split(lambda place, parameter: is_target(place, spec.targets))
    if not projected:
        raise _nothing_projected(spec)
    return [
        *({**group, "rank": 0} for group in others),
        *({**group, "rank": spec.rank, "update_every": spec.update_every, **options} for group in projected),
    ]


def _nothing_projected(spec: LowRankSpec) -> RecipeError:
    return RecipeError(
        f"optim.targets={spec.targets}: no weight matrix of a layer that trains is in a module of such a name"
    )


def _galore(spec: GaloreSpec, given: Material) -> Optimizer:
    groups = _low_rank_groups(spec, given, {"scale": spec.scale, "side": spec.side})
    return GaLore(groups, {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}, in_backward=spec.in_backward)


def _apollo(spec: ApolloSpec, given: Material) -> Optimizer:
    names = ("scale", "side", "projection", "scale_type", "scale_front", "seed")
    groups = _low_rank_groups(spec, given, {name: getattr(spec, name) for name in names})
    return Apollo(groups, {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}, in_backward=spec.in_backward)


def _badam(spec: BadamSpec, given: Material) -> Optimizer:
    blocks, always = layer_blocks(
        given.model,
        given.groups,
        include_embedding=spec.include_embedding,
        include_head=spec.include_head,
    )
    return BlockAdam(
        given.groups,
        {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps},
        blocks,
        always,
        switch_every=spec.switch_every,
        order=spec.order,
        start=spec.start_block,
        seed=spec.seed,
    )


def _badam_ratio(spec: BadamRatioSpec, given: Material) -> Optimizer:
    included = {"include_embedding": spec.include_embedding, "include_head": spec.include_head}
    trained, frozen = given.split(lambda place, parameter: trains_in_ratio(place, **included))
    if not trained:
        raise RecipeError("optim.type=badam_ratio: only embeddings and head would train; include them")
    options = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "ratio": spec.ratio, "mask": spec.mask}
    return RatioAdam(
        trained,
        options | {"switch_every": spec.switch_every, "seed": spec.seed},
        [parameter for group in frozen for parameter in group["params"]],
    )


def _adam_mini(spec: AdamMiniSpec, given: Material) -> Optimizer:
    options = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
    return AdamMini(given.groups, options, adam_mini_blocks(given.model))


def _lomo(spec: LomoSpec, given: Material) -> Optimizer:
    return Lomo(given.groups, {"lr": spec.lr, "clip_value": spec.clip_value}, in_backward=True)


def _adalomo(spec: AdalomoSpec, given: Material) -> Optimizer:
    options = {"eps": spec.eps, "clip_threshold": spec.clip_threshold, "decay_rate": spec.decay_rate}
    return AdaLomo(given.groups, {"lr": spec.lr, **options}, in_backward=True)


OPTIMIZERS: dict[str, Callable[[Any, Material], Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
    "schedule_free": _schedule_free,
    "galore": _galore,
    "apollo": _apollo,
    "badam": _badam,
    "badam_ratio": _badam_ratio,
    "adam_mini": _adam_mini,
    "lomo": _lomo,
    "adalomo": _adalomo,
}


def build_optimizer(spec: OptimSpec, groups: Groups, model: nn.Module) -> Optimizer:
    """The optimizer over a method's parameter groups, which carry their weight decay and may carry a learning rate.

    The recipe's own groups are cut out of them. BAdam freezes what does not train yet, and what is updated in backward
    has hooks on its parameters; `release` undoes both. Raises RecipeError where groups or targets match nothing.
    """
    return OPTIMIZERS[spec.type](spec, Material(cut_groups(spec, groups, model), model))  # type: ignore[attr-defined]


def release(optimizer: Any) -> None:
    """Give the parameters back as they were before the optimizer (also one in accelerate's wrapper) was built."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if callable(undo := getattr(inner, "release", None)):
        undo()
