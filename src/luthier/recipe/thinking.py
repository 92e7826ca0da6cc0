"""What becomes of the reasoning in answers."""

from __future__ import annotations

from typing import Literal

from luthier.recipe.base import Spec


class ThinkingSpec(Spec):
    history: Literal["template"] = "template"
    """Reasoning of earlier turns: as the template shows it."""
