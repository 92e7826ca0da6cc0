"""What a reference model said of samples, kept on disk: each sample is computed once for each reference.

An entry belongs to the sample's content (its tokens, which of them are targets, its branches), so the order of the
data, its splits and new rows change nothing that is there already. A folder holds one reference's entries in parts; a
part is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from luthier.data.cache import content_key, default_folder
from luthier.types import DataError, Sample

CODE_VERSION = 1
"""Raise when the same reference and sample would give other numbers."""

Logprobs = np.ndarray[Any, np.dtype[np.float32]]

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logprobs", pa.list_(pa.float32()))])


def sample_key(sample: Sample) -> bytes:
    """16 bytes that stand for a sample's tokens, targets and branches."""
    digest = hashlib.sha256(np.asarray(sample.input_ids, np.int32).tobytes())
    digest.update(np.packbits(np.asarray(sample.weights) > 0).tobytes())
    digest.update(repr((len(sample), *sample.branches)).encode())
    return digest.digest()[:16]


class ReferenceCache:
    """The log-probabilities of one reference, described by JSON-like values; (N,) float32 for a sample's N targets."""

    def __init__(self, folder: str | None, reference: Mapping[str, Any]) -> None:
        """`folder` as in `data.cache`; None is the user's cache folder."""
        root = Path(folder).expanduser() if folder else default_folder().parent
        self.folder = root / "reference" / content_key({"code": CODE_VERSION, "reference": reference})[:32]

    def load(self) -> dict[bytes, Logprobs]:
        """All entries, mapped from the files. A damaged part is left out, and its samples are computed again."""
        found: dict[bytes, Logprobs] = {}
        for part in sorted(self.folder.glob("*.arrow")):
            try:
                table = pa.ipc.open_file(pa.memory_map(str(part))).read_all()
            except (OSError, pa.ArrowInvalid):
                continue
            if table.schema != _SCHEMA:
                continue
            for batch in table.to_batches():
                column = batch.column("logprobs")
                values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
                for number, key in enumerate(batch.column("key").to_pylist()):
                    found[key] = values[offsets[number] : offsets[number + 1]]
        return found

    def add(self, entries: Iterable[tuple[bytes, Logprobs]]) -> None:
        """Keep more entries. Raises DataError where they cannot be written."""
        keys, arrays = zip(*entries, strict=True)
        offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
        values = np.concatenate(arrays).astype(np.float32)
        columns = [pa.array(keys, pa.binary(16)), pa.ListArray.from_arrays(offsets, values)]
        name = f"{os.getpid()}-{secrets.token_hex(6)}"
        unfinished = self.folder / f".{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            unfinished.rename(self.folder / f"{name}.arrow")
        except OSError as error:
            raise DataError(
                f"cannot write the reference's log-probabilities in {self.folder}: {error.strerror or error}; make "
                "room, choose another folder with data.cache, or compute them as you train (stage.reference: start)"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # gone, or never begun
                unfinished.unlink()


class Referenced(Sequence[Sample]):
    """Samples, each with what the reference said of its targets."""

    def __init__(self, samples: Sequence[Sample], logprobs: Sequence[Logprobs]) -> None:
        self._samples, self._logprobs = samples, logprobs

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> list[Sample]: ...
    def __getitem__(self, i: int | slice) -> Sample | list[Sample]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return replace(self._samples[i], reference=self._logprobs[i])
