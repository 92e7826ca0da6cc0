"""Images, films and sounds in conversations."""

from __future__ import annotations

from luthier.recipe.base import Spec


class MediaSpec(Spec):
    directory: str | None = None
    """Folder of the files that rows name; `data.directory` if absent."""
