"""A setting is the call's, then the recipe's, then the model's, then the default: each field, at each level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.engine.precedence import DEFAULT_NEW_TOKENS, model_settings, settings_of
from luthier.recipe.generation import GenerationSpec
from luthier.types import GenerationError, GenerationSettings, ModelError

VALUES: dict[str, tuple[Any, Any, Any]] = {
    "top_p": (0.1, 0.2, 0.3),
    "top_k": (1, 2, 3),
    "min_p": (0.1, 0.2, 0.3),
    "num_beams": (2, 3, 4),
    "length_penalty": (0.5, 1.5, 2.5),
    "repetition_penalty": (1.1, 1.2, 1.3),
    "presence_penalty": (0.1, 0.2, 0.3),
    "frequency_penalty": (0.1, 0.2, 0.3),
    "max_new_tokens": (10, 20, 30),
    "temperature": (0.5, 0.6, 0.7),
    "seed": (1, 2, 3),
    "stop": (("a",), ("b",), ("c",)),
}
"""Of each field, what the call, the recipe and the model say."""


def levels(name: str, first: int, model: dict[str, Any]) -> list[dict[str, Any]]:
    """The levels from `first` on say something of the field; the ones before it nothing."""
    call, recipe = {}, {}
    if first == 0:
        call = {name: VALUES[name][0]}
    if first <= 1:
        recipe = {name: VALUES[name][1]}
    return [call, GenerationSpec(**recipe).model_dump(), model]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("name", VALUES)
def test_the_first_level_that_says_something_holds(name: str, first: int) -> None:
    model = {name: VALUES[name][2], **({"do_sample": True} if name == "temperature" else {})}
    settings = settings_of(*levels(name, first, model))
    assert getattr(settings, name) == VALUES[name][first]


def test_where_nobody_says_anything_answers_are_greedy() -> None:
    assert settings_of({}, GenerationSpec().model_dump(), {}) == GenerationSettings(
        max_new_tokens=DEFAULT_NEW_TOKENS
    )
    assert set(VALUES) | {
        "do_sample",
        "max_length",
        "skip_special_tokens",
        "rows",
        "memory_gib",
        "engine",
        "enable_thinking",
        "reasoning_effort",
    } == set(GenerationSpec.model_fields)


@pytest.mark.parametrize(
    ("call", "recipe", "model", "expected"),
    [
        ({}, {}, {"do_sample": True, "temperature": 0.6}, 0.6),
        ({}, {}, {"do_sample": True}, 1.0),
        ({}, {}, {"do_sample": False, "temperature": 0.6}, 0.0),
        ({"temperature": 0}, {"do_sample": True}, {"do_sample": True, "temperature": 0.6}, 0.0),
        ({"temperature": 0.3}, {"do_sample": False}, {}, 0.3),
        ({"do_sample": True}, {}, {"do_sample": False, "temperature": 0.6}, 0.6),
        ({"do_sample": False, "temperature": 0.9}, {}, {}, 0.0),
        ({}, {"temperature": 0.8}, {"do_sample": False}, 0.8),
        ({}, {"do_sample": False}, {"do_sample": True, "temperature": 0.6}, 0.0),
    ],
)
def test_whether_tokens_are_drawn(
    call: dict[str, Any], recipe: dict[str, Any], model: dict[str, Any], expected: float
) -> None:
    assert settings_of(call, GenerationSpec(**recipe).model_dump(), model).temperature == expected


def test_the_longest_answer_is_one_levels_word() -> None:
    assert settings_of({"max_length": 40}, {"max_new_tokens": 9}).max_length == 40
    assert settings_of({"max_new_tokens": 9}, {"max_length": 40}).max_length is None
    both = settings_of({"max_new_tokens": 9, "max_length": 40})
    assert (both.max_new_tokens, both.max_length) == (9, None)


def test_what_ends_an_answer_is_the_templates_and_the_models() -> None:
    settings = settings_of({}, {"eos_token_id": [2, 7]}, stop_ids=(5, 2))
    assert settings.stop_ids == (5, 2, 7)
    assert settings_of({}, {"eos_token_id": 3}).stop_ids == (3,)


def test_a_models_file_says_only_what_is_in_it(tmp_path: Path) -> None:
    assert model_settings(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": None}), encoding="utf-8")
    assert model_settings(tmp_path) == {"temperature": 0.6, "do_sample": False}
    assert settings_of({}, model_settings(tmp_path)).temperature == 0
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        model_settings(tmp_path)


def test_a_value_out_of_range_names_itself() -> None:
    with pytest.raises(GenerationError, match="top_p=3 should be above 0"):
        settings_of({"top_p": 3})
