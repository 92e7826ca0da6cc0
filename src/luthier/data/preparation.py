"""`Preparation`: what turns the rows of data sets into samples; a value that other processes can be sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.data.template import ChatTemplate
from luthier.samples import MediaOpener
from luthier.types import Encoded, Row, RowKind

EncodeRow = Callable[[Row, ChatTemplate], Encoded]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What turns rows into samples.

    encode: a stage's `encode`. kind: what the stage learns from.
    identity: everything that decides what `encode` does (stage, its options), as JSON-like values: part of
    the cache's key. seed: of `dev_split` and `num_samples`. llamafactory: rows are grouped, and texts
    concatenated, as that tool does, for recipes translated from it.
    """

    encode: EncodeRow
    template: ChatTemplate
    kind: RowKind
    identity: Mapping[str, Any]
    seed: int
    llamafactory: bool = False
    hub_cache: str | None = None
    hub_token: str | None = None

    @property
    def opener(self) -> MediaOpener | None:
        """What opens the media of samples, where the model takes any."""
        return self.template.opener
