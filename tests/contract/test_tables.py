"""The tables of kinds equal the unions of the schema: nothing accepted is missing, nothing built is unreachable."""

from __future__ import annotations

import typing

import pytest

from luthier.methods import METHODS
from luthier.optim.build import OPTIMIZERS
from luthier.recipe import schema
from luthier.stages import STAGES


def kinds(union: object) -> set[str]:
    """The `type` values of a tagged union of the schema."""
    members = typing.get_args(typing.get_args(union)[0])
    return {member.model_fields["type"].default for member in members}


@pytest.mark.parametrize(
    ("union", "table"),
    [(schema.StageSpec, STAGES), (schema.MethodSpec, METHODS), (schema.AnyOptimSpec, OPTIMIZERS)],
    ids=["stages", "methods", "optimizers"],
)
def test_table_equals_union(union: object, table: dict[str, object]) -> None:
    assert set(table) == kinds(union)
