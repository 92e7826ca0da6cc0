"""What an adapter was trained on, kept beside it: an adapter that is copied away from its run says so itself.

PEFT's `adapter_config.json` names the base by the path that it had, and knows neither its hash nor its quantization.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from luthier.recipe.schema import QuantizationSpec
from luthier.types import CheckpointError

RECORD_NAME = "base.json"
RECORD_VERSION = 1

_QUANTIZATION: TypeAdapter[QuantizationSpec] = TypeAdapter(QuantizationSpec)


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """The model below an adapter: `fingerprint` of its files, how it was quantized while loading (None: it was not),
    the type of its other weights, and the folders of adapters that were merged into it before."""

    fingerprint: str | None
    quantization: QuantizationSpec | None = None
    dtype: str = "auto"
    adapters: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        quantization = self.quantization
        return {
            "version": RECORD_VERSION,
            "fingerprint": self.fingerprint,
            "quantization": None if quantization is None else quantization.model_dump(mode="json"),
            "dtype": self.dtype,
            "adapters": list(self.adapters),
        }


def remember_base(model: nn.Module, record: BaseRecord) -> None:
    """Keep the record with the model, for whoever saves an adapter on it."""
    _inner(model).luthier_base = record  # type: ignore[assignment]


def remembered_base(model: nn.Module) -> BaseRecord | None:
    """What `remember_base` kept; None where nobody did."""
    record = getattr(_inner(model), "luthier_base", None)
    assert record is None or isinstance(record, BaseRecord)
    return record


def _inner(model: nn.Module) -> nn.Module:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def write_base(folder: Path, record: BaseRecord) -> None:
    """Write `base.json` beside an adapter."""
    text = json.dumps(record.to_dict(), indent=2, ensure_ascii=False)
    (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def read_base(folder: str | Path) -> BaseRecord | None:
    """The record in an adapter's folder; None where it has none. Raises CheckpointError for one that is damaged."""
    file = Path(folder) / RECORD_NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["version"] != RECORD_VERSION:
            raise CheckpointError(
                f"{file} has version {values['version']!r}; this Luthier reads {RECORD_VERSION}"
            )
        said = values["quantization"]
        quantization = None if said is None else _QUANTIZATION.validate_python(said)
        return BaseRecord(values["fingerprint"], quantization, values["dtype"], tuple(values["adapters"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error


def differences(records: Sequence[tuple[str, QuantizationSpec | None]]) -> str | None:
    """How what several say of one base's quantization differs; None where they agree."""
    for name, spec in records[1:]:
        if not _same(spec, records[0][1]):
            return f"{records[0][0]} {_said(records[0][1])}, {name} {_said(spec)}"
    return None


def _same(one: QuantizationSpec | None, other: QuantizationSpec | None) -> bool:
    """A compute type that is left open is whatever the other one says."""
    if one is None or other is None:
        return one is other
    trees = [one.model_dump(), other.model_dump()]
    if "auto" in {tree.get("compute_dtype") for tree in trees}:
        for tree in trees:
            tree.pop("compute_dtype", None)
    return type(one) is type(other) and trees[0] == trees[1]


def _said(spec: QuantizationSpec | None) -> str:
    if spec is None:
        return "has it as it is"
    fields = {"type": spec.type, **spec.model_dump(mode="json", exclude_defaults=True)}
    return f"has it quantized ({', '.join(f'{name}: {value}' for name, value in fields.items())})"
