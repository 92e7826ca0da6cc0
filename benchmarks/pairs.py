"""What every contender of a preference benchmark trains on: token ids of pairs, by Luthier's own preparation."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from luthier.run import prepare
from luthier.types import Sample

Pair = dict[str, list[int]]
"""`prompt_ids`, `chosen_ids`, `rejected_ids`; every token of the answers is a target."""


def load(model: Path, data: Path, dataset: str, count: int, max_length: int) -> tuple[list[Pair], int]:
    """The first `count` pairs of which no answer with its prompt is longer than `max_length`, and how many rows of
    the data set they are taken from.

    Raises SystemExit where there are not as many.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": {"path": str(model)},
            "data": {
                "train": [dataset],
                "directory": str(data),
                "max_length": max_length,
                "overflow": "drop",
                "max_lost": None,
                "shuffle": False,
                "cache": folder,
            },
            "stage": {"type": "dpo"},
            "train": {"output": str(Path(folder) / "output")},
        }
        table = prepare(recipe, quiet=True).train
        if len(table) < count:
            raise SystemExit(
                f"{dataset} has {len(table)} pairs of at most {max_length} tokens, {count} are needed"
            )
        samples = [table[i] for i in range(count)]
        return [_pair(sample) for sample in samples], samples[-1].index + 1


def questions(data: Path, dataset: str, count: int, most_words: int) -> list[str]:
    """The first `count` instructions, with their inputs, of at most so many words of a data set in alpaca's format.

    Raises SystemExit where there are not as many.
    """
    described = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))[dataset]
    rows = json.loads((data / described["file_name"]).read_text(encoding="utf-8"))
    texts = ["\n".join(text for text in (row["instruction"], row.get("input")) if text) for row in rows]
    short = [text for text in texts if len(text.split()) <= most_words]
    if len(short) < count:
        raise SystemExit(
            f"{dataset} has {len(short)} questions of at most {most_words} words, {count} are needed"
        )
    return short[:count]


def _pair(sample: Sample) -> Pair:
    """The prompt and the answers up to their last target; what the template writes after it is nobody's target.

    Raises ValueError for targets that are not the whole of an answer.
    """
    answers = []
    for start, stop in pairwise((*sample.branches, len(sample))):
        targets = np.flatnonzero(sample.weights[start:stop])
        if targets.tolist() != list(range(len(targets))):
            raise ValueError(f"row {sample.index}: the targets are not one answer")
        answers.append(sample.input_ids[start : start + len(targets)].tolist())
    chosen, rejected = answers
    return {
        "prompt_ids": sample.input_ids[: sample.branches[0]].tolist(),
        "chosen_ids": chosen,
        "rejected_ids": rejected,
    }
