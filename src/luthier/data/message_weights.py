"""Loss weights that a row gives to a message and to parts of its text.

{"weight": 0.5}                    of the whole message; also `train: true/false` and `loss: true/false` (or a number)
{"spans": [[0, 12, 0], ...]}       of characters [start, stop) of its content; the rest has the message's weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from luthier.types import DataError

_SWITCHES = ("train", "loss")


def message_weight(turn: Mapping[str, Any], place: str) -> float | None:
    """The weight of a message; None where it says nothing. Raises DataError for one that is no weight."""
    said = {"weight": _weight(turn["weight"], "weight", place)} if turn.get("weight") is not None else {}
    for key in _SWITCHES:
        value = turn.get(key)
        if isinstance(value, bool):
            said[key] = float(value)
        elif value is not None and key == "loss":
            said[key] = _weight(value, key, place)
        elif value is not None:
            raise DataError(f"{place}: {key} should be true or false, not {value!r}")
    if len(set(said.values())) > 1:
        words = " and ".join(f"{key}: {turn[key]!r}" for key in said)
        raise DataError(f"{place}: {words} do not agree; keep one of them")
    return next(iter(said.values()), None)


def _weight(weight: Any, key: str, place: str) -> float:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise DataError(f"{place}: {key} should be a number of 0 or more, not {weight!r}")
    return float(weight)


def weighted_spans(turn: Mapping[str, Any], content: str, place: str) -> tuple[tuple[int, int, float], ...]:
    """`spans` in the order of their text. Raises DataError for one that is no span of the content, or that overlaps."""
    spans = turn.get("spans")
    if spans is None:
        return ()
    if isinstance(spans, str) or not isinstance(spans, Sequence):
        raise DataError(
            f"{place}: spans should be a list of [start, stop, weight], not {type(spans).__name__}"
        )
    found = sorted(_span(span, len(content), place) for span in spans)
    for (_, stop, _), (start, _, _) in pairwise(found):
        if start < stop:
            raise DataError(f"{place}: two spans share the characters from {start} to {stop}")
    return tuple(found)


def _span(span: Any, length: int, place: str) -> tuple[int, int, float]:
    if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 3:
        raise DataError(f"{place}: a span should be [start, stop, weight], not {span!r}")
    start, stop, weight = span
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in (start, stop)):
        raise DataError(f"{place}: a span begins and ends at numbers of characters, not {span!r}")
    if not 0 <= start < stop <= length:
        raise DataError(f"{place}: the span {start} to {stop} is not in a content of {length} characters")
    return start, stop, _weight(weight, "the weight of a span", place)
