"""Reads back what trackers stored, from their own files: the curves of every run that a store holds.

Curves: {run: {metric: [(step, value), ...] in the order of writing}}, metrics named as in `trainer_log.jsonl`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def tensorboard(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        "only": {
            plain(tag): [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
    }


def wandb(run: Path) -> Curves:
    from wandb.proto import wandb_internal_pb2

    curves: Curves = {}
    for file in sorted((run / "trackers/wandb").glob("offline-run-*/*.wandb")):
        rows, name = [], ""
        for content in framed_records(file):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                name = record.run.run_id
            if record.HasField("history"):
                items = record.history.item
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
                )
        add(curves.setdefault(name, {}), rows)
    return curves


def swanlab(run: Path) -> Curves:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    curves: Curves = {}
    for file in sorted((run / "trackers/swanlab").glob("run-*/*.swanlab")):
        name = ""
        for content in framed_records(file):
            record = Record.FromString(content)
            if record.HasField("start"):
                name = record.start.id
            if record.HasField("scalar"):
                scalar = record.scalar
                points = curves.setdefault(name, {}).setdefault(plain(scalar.key), [])
                points.append((scalar.step, scalar.value.number))
    return curves


def mlflow(run: Path) -> Curves:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{(run / 'trackers/mlflow.db').resolve()}")
    curves: Curves = {}
    for found in client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]):
        name = found.info.run_id
        for metric in found.data.metrics:
            history = sorted(client.get_metric_history(name, metric), key=lambda point: point.timestamp)
            curves.setdefault(name, {})[metric] = [(point.step, point.value) for point in history]
    return curves


def trackio(run: Path) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    known = json.loads((run / "trackers/run.json").read_text())["id"]
    curves: Curves = {}
    for name in SQLiteStorage.get_runs("huggingface"):
        if known in name:
            add(curves.setdefault(name, {}), SQLiteStorage.get_logs("huggingface", name))
    return curves


def add(curves: dict[str, list[tuple[int, float]]], rows: list[dict[str, Any]]) -> None:
    """Rows of metrics, each with the step beside them."""
    for row in rows:
        for key, value in row.items():
            if key.startswith(("train/", "eval/")):
                curves.setdefault(plain(key), []).append((int(row["train/global_step"]), value))


def plain(tag: str) -> str:
    """transformers writes `train/loss` and `eval/loss` where the log has `loss` and `eval_loss`."""
    return tag.removeprefix("train/").replace("eval/", "eval_")


def framed_records(file: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's framing: blocks of 32 KiB, chunks of (checksum, length, kind, bytes)."""
    content, position, record = file.read_bytes(), 7, b""  # the first seven bytes name the kind of file
    while position < len(content):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
