"""Data that is read and tokenized while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from luthier.recipe.base import Spec

if TYPE_CHECKING:
    from luthier.recipe.data import DataSpec
    from luthier.recipe.train import TrainSpec


class StreamSpec(Spec):
    buffer: int = Field(default=16384, ge=1)
    """Rows among which the next one is drawn at random; 1 keeps the order of the files."""


def require_streamable(stage: Any, data: DataSpec, train: TrainSpec) -> None:
    """Raises ValueError for the first key that does not go with `data.stream`."""
    for text in (*_stages(stage), *_data(data), *_train(train)):
        raise ValueError(text)


def _stages(stage: Any) -> Iterator[str]:
    if stage.type in ("ppo", "grpo"):
        yield (
            f"data.stream does not go with stage: {stage.type}, which replaces and repeats prompts by their number and "
            "has to know them all; its rows are prompts alone, so remove data.stream"
        )
    reference = getattr(stage, "reference", None)
    if reference == "precompute" or getattr(reference, "precompute", False):
        yield (
            "stage.reference: precompute asks the reference about every sample before the first step, and a stream is "
            "not read before; leave it out, or remove data.stream"
        )


def _data(data: DataSpec) -> Iterator[str]:
    if not data.train:
        yield "data.stream is about the training data, and data.train is empty"
    for one in data.train:
        if not isinstance(one, str) and one.num_samples is not None:
            yield _drawn(one.name or one.file_name or one.hf_hub_url)
    if data.mix.temperature is not None:
        yield (
            "data.mix.temperature needs the sizes of the sets, which are not known in a stream; give data.mix.weights"
        )
    if data.dev_split and (data.dev_split < 1 or data.dev_split != int(data.dev_split)):
        yield (
            f"data.dev_split: {data.dev_split:g} is a share, and how many rows a stream has is not known; give a "
            "number of rows, which are taken from its start, or name a file in data.eval"
        )


def _drawn(name: str | None) -> str:
    return (
        f"data set {name!r}: num_samples draws among all rows, and a stream does not know them; data.max_samples takes "
        "the first ones"
    )


def _train(train: TrainSpec) -> Iterator[str]:
    if train.eval_only:
        yield "data.stream is read in training, and train.eval_only does not train; remove one of them"
    elif train.max_steps is None:
        yield (
            "data.stream needs train.max_steps: how many steps an epoch has is only known once the stream has been read"
        )
    if train.extra.get("dataloader_num_workers"):
        yield (
            "train.extra.dataloader_num_workers does not go with data.stream: rows are read and tokenized by "
            "data.workers processes; give that"
        )
