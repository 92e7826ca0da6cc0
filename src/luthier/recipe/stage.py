"""The stage part of a recipe: what is learnt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.recipe.base import Spec


class PtSpec(Spec):
    """Continued pre-training: every token of plain text is a target."""

    type: Literal["pt"] = "pt"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class SftSpec(Spec):
    """Supervised fine-tuning: the assistant's tokens are targets."""

    type: Literal["sft"] = "sft"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


StageSpec = Annotated[PtSpec | SftSpec, Field(discriminator="type")]
