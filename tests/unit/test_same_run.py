"""What changed between a checkpoint's run and this one is named, and nothing else is."""

from __future__ import annotations

import pytest

from luthier.recipe.load import load_recipe
from luthier.recipe.schema import Recipe
from luthier.trainer.same_run import FREE, ROWS, changes, identity

BASE = {"model": {"path": "m"}, "data": {"train": ["a"]}}


def of(*overrides: str) -> Recipe:
    return load_recipe(BASE, list(overrides)).recipe


GRPO = ("stage.type=grpo", "stage.rewards=[{type: length, most: 5}]")


def test_every_free_key_exists() -> None:
    strategies = [of(f"parallel.type={name}") for name in ("fsdp2", "deepspeed")]
    forms = [of(), of("stage.type=dpo"), of(*GRPO), *strategies]
    for section, names in FREE.items():
        assert names <= {name for form in forms for name in type(getattr(form, section)).model_fields}, (
            section
        )


@pytest.mark.parametrize(
    "override",
    [
        "train.output=elsewhere",
        "train.save_every=3",
        "data.workers=2",
        "train.log_every=1",
        "model.path=moved",
    ],
)
def test_what_changes_no_step_may_change(override: str) -> None:
    assert changes(identity(of(), "b", ["d"]), identity(of(override), "b", ["d"])) == []


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.lr=0.5", "optim.lr was 0.0001 and is 0.5"),
        ("train.epochs=5", "train.epochs was 3.0 and is 5.0"),
        ("train.seed=1", "train.seed was 42 and is 1"),
        ("method.rank=4", "method.rank was 8 and is 4"),
        ("data.max_length=64", "data.max_length was 2048 and is 64"),
    ],
)
def test_what_changes_a_step_is_named(override: str, text: str) -> None:
    assert changes(identity(of(), "b", ["d"]), identity(of(override), "b", ["d"])) == [text]


@pytest.mark.parametrize(
    ("rows", "accumulation", "processes", "same"),
    [(4, 2, 1, True), (2, 4, 1, True), (2, 2, 2, True), (1, 8, 1, True), (2, 4, 2, False), (2, 3, 1, False)],
)
def test_rows_of_a_step_count_and_not_who_takes_them(
    rows: int, accumulation: int, processes: int, same: bool
) -> None:
    before = identity(of("train.rows_per_device=4", "train.accumulation=2"), "b", ["d"])
    recipe = of(f"train.rows_per_device={rows}", f"train.accumulation={accumulation}")
    found = changes(before, identity(recipe, "b", ["d"], processes))
    step = rows * accumulation * processes
    assert found == ([] if same else [f"{ROWS} was 8 and is {step}"])


def test_tokens_of_a_step_are_those_of_all_processes() -> None:
    recipe = of("train.tokens_per_batch=500")
    assert changes(identity(recipe, "b", ["d"]), identity(recipe, "b", ["d"], 4)) == []


def test_base_and_data_are_compared_by_content() -> None:
    found = changes(identity(of(), "b", ["d", "e"]), identity(of(), "c", ["e", "d"]))
    assert found == [
        "the base model's weights or config are others",
        "the training data, or how it becomes tokens, is another",
    ]


def test_a_setting_that_an_older_version_lacked_is_no_change() -> None:
    before = identity(of(), "b", ["d"])
    del before["settings"]["train.neftune_alpha"]
    assert changes(before, identity(of(), "b", ["d"])) == []


def test_what_is_drawn_decides_what_grpo_learns() -> None:
    """Elsewhere the recipe's generation is that of evaluations alone."""
    for given, differs in (("temperature=0.7", True), ("max_new_tokens=9", True), ("rows=3", False)):
        assert not changes(identity(of(), "b", []), identity(of(f"generation.{given}"), "b", []))
        found = changes(identity(of(*GRPO), "b", []), identity(of(*GRPO, f"generation.{given}"), "b", []))
        assert bool(found) == differs, given
    samples = identity(of(*GRPO, "stage.samples_every=3"), "b", [])
    assert not changes(identity(of(*GRPO), "b", []), samples)
    assert changes(identity(of(*GRPO), "b", []), identity(of(*GRPO, "stage.epochs=2"), "b", []))
