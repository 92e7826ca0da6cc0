"""An optimizer's state whose numbers are in parts on several processes, in files of torch's distributed checkpoint.

Every process writes what it holds; the files together say where each part lies in its whole, so any number of processes
reads them, each tensor by itself. What is no tensor stays where it was, with names in the place of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from luthier.trainer.processes import Processes
from luthier.types import CheckpointError

FOLDER = "optimizer"
_MARK = "luthier.part"


@dataclass(slots=True)
class InParts:
    """A state of which `rest` has `{_MARK: name}` in the place of each of `tensors`."""

    rest: Any
    tensors: dict[str, Tensor]
    begun: bool = False
    """Whether this process has told the others what it knows of the folder."""

    @property
    def num_bytes(self) -> int:
        """Of the parts of all processes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def write(self, folder: Path | None, processes: Processes) -> None:
        """Write this process's parts into the folder that the first process names; where it names none, because it
        could not make one, nothing happens. All processes call this once.

        Raises CheckpointError where one of them cannot write, or writes elsewhere.
        """
        self.begun = True
        shared = processes.exchange(folder)[0]
        if shared is None:
            return
        target = shared / FOLDER
        try:
            save(dict(self.tensors), checkpoint_id=target)
        except CheckpointException as error:
            raise CheckpointError(f"the optimizer's parts could not be written: {error}") from error
        if folder is not None:
            _require_all(target)


def _require_all(folder: Path) -> None:
    """Whether the files of all processes came to this one's folder."""
    places = FileSystemReader(folder).read_metadata().storage_data or {}
    missing = sorted(
        {place.relative_path for place in places.values()} - {path.name for path in folder.iterdir()}
    )
    if missing:
        raise CheckpointError(
            f"{missing[0]} of another process is not in {folder}: parallel.state: sharded needs a folder that all "
            "machines share (train.output); give state: full without one"
        )


def in_parts(state: Any) -> InParts:
    """Take the tensors out of a state: dictionaries, lists, tuples and plain values."""
    tensors: dict[str, Tensor] = {}

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
            return {_MARK: name}
        if isinstance(value, Mapping):
            return {key: visit(f"{name}.{key}", item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(visit(f"{name}.{number}", item) for number, item in enumerate(value))
        return value

    return InParts(visit("optimizer", state), tensors)


def read_parts(folder: Path, rest: Any) -> Any:
    """`rest` of a checkpoint with all of its tensors in their places, whole; as it is where there are no parts.

    Raises CheckpointError where the parts cannot be read.
    """
    if not (folder / FOLDER).is_dir():
        return rest
    reader = FileSystemReader(folder / FOLDER)
    known = reader.read_metadata().state_dict_metadata

    def visit(value: Any) -> Any:
        if isinstance(value, Mapping):
            if _MARK in value:
                return _read(value[_MARK])
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(visit(item) for item in value)
        return value

    def _read(name: str) -> Tensor:
        about = known.get(name)
        if not isinstance(about, TensorStorageMetadata):
            raise CheckpointError(f"{folder / FOLDER} holds nothing of {name}")
        whole = {name: torch.empty(about.size, dtype=about.properties.dtype)}
        load(whole, storage_reader=reader, no_dist=True)
        return whole[name]

    return visit(rest)
