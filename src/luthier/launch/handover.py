"""What a launcher and its workers tell each other, in files of a folder that only their user can read."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier.files import write_whole
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

_FILE = "handover.json"


@dataclass(frozen=True, slots=True)
class Handover:
    """What every worker of a machine reads, and the only thing: the resolved recipe. `threads` are for each of them."""

    loaded: LoadedRecipe
    quiet: bool
    threads: int

    def write(self, folder: Path) -> None:
        """Raises RecipeError for a recipe that would not be read back as it is."""
        loaded = self.loaded
        record = {
            "recipe": loaded.recipe.model_dump(mode="json"),
            "origins": dict(loaded.origins),
            "path": None if loaded.path is None else str(loaded.path),
            "notes": list(loaded.notes),
            "llamafactory": loaded.llamafactory,
            "secrets": sorted(loaded.secrets),
            "quiet": self.quiet,
            "threads": self.threads,
        }
        write_whole(folder / _FILE, json.dumps(record))
        if self.read(folder).loaded != loaded:
            raise RecipeError("this recipe cannot be handed to other processes; train it in one process")

    @classmethod
    def read(cls, folder: Path) -> Handover:
        record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        loaded = LoadedRecipe(
            Recipe.model_validate(record["recipe"]),
            record["origins"],
            None if record["path"] is None else Path(record["path"]),
            tuple(record["notes"]),
            record["llamafactory"],
            frozenset(record["secrets"]),
        )
        return cls(loaded, record["quiet"], record["threads"])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one worker ended, as it saw it itself.

    kind: the class of its error, or None. luthier: whether that is one of ours, whose text is for the user. at: seconds
    since the epoch.
    """

    rank: int
    kind: str | None = None
    text: str = ""
    luthier: bool = False
    trace: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def write(self, folder: Path) -> None:
        write_whole(folder / f"outcome-{self.rank}.json", json.dumps(asdict(self)))


def outcomes(folder: Path) -> list[Outcome]:
    """Those of the workers of this machine that have ended by themselves, the earliest first."""
    found = [Outcome(**_read(file)) for file in folder.glob("outcome-*.json")]
    return sorted(found, key=lambda outcome: outcome.at)


def _read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def stack_file(folder: Path, rank: int) -> Path:
    """Where a worker that hung writes where it was."""
    return folder / f"stack-{rank}.txt"
