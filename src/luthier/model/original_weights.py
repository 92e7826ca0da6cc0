"""Weights as the files of a model hold them, one at a time: what a quantized base was before it was rounded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from luthier.model.load import ModelSource
from luthier.recipe.schema import ModelSpec
from luthier.types import ModelError

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OriginalWeights:
    """The safetensors files of a model; `prefix` is the name of its backbone, which some files leave out."""

    spec: ModelSpec
    source: ModelSource
    prefix: str

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name in the files, on the CPU.

        Raises ModelError where the files are no safetensors, or name it otherwise than the model does.
        """
        files = self._files()
        short = name.removeprefix(f"{self.prefix}.")
        for known in (name, short):
            if known in files:
                with safe_open(files[known], framework="pt") as tensors:
                    found: Tensor = tensors.get_tensor(known)
                return found
        raise ModelError(
            f"method.init=loftq reads the weights before they were rounded, and the files of "
            f"model.path={self.spec.path} hold none with the name {name}; choose init: default"
        )

    def _files(self) -> dict[str, str]:
        """The file of each tensor."""
        index = self._path(_INDEX)
        if index is not None:
            places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            paths = {file: self._path(file) for file in set(places.values())}
            return {name: path for name, file in places.items() if (path := paths[file]) is not None}
        one = self._path(_ONE)
        if one is None:
            raise ModelError(
                f"method.init=loftq reads single weights out of the base's files, and model.path={self.spec.path} has "
                "no safetensors; save it as such (model.save_pretrained), or choose init: default"
            )
        with safe_open(one, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), one)

    def _path(self, file: str) -> str | None:
        if self.source.local:
            path = Path(self.source.path) / file
            return str(path) if path.is_file() else None
        found: str | None = cached_file(  # already there: the model was loaded from it
            self.source.path,
            file,
            revision=self.spec.revision,
            cache_dir=self.spec.cache_dir,
            token=self.spec.token,
            _raise_exceptions_for_missing_entries=False,
        )
        return found
