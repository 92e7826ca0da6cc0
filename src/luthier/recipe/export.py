"""The export part of a recipe: how what was trained is written as one plain model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier.recipe.base import Spec
from luthier.recipe.train import HubSpec


class ExportSpec(Spec):
    """What `luthier export` writes; training reads nothing of it."""

    output: str | None = None
    """Folder of the exported model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in the files; `auto`: that of the base's own files."""
    shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?[KMGT]i?B$")
    """Largest file of weights (`5GB`, `500MB`)."""
    device: Literal["cpu", "auto"] = "cpu"
    """Where it is merged and compared; `auto` is the GPU where there is one."""
    probes: int = Field(default=8, gt=0)
    """Conversations of the run's data on which the written model is compared with the trained one."""
    push_to_hub: HubSpec | None = None
    """Upload the written model once it has passed its verification."""
