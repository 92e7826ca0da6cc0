"""What the processes of a run agree on before it begins: that they are one run, and whether it was begun before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.files import write_whole
from luthier.recipe.load import LoadedRecipe
from luthier.recipe.schema import Recipe
from luthier.trainer.processes import Processes
from luthier.types import RecipeError

LAUNCH_NAME = "launch.json"
"""Which launch a run directory is of, so that processes that are started again know it."""

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
"""What a number of a run may depend on."""

OWN = {"model": {"path", "cache_dir", "token"}, "data": {"directory", "cache", "workers"}}
"""What may differ from machine to machine: where things are. What is there is compared by its content."""

_UNNAMED = ("", "none")
"""What torchrun calls a run that nobody named."""


def require_alike(processes: Processes, own: Mapping[str, Any]) -> None:
    """Make sure that all processes hold the same values under the same names. All call it.

    own: JSON values. Raises RecipeError on every process, naming the first one that differs from process 0, and what.
    """
    text = json.dumps(own, sort_keys=True, default=str)
    digests = processes.exchange(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    found = processes.exchange(json.loads(text))
    first, second = found[0], found[other]
    different = [
        f"{name} is {_short(second.get(name))} there and {_short(first.get(name))} here"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]
    raise RecipeError(
        f"process {other} is not part of the run that process 0 is in: {'; '.join(different)}. All machines need the "
        "same recipe, data, model and versions"
    )


def _short(value: Any, most: int = 80) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"


def run_values(recipe: Recipe) -> dict[str, Any]:
    """All settings by their dotted keys, without those that may differ from machine to machine, and versions."""
    values = {
        f"{section}.{name}": value
        for section, part in recipe.model_dump(mode="json").items()
        for name, value in part.items()
        if name not in OWN.get(section, ())
    }
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return values | {"luthier": __version__} | versions


def agree_to_start(loaded: LoadedRecipe, processes: Processes) -> LoadedRecipe:
    """Compare the recipe and the versions of all processes; the recipe of this attempt. All call it.

    Where the run directory is of the same launch already, its processes were started again: they go on from its newest
    checkpoint, whatever the recipe says of a run that is there. Raises RecipeError as `require_alike`.
    """
    require_alike(processes, run_values(loaded.recipe))
    train = loaded.recipe.train
    again = processes.exchange(_begun(Path(train.output)) if processes.is_first else False)[0]
    if not again:
        return loaded
    note = "this launch was begun before; going on from its newest checkpoint"
    going_on = train.model_copy(update={"resume": "auto", "overwrite": False})
    recipe = loaded.recipe.model_copy(update={"train": going_on})
    return replace(loaded, recipe=recipe, notes=(*loaded.notes, note))


def run_id() -> str | None:
    """The name of the launch that this process is part of, as torchrun told it; None for one without."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return None if name in _UNNAMED else name


def is_of_launch(output: Path, name: str | None) -> bool:
    """Whether the run in `output` was begun by the launch of this name."""
    try:
        written = json.loads((output / LAUNCH_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return name is not None and written == {"run_id": name}


def _begun(output: Path) -> bool:
    return is_of_launch(output, run_id())


def remember_launch(output: Path) -> None:
    """Write down which launch the run in `output` is of; a process that is alone is of none."""
    if (name := run_id()) is not None:
        write_whole(output / LAUNCH_NAME, json.dumps({"run_id": name}) + "\n")
    else:
        (output / LAUNCH_NAME).unlink(missing_ok=True)
