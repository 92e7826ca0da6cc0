"""Which setting holds: the call's, then the recipe's, then the model's generation_config.json, then the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier.generation import GenerationSettings
from luthier.model.faults import read_json

DEFAULT_NEW_TOKENS = 512
"""The longest answer where nobody says anything."""

_FIELDS = (
    "top_p",
    "top_k",
    "min_p",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logprobs",
)
_SUPPRESSED: tuple[Any, ...] = (None, (), [])
"""What a level that says nothing has: an empty list of stop strings says nothing too."""


def model_settings(folder: str | Path) -> dict[str, Any]:
    """What a model's generation_config.json says, and nothing that it does not say.

    Raises ModelError where the file is damaged.
    """
    file = Path(folder) / "generation_config.json"
    if not file.is_file():
        return {}
    said = {name: value for name, value in read_json(file, str(folder)).items() if value is not None}
    # There alone a temperature without do_sample is a default that is not used.
    said.setdefault("do_sample", False)
    return said


def settings_of(*levels: Mapping[str, Any], stop_ids: Sequence[int] = ()) -> GenerationSettings:
    """The settings that hold, from the first level that says something of each; `stop_ids` are the template's.

    Whether tokens are drawn is said by the first level that has `do_sample` or `temperature`, and the longest answer
    by the first that has `max_new_tokens` or `max_length`. Raises GenerationError for a value out of range.
    """
    chosen: dict[str, Any] = {}
    for name in _FIELDS:
        value = _first(levels, name)
        if value is not None:
            chosen[name] = tuple(value) if name == "stop" else value
    stops = [*stop_ids, *_listed(_first(levels, "eos_token_id"))]
    return GenerationSettings(
        temperature=_temperature(levels),
        stop_ids=tuple(dict.fromkeys(stops)),
        **_lengths(levels),
        **chosen,
    )


def rollout_settings(
    said: Mapping[str, Any], *, stop_ids: Sequence[int] = (), ends: Any = None
) -> GenerationSettings:
    """How answers are drawn that a policy learns from: as the recipe's `generation` has `said`, else temperature 1 and
    nothing cut, whatever the model's own generation_config.json says but for its `ends`.

    Log-probabilities are at the sampling temperature. No seed: each answer has its own.
    """
    neutral = {"do_sample": True, "temperature": 1.0, "eos_token_id": ends}
    settings = settings_of(said, neutral, stop_ids=stop_ids)
    return replace(settings, seed=None, logprobs=0, logprobs_of="sampling")


def _first(levels: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((level[name] for level in levels if level.get(name) not in _SUPPRESSED), None)


def _temperature(levels: Sequence[Mapping[str, Any]]) -> float:
    for level in levels:
        sampled, temperature = level.get("do_sample"), level.get("temperature")
        if sampled is None and temperature is None:
            continue
        if sampled is False or temperature == 0:
            return 0.0
        drawn = _first(levels, "temperature")
        return float(drawn) if drawn else 1.0
    return 0.0


def _lengths(levels: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for level in levels:
        if level.get("max_new_tokens") is not None:
            return {"max_new_tokens": int(level["max_new_tokens"])}
        if level.get("max_length") is not None:
            # The prompt takes its part of it, so no answer is longer.
            return {"max_new_tokens": int(level["max_length"]), "max_length": int(level["max_length"])}
    return {"max_new_tokens": DEFAULT_NEW_TOKENS}


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, list | tuple) else [int(value)]
