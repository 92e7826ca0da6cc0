"""Data that is read and tokenized while a model is trained."""

from __future__ import annotations

from pydantic import Field

from luthier.recipe.base import Spec


class StreamSpec(Spec):
    buffer: int = Field(default=16384, ge=1)
    """Rows among which the next one is drawn at random; 1 keeps the order of the files."""
