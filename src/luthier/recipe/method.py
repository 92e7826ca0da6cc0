"""The method part of a recipe: what may change."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from luthier.recipe.base import Spec


class FullSpec(Spec):
    """Every parameter trains."""

    type: Literal["full"] = "full"


class FreezeSpec(Spec):
    """Some layers train, everything else is frozen."""

    type: Literal["freeze"] = "freeze"
    layers: int = 2
    """n > 0: the last n decoder layers train; n < 0: the first |n|; 0: none (use `extra_modules`)."""
    modules: tuple[str, ...] = ("all",)
    """Names of modules inside those layers (`self_attn`, `mlp`, ...), or `all`."""
    extra_modules: tuple[str, ...] = ()
    """Modules outside the layers that train too (`embed_tokens`, `lm_head`, `norm`)."""


class LoraSpec(Spec):
    """Low-rank adapters through PEFT (Hu et al., 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=8, gt=0)
    alpha: float | None = Field(default=None, gt=0)
    """Scale is alpha / rank; absent: 2 x rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module names, or one regular expression over full module names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""
    adapters: tuple[str, ...] = ()
    """Adapter folders to start from: all but the last are merged into the base, the last one is continued."""
    create_new_adapter: bool = False
    """Merge all of `adapters` into the base and train a fresh one on top."""


MethodSpec = Annotated[FullSpec | FreezeSpec | LoraSpec, Field(discriminator="type")]
