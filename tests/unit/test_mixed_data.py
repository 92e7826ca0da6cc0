"""Mixtures through the whole data path: files, rows that give several samples, held-out rows, packing."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from luthier.arrange import Material, mixture, training_steps
from luthier.check.findings import Findings
from luthier.check.mixture import shares_of
from luthier.check.page import page
from luthier.check.text import report
from luthier.data.encode import EncodeOptions, pt_samples, sft_sample
from luthier.data.prepare import Preparation, PreparedData, prepare
from luthier.data.template import load_template
from luthier.recipe.load import load_recipe
from luthier.recipe.mixture import MixSpec
from luthier.recipe.schema import DatasetSpec, DataSpec, Recipe
from luthier.stages import build_stage
from luthier.types import DataError, RecipeError
from tests.tiny import chat_tokenizer
from tests.training import recipe_of

SIZES = {"a": 7, "b": 3, "c": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        rows = [{"instruction": f"{name} {i}", "output": "1 2 3" * (1 + i % 3)} for i in range(size)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def prepared(spec: DataSpec, kind: Any = "conversation", seed: int = 42) -> PreparedData:
    stage = "pt" if kind == "text" else "sft"
    options = EncodeOptions.of(spec, stage, llamafactory=spec.rules == "llamafactory")
    encode = partial(pt_samples if kind == "text" else sft_sample, options=options)
    template = load_template(chat_tokenizer(), spec)
    identity = {"stage": stage, **asdict(options)}
    return prepare(spec, Preparation(encode, template, kind, identity, seed, options.llamafactory))


def spec_of(folder: Path, **fields: Any) -> DataSpec:
    tree: dict[str, Any] = {
        "train": [f"{name}.json" for name in SIZES],
        "directory": str(folder),
        "cache": str(folder / "cache"),
        "max_length": 64,
    }
    return DataSpec(**(tree | fields))


def origins(samples: Any) -> list[tuple[str, int]]:
    return [(sample.source, sample.index) for sample in samples]


def material(folder: Path, **data: Any) -> tuple[Recipe, Material]:
    recipe = recipe_of(
        folder / "run", data=spec_of(folder, **data).model_dump(exclude_unset=True), train=TRAIN
    )
    options = EncodeOptions.of(recipe.data, "sft")
    template = load_template(chat_tokenizer(), recipe.data)
    return recipe, Material(template, build_stage(recipe.stage, options), prepared(recipe.data))


TRAIN = {"rows_per_device": 1, "accumulation": 4}


@pytest.mark.parametrize("until", ["first", "all", "once"])
@pytest.mark.parametrize("probabilities", [None, (0.5, 0.2, 0.3)])
@pytest.mark.parametrize("held_out", [0, 0.3])
def test_a_translated_file_has_the_rows_of_that_tool(
    until: Any, probabilities: Any, held_out: float, folder: Path
) -> None:
    """It merges the sets by `datasets.interleave_datasets` with its seed, then splits by `train_test_split`."""
    sets = [
        datasets.Dataset.from_dict({"set": [name] * size, "row": list(range(size))})
        for name, size in SIZES.items()
    ]
    name = {"first": "first_exhausted", "all": "all_exhausted", "once": "all_exhausted_without_replacement"}
    merged = datasets.interleave_datasets(
        sets, probabilities=probabilities and list(probabilities), seed=42, stopping_strategy=name[until]
    )
    strategy = {"first": "under", "all": "over", "once": "once"}[until]
    file: dict[str, Any] = {
        "model_name_or_path": "m",
        "do_train": True,
        "stage": "sft",
        "template": "default",
        "dataset": "a.json,b.json,c.json",
        "dataset_dir": str(folder),
        "mix_strategy": f"interleave_{strategy}",
        "val_size": held_out,
    }
    if probabilities is not None:
        file["interleave_probs"] = ",".join(map(str, probabilities))
    spec = load_recipe(file).recipe.data.model_copy(update={"cache": str(folder / "cache"), "template": None})
    data = prepared(spec)
    if held_out:
        parts = merged.train_test_split(test_size=held_out, seed=42)
        held = list(zip(parts["test"]["set"], parts["test"]["row"], strict=True))
        assert origins(data.eval["dev"]) == held
        merged = parts["train"]
    assert origins(data.train) == list(zip(merged["set"], merged["row"], strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_without_shuffling_the_order_of_the_mixture_is_kept(packing: bool, folder: Path) -> None:
    """Easy rows first: one set after another, each in its own order, in packed rows and in every epoch."""
    recipe, made = material(folder, shuffle=False, packing=packing, max_length=64)
    steps = training_steps(recipe, made, 1, 0)
    assert steps is not None
    expected = [(name, i) for name, size in SIZES.items() for i in range(size)]
    for epoch in range(2):
        steps.set_epoch(epoch)
        seen = [i for step in steps.plan.units for batch in step for i in batch]
        assert origins(made.data.train[i] for i in seen) == expected
    if packing:
        assert any(len(batch) > 1 for step in steps.plan.units for batch in step)


@pytest.mark.parametrize("packing", [False, True])
def test_shares_hold_after_rows_were_held_out(packing: bool, folder: Path) -> None:
    mix = {"strategy": "interleave", "counts": {"a": 2, "b": 4}}
    recipe, made = material(folder, mix=mix, dev_split=4, packing=packing, shuffle=False)
    held = set(origins(made.data.eval["dev"]))
    visits = mixture(recipe, made)
    assert visits is not None
    left = 5 - sum(source == "c" for source, _ in held)
    for epoch in range(3):
        seen = origins(made.data.train[i] for i in visits(epoch).tolist())
        assert [sum(source == name for source, _ in seen) for name in SIZES] == [2, 4, left]
        assert not held & set(seen)


def test_evaluation_sets_are_never_mixed(folder: Path) -> None:
    spec = spec_of(folder, mix={"weights": {"a": 1, "b": 5, "c": 1}}, eval=["b.json"])
    assert origins(prepared(spec).eval["b"]) == [("b", 0), ("b", 1), ("b", 2)]


def test_documents_that_are_split_are_mixed_by_their_parts(folder: Path) -> None:
    for name in SIZES:
        (folder / f"{name}.txt").write_text("one two three four five six seven eight nine ten\n" * 2)
    spec = spec_of(folder, train=["a.txt", "b.txt"], max_length=8, overflow="split", mix={"counts": {"a": 3}})
    data = prepared(spec, "text")
    assert len(data.train.members("a")) > 3
    assert len(data.train.members("a")) + len(data.train.members("b")) == len(data.train)


def test_names_are_checked_before_anything_is_read(folder: Path) -> None:
    (folder / "a.json").write_text("{broken")
    with pytest.raises(DataError, match=r"data\.mix\.counts: 'd' is no training set"):
        prepared(spec_of(folder, mix={"counts": {"d": 3}}))


# --------------------------------------------------------------------------------------------------
# What `luthier check` says of it


def test_check_says_what_an_epoch_has_of_each_set(folder: Path) -> None:
    recipe, made = material(folder, mix={"weights": {"a": 1, "b": 1, "c": 2}, "until": "all"})
    shares = {one.dataset: one for one in shares_of(recipe, made)}
    # a is used up at last: 7 / (1/4) = 28 samples
    assert {name: (one.samples, one.different, one.of) for name, one in shares.items()} == {
        "a": (7, 7, 7),
        "b": (7, 3, 3),
        "c": (14, 5, 5),
    }
    assert [one.sample_share for one in shares.values()] == [0.25, 0.25, 0.5]
    assert sum(one.token_share for one in shares.values()) == pytest.approx(1)
    text = report(Findings(mixture=list(shares.values())))
    assert "c              14          5          5  50.0% " in text
    assert "<td>c</td><td>14</td><td>5</td>" in page(Findings(mixture=list(shares.values())), "recipe")


def test_check_says_it_of_sets_that_come_whole(folder: Path) -> None:
    recipe, made = material(folder)
    assert [(one.samples, one.different, one.of) for one in shares_of(recipe, made)] == [
        (size, size, size) for size in SIZES.values()
    ]
    alone, single = material(folder, train=["a.json"])
    assert shares_of(alone, single) == []


# --------------------------------------------------------------------------------------------------
# The words of LLaMA-Factory


FILE = {"model_name_or_path": "m", "do_train": True, "stage": "sft", "template": "default"}


def test_interleaving_is_translated() -> None:
    pair = {"dataset": "a,b", "mix_strategy": "interleave_over", "interleave_probs": "0.3, 0.7"}
    data = load_recipe(FILE | pair).recipe.data
    assert data.mix == MixSpec(strategy="interleave", until="all", probabilities=(0.3, 0.7))
    loaded = load_recipe(FILE | {"dataset": "a,b", "mix_strategy": "interleave_once", "eval_dataset": "c,d"})
    assert loaded.recipe.data.mix == MixSpec(strategy="interleave", until="once")
    said = "mix_strategy: evaluation sets are evaluated whole; there interleave_once mixes them, too"
    assert said in loaded.notes
    assert load_recipe(FILE | {"dataset": "a", "mix_strategy": "interleave_under"}).recipe.data.mix.is_plain


def test_remote_and_online_directories_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = load_recipe(FILE | {"dataset": "a", "dataset_dir": "REMOTE:org/set"}).recipe.data
    assert (remote.directory, remote.train) == ("hf://datasets/org/set", ("a",))
    online = FILE | {"dataset": "org/a", "dataset_dir": "ONLINE"}
    assert load_recipe(online).recipe.data.train == (DatasetSpec(hf_hub_url="org/a"),)
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert load_recipe(online).recipe.data.train == (DatasetSpec(ms_hub_url="org/a"),)


def test_rollouts_take_no_mixture() -> None:
    tree: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": ["a", "b"], "mix": {"weights": {"a": 1, "b": 2}}},
        "stage": {"type": "grpo", "rewards": [{"type": "length", "most": 9}]},
    }
    with pytest.raises(RecipeError, match="mix does not go with stage: grpo"):
        load_recipe(tree)
