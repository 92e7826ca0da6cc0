"""Parameters by kind add up to the model, and each lands where a person would look for it."""

from __future__ import annotations

import pytest

from luthier.check.parameters import KINDS, count_by_kind
from luthier.methods import build_method
from luthier.methods.groups import ParameterCount, count_parameters
from luthier.recipe.schema import FreezeSpec, FullSpec, LoraSpec
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_add_up_and_nothing_is_left_over(family: str) -> None:
    model = build_method(FullSpec()).apply(tiny_model(family))
    counts = count_by_kind(model)
    assert sum(count.total for count in counts.values()) == count_parameters(model).total
    assert "other" not in counts
    assert {"embeddings", "attention", "mlp", "norm"} <= counts.keys()
    assert list(counts) == [kind for kind in KINDS if kind in counts]
    assert all(count.trainable == count.total for count in counts.values())


def test_a_llama_by_hand() -> None:
    counts = count_by_kind(build_method(FreezeSpec(layers=1)).apply(tiny_model("llama")))
    attention, mlp = 2 * 32 * 32 + 2 * 16 * 32, 3 * 48 * 32
    assert counts == {
        "embeddings": ParameterCount(0, 97 * 32),
        "attention": ParameterCount(attention, 2 * attention),
        "mlp": ParameterCount(mlp, 2 * mlp),
        "norm": ParameterCount(2 * 32, 5 * 32),
        "head": ParameterCount(0, 97 * 32),
    }


def test_a_tied_head_is_the_embeddings() -> None:
    counts = count_by_kind(tiny_model("llama-tied"))
    assert "head" not in counts
    assert counts["embeddings"].total == 97 * 32


def test_adapters_are_a_kind_of_their_own() -> None:
    model = build_method(LoraSpec(rank=4, alpha=8, targets=("q_proj",), modules_to_save=("lm_head",))).apply(
        tiny_model("llama")
    )
    counts = count_by_kind(model)
    assert counts["adapter"] == ParameterCount(*[2 * (4 * 32 + 32 * 4) + 97 * 32] * 2)
    assert counts["attention"].trainable == 0
    assert sum(count.total for count in counts.values()) == count_parameters(model).total
