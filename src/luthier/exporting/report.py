"""The content of `export_report.json`: what was exported, what was compared, what there is to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier import __version__
from luthier.exporting.answers import Distance
from luthier.exporting.verify import SLACK, Check, Expected, plain
from luthier.model.base_record import RECORD_NAME
from luthier.trained.source import Trained

REPORT_NAME = "export_report.json"


def report_of(
    trained: Trained,
    expected: Expected,
    checks: Sequence[Check],
    apart: Distance | None,
    moved: Distance | None,
    base: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON values. apart: of the written model from the trained one; moved: of that one from its base; base: what
    `require_base` said."""
    return {
        "passed": all(check.passed for check in checks),
        "luthier": __version__,
        "source": trained.label,
        "kind": expected.kind,
        "base": dict(base),
        "adapters": list(trained.adapters),
        "dtype": str(expected.dtype).removeprefix("torch."),
        "quantized_base": base["quantized"],
        "probes": {
            "origin": expected.probes.origin,
            "count": len(expected.probes.probes),
            "tokens": sum(len(ids) for ids in expected.answers.sequences),
        },
        "checks": [plain(check) for check in checks],
        "deviation": None if apart is None else plain(apart),
        "rounding": plain(expected.rounding),
        "training_moved": None if moved is None else plain(moved),
        "notes": _notes(trained, expected, moved, base),
    }


def _notes(
    trained: Trained, expected: Expected, moved: Distance | None, base: Mapping[str, Any]
) -> list[str]:
    notes = []
    if trained.adapters and base["said_by"] == RECORD_NAME:
        how = "quantized as it says" if base["quantization"] is not None else "not quantized while loading"
        notes.append(f"{RECORD_NAME} beside the adapter says what it was trained on: this base, {how}")
    elif not trained.bases and trained.adapters:
        notes.append(
            "no run says what the adapters were trained on, so the base is taken at its word: its files are not "
            "compared with any, and it is loaded "
            + ("quantized as the recipe says" if base["quantization"] is not None else "as its files are")
        )
    allowed = SLACK * expected.rounding.kl_mean
    if moved is not None and 0 < moved.kl_mean < allowed:
        notes.append(
            f"training moved the model by {moved.kl_mean:.2g} nats per token, and rounding may move it by "
            f"{allowed:.2g}: little of the training can be told in this type; export float32 to keep it"
        )
    if base["quantized"]:
        notes.append(
            "the base was quantized: the weights written are those that it stands for, and the deviation is below"
        )
        if len(trained.adapters) > 1:
            notes.append(
                "several adapters: they are compared on the plain weights that the quantized base stands for, because "
                "adding them into rounded weights would round those anew"
            )
    return notes
