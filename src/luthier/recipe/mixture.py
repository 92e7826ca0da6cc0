"""How several data sets become one."""

from __future__ import annotations

from typing import Literal

from luthier.recipe.base import Spec


class MixSpec(Spec):
    strategy: Literal["concat", "interleave"] = "concat"
    """One set after the other, or row by row in turns."""
