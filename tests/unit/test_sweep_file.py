"""Sweep files: what they mean, and the exact words about what is wrong with them, before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from typer.testing import CliRunner

from luthier.cli import app
from luthier.recipe.load import load_recipe
from luthier.recipe.sweep import RandomSpec, load_sweep, word
from luthier.sweep.space import Choice, Interval, check, dimensions, draws, grid, listed
from luthier.types import RecipeError

NATIVE = """
model: {path: embedded}
data: {train: [a], dev_split: 0.1}
method: {type: lora, rank: 4}
"""
FLAT = """
model_name_or_path: m
stage: sft
do_train: true
finetuning_type: lora
dataset: a
val_size: 0.1
do_eval: true
output_dir: out
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(NATIVE)
    return tmp_path


def write(text: str) -> Path:
    path = Path("s.yaml")
    path.write_text(text)
    return path


def trials(text: str) -> list[dict[str, Any]]:
    """All trials of a sweep file that knows them beforehand, checked."""
    plan = load_sweep(write(text))
    space = dimensions(plan)
    found = listed(plan, space)
    check(plan, space, found)
    assert found is not None
    return found


def problem(text: str) -> str:
    plan: Path = write(text)
    with pytest.raises(RecipeError) as caught:
        loaded = load_sweep(plan)
        check(loaded, dimensions(loaded), listed(loaded, dimensions(loaded)))
    assert sorted(path.name for path in Path().iterdir()) == ["base.yaml", "s.yaml"]
    return str(caught.value)


# --------------------------------------------------------------------------------------------------
# What a file means


def test_defaults_and_the_direction_of_a_metric(folder: Path) -> None:
    text = "recipe: base.yaml\nspace: {optim.lr: [1e-4]}\n"
    plan = load_sweep(write(text))
    assert (plan.spec.search.type, plan.spec.metric, plan.spec.keep) == ("grid", "eval_loss", "best")
    assert plan.output == Path("sweeps/s")
    assert plan.spec.minimizes
    for metric, lower in (("eval_perplexity", True), ("eval_accuracy", False), ("train_loss", True)):
        assert load_sweep(write(f"{text}metric: {metric}\n")).spec.minimizes is lower
    assert not load_sweep(write(f"{text}direction: maximize\n")).spec.minimizes


def test_the_recipe_stands_beside_the_sweep_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "s.json").write_text('{"recipe": "../base.yaml", "space": {"method.rank": [1]}}')
    plan = load_sweep(Path("deep/s.json"))
    assert plan.base.recipe.model.path == "embedded"
    assert plan.output == Path("sweeps/s")


def test_a_grid_is_every_combination_the_last_key_fastest(folder: Path) -> None:
    found = trials(
        "recipe: base.yaml\n"
        "space:\n"
        "  optim.lr: {low: 0.1, high: 0.3, step: 0.1}\n"
        "  method: [{type: lora, rank: 2}, {type: full}]\n"
        "  data.packing: [true, false]\n"
    )
    assert [params["optim.lr"] for params in found] == [0.1] * 4 + [0.2] * 4 + [0.3] * 4
    assert [params["data.packing"] for params in found] == [True, False] * 6
    assert found[2] == {"optim.lr": 0.1, "method": {"type": "full"}, "data.packing": True}
    plan = load_sweep(Path("s.yaml"))
    recipe = load_recipe("base.yaml", plan.words(found[2])).recipe
    assert (recipe.method.type, recipe.optim.lr, recipe.data.packing) == ("full", 0.1, True)


def test_overrides_hold_for_every_trial(folder: Path) -> None:
    plan = load_sweep(
        write("recipe: base.yaml\nspace: {optim.lr: [1]}\noverrides: [train.max_steps=20, stage.type=sft]\n")
    )
    assert plan.words({"optim.lr": 1}) == ["train.max_steps=20", "stage.type=sft", "optim.lr=1"]
    assert plan.base.recipe.train.max_steps == 20


@pytest.mark.parametrize(
    "value", [1e-05, 3, "007", "a: b", None, True, [1, "x y"], {"type": "lora"}, "", "1e-4"]
)
def test_words_are_read_back_as_the_same_value(value: Any) -> None:
    from luthier.recipe.source import parse_yaml_value

    text = word("key", value)
    assert parse_yaml_value(text.partition("=")[2], text) == value


def test_whole_numbers_where_the_recipe_takes_no_others(folder: Path) -> None:
    def values(key: str, text: str) -> list[Any]:
        return [params[key] for params in trials(f"recipe: base.yaml\nspace: {{{key}: {text}}}\n")]

    ranks = values("method.rank", "{low: 4, high: 12, step: 4}")
    assert ranks == [4, 8, 12] and all(type(value) is int for value in ranks)
    epochs = values("train.epochs", "{low: 1, high: 3, step: 1}")
    assert epochs == [1.0, 2.0, 3.0] and all(type(value) is float for value in epochs)
    assert values("train.epochs", "{low: 0.5, high: 1.9, step: 0.7}") == [0.5, 1.2, 1.9]
    plan = load_sweep(
        write(
            "recipe: base.yaml\nsearch: {type: random, trials: 50}\nspace: {train.epochs: {low: 1, high: 3}}\n"
        )
    )
    (space,) = dimensions(plan)
    assert isinstance(space, Interval) and not space.whole  # the recipe takes 1.5 epochs


def test_a_llamafactory_recipe_is_searched_by_its_own_names(folder: Path) -> None:
    Path("base.yaml").write_text(FLAT)
    found = trials(
        "recipe: base.yaml\nspace: {learning_rate: [1.0e-4, 2.0e-4], lora_rank: {low: 4, high: 8, step: 4}}\n"
    )
    assert found[-1] == {"learning_rate": 2e-4, "lora_rank": 8}
    plan = load_sweep(Path("s.yaml"))
    recipe = load_recipe("base.yaml", plan.words(found[-1])).recipe
    assert (recipe.optim.lr, recipe.method.rank) == (2e-4, 8)  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------
# Draws


def interval(
    low: float, high: float, *, log: bool = False, step: float | None = None, whole: bool = False
) -> Interval:
    return Interval("x", low, high, log, step, whole)


def sample(dimension: Choice | Interval, count: int = 4000) -> list[Any]:
    from random import Random

    random = Random(0)
    return [dimension.draw(random) for _ in range(count)]


def test_draws_are_uniform_or_uniform_in_the_logarithm() -> None:
    """Means of uniform variables, within five standard errors (width / sqrt(12 n))."""
    flat = sample(interval(2.0, 6.0))
    assert np.mean(flat) == pytest.approx(4.0, abs=5 * 4 / math.sqrt(12 * 4000))
    logs = np.log10(sample(interval(1e-6, 1e-2, log=True)))
    assert logs.mean() == pytest.approx(-4.0, abs=5 * 4 / math.sqrt(12 * 4000))
    assert logs.min() < -5.9 and logs.max() > -2.1
    whole = sample(interval(1, 4, whole=True))
    for value in (1, 2, 3, 4):
        assert whole.count(value) / 4000 == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 4000))
    # a whole number n stands for n - 1/2 to n + 1/2 in the logarithm
    ratios = sample(interval(1, 3, log=True, whole=True))
    share = math.log(1.5 / 0.5) / math.log(3.5 / 0.5)
    assert ratios.count(1) / 4000 == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / 4000))
    assert set(sample(Choice("x", ("a", None)), 100)) == {"a", None}


@given(st.floats(1e-8, 1e3), st.floats(1.001, 1e6), st.booleans(), st.integers(0, 2**32))
def test_draws_stay_inside_and_are_short(low: float, ratio: float, log: bool, seed: int) -> None:
    from random import Random

    value = interval(low, low * ratio, log=log).draw(Random(seed))
    assert low <= value <= low * ratio
    assert value in (low, low * ratio, float(f"{value:.6g}"))


def test_a_longer_random_search_begins_with_the_shorter_one() -> None:
    space = (interval(0.0, 1.0), Choice("y", (1, 2, 3)))
    short, long = (list(draws(space, RandomSpec(trials=count, seed=7))) for count in (5, 20))
    assert long[:5] == short
    assert list(draws(space, RandomSpec(trials=5, seed=8))) != short


def test_a_small_space_is_drawn_without_repetition() -> None:
    space = (Choice("a", (1, 2, 3)), interval(1, 2, whole=True))
    drawn = list(draws(space, RandomSpec(trials=6, seed=0)))
    assert sorted(map(str, drawn)) == sorted(map(str, grid(space)))


# --------------------------------------------------------------------------------------------------
# Dry run


def test_dry_run_prints_the_trials_of_a_grid_and_writes_nothing(folder: Path) -> None:
    write("recipe: base.yaml\nspace: {optim.lr: [1.0e-4, 3.0e-4], method.rank: [4, 8]}\noutput: out/lr\n")
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, ["sweep", "--dry-run", "s.yaml"])
    assert result.exit_code == 0
    assert result.stdout == (
        "4 trials into out/lr, to minimize eval_loss\n"
        "  trial-001  optim.lr=0.0001 method.rank=4\n"
        "  trial-002  optim.lr=0.0001 method.rank=8\n"
        "  trial-003  optim.lr=0.0003 method.rank=4\n"
        "  trial-004  optim.lr=0.0003 method.rank=8\n"
    )
    assert sorted(folder.rglob("*")) == before


def test_dry_run_of_a_search_that_decides_as_it_goes(folder: Path) -> None:
    write(
        "recipe: base.yaml\nsearch: {type: optuna, trials: 9}\nmetric: eval_accuracy\noverrides: ['train.metrics=[accuracy]']\n"
        "space: {optim.lr: {low: 1.0e-4, high: 1, log: true}, method.rank: [4, 8]}\n"
    )
    assert CliRunner().invoke(app, ["sweep", "--dry-run", "s.yaml"]).stdout == (
        "9 trials into sweeps/s, each chosen after the last, to maximize eval_accuracy\n"
        "  optim.lr: 0.0001 to 1, equal ratios\n"
        "  method.rank: 4, 8\n"
    )


# --------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml: the file is empty; a sweep names at least recipe and space"),
        ("- a\n", "s.yaml: a sweep is a mapping of keys (`recipe:`, `search:`, `space:`, ...)"),
        ("recipe: base.yaml\n", "s.yaml: space: is missing; give a mapping of keys"),
        ("recipe: base.yaml\nspace: {}\n",
         "s.yaml:2: space: is empty: name at least one key of the recipe and its values"),
        ("recipe: base.yaml\nspace: {optim.lr: [1]}\nserch: {type: grid}\n",
         "s.yaml:3: serch: unknown key; did you mean search?"),
        ("recipe: base.yaml\nspace: {optim.lr: [1]}\noptim: {lr: 1}\n",
         "s.yaml:3: optim: unknown key; "
         "a sweep has recipe, search, metric, direction, space, overrides, output, keep"),
        ("recipe: base.yaml\nsearch: {trials: 3}\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: search: type is missing; choose from grid, random, optuna"),
        ("recipe: base.yaml\nsearch: {type: tpe}\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: search: type: tpe: no such kind; choose from grid, random, optuna"),
        ("recipe: base.yaml\nsearch: {type: grid, trials: 3}\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: search.trials: does not go with type: grid; it belongs to type: random or optuna"),
        ("recipe: base.yaml\nsearch: {type: random, trials: 0}\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: search.trials: should be greater than 0, found the number 0"),
        ("recipe: base.yaml\nsearch: {type: random, trials: 5}\nspace: {optim.lr: [1, 2], method.rank: [1, 2]}\n",
         "search.trials: 5, but the space has 4 combinations; search: {type: grid} tries each"),
        ("recipe: base.yaml\ndirection: up\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: direction: 'up' is none of its values; choose from minimize, maximize"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {lo: 1, high: 2}\n",
         "s.yaml:3: space.optim.lr.low: is missing; give a number\n"
         "s.yaml:3: space.optim.lr.lo: unknown key; did you mean space.optim.lr.low?"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: a, high: 2}\n",
         "s.yaml:3: space.optim.lr.low: expected a number, found the text 'a'"),
        ("recipe: base.yaml\nspace:\n  optim.lr: 3\n",
         "s.yaml:3: space.optim.lr: expected a mapping of keys or a list, found the number 3"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: 2, high: 2}\n",
         "s.yaml:3: space.optim.lr: low (2) should be below high (2)"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: 0, high: 2, log: true}\n",
         "s.yaml:3: space.optim.lr: log needs low above 0, found 0"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: 1, high: 2, log: true, step: 1}\n",
         "s.yaml:3: space.optim.lr: log and step exclude each other; give one, or list the values"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: 1, high: 2, step: 0}\n",
         "s.yaml:3: space.optim.lr: step should be above 0, found 0"),
        ("recipe: base.yaml\nspace:\n  optim.lr: {low: 1, high: 2}\n",
         "s.yaml:3: space.optim.lr: a grid needs a list of values or a step; random and optuna draw"),
        ("recipe: base.yaml\nspace:\n  optim.lr: []\n",
         "s.yaml:3: space.optim.lr: is an empty list; name the values to try"),
        ("recipe: base.yaml\nspace:\n  optim.lr: [1, 2, 1]\n", "s.yaml:3: space.optim.lr: 1 stands there twice"),
        ("recipe: base.yaml\nspace:\n  optim lr: [1]\n",
         "s.yaml:3: space.optim lr: should be a key of the recipe, for example optim.lr"),
        ("recipe: base.yaml\nspace:\n  method: [{type: full}]\n  method.rank: [1]\n",
         "s.yaml:4: space.method.rank: is inside space.method; keep one"),
        ("recipe: base.yaml\nspace:\n  optim.lr: [1]\noverrides: [optim.lr=2]\n",
         "s.yaml:3: space.optim.lr: stands in overrides, too; keep one"),
        ("recipe: base.yaml\nspace:\n  train.output: [a]\noverrides: [train.resume=auto]\n",
         "s.yaml:4: overrides[0]: train.resume: a sweep sets this in every trial itself; remove it\n"
         "s.yaml:3: space.train.output: a sweep sets this in every trial itself; remove it"),
        ("recipe: bse.yaml\nspace: {optim.lr: [1]}\n", "s.yaml:1: recipe: no such file: bse.yaml"),
        # the recipe's own schema, for every value
        ("recipe: base.yaml\nspace:\n  method.rnk: [4]\n",
         "s.yaml:3: space.method.rnk: method.rnk=4: unknown key; did you mean method.rank?"),
        ("recipe: base.yaml\nspace:\n  method.rank: [4, 8, 0, x]\n",
         "s.yaml:3: space.method.rank: method.rank=0: should be greater than 0, found the number 0\n"
         "s.yaml:3: space.method.rank: method.rank=x: expected a whole number, found the text 'x'"),
        ("recipe: base.yaml\nspace:\n  method.rank: {low: 1.5, high: 2.5, step: 0.5}\n",
         "s.yaml:3: space.method.rank: method.rank=1.5: expected a whole number, found the number 1.5\n"
         "s.yaml:3: space.method.rank: method.rank=2.0: expected a whole number, found the number 2.0\n"
         "s.yaml:3: space.method.rank: method.rank=2.5: expected a whole number, found the number 2.5"),
        ("recipe: base.yaml\nsearch: {type: optuna, trials: 3}\nspace:\n"
         "  optim.lr: {low: -1, high: 1}\n  method.rank: [4, none]\n",
         "s.yaml:4: space.optim.lr: optim.lr=-1.0: should be greater than or equal to 0, found the number -1.0\n"
         "s.yaml:5: space.method.rank: method.rank=none: expected a whole number, found the text 'none'"),
        ("recipe: base.yaml\nspace: {optim.lr: [1]}\noverrides: [train.epohs=3, max_steps=2, nonsense]\n",
         "s.yaml:3: overrides[2]: nonsense: write KEY=VALUE, for example train.epochs=2"),
        ("recipe: base.yaml\nspace: {optim.lr: [1]}\noverrides:\n  - train.epohs=3\n",
         "s.yaml:4: overrides[0]: train.epohs=3: unknown key; did you mean train.epochs?"),
        ("recipe: base.yaml\nspace: {train.tokens_per_batch: [8], train.rows_per_device: [1, null]}\n",
         "s.yaml:2: space.train.tokens_per_batch: train.tokens_per_batch=8: train: give tokens_per_batch or rows_per_device, not both: two rules for one thing "
         "(with train.tokens_per_batch=8 train.rows_per_device=1)"),
        # what decides must be there
        ("recipe: base.yaml\nspace: {data.dev_split: [0.1, 0]}\n",
         "s.yaml: metric: eval_loss needs data.eval or data.dev_split in the recipe "
         "(with data.dev_split=0)"),
        ("recipe: base.yaml\nspace: {optim.lr: [1]}\nmetric: eval_loss\noverrides: [train.eval_at_end=false]\n",
         "s.yaml:3: metric: eval_loss needs train.eval_at_end: true in the recipe"),
        ("recipe: base.yaml\nsearch: {type: optuna, trials: 2, pruner: median}\nspace: {optim.lr: [1]}\n",
         "s.yaml:2: search.pruner: judges a trial by its evaluations: give train.eval_every in the recipe"),
        ("recipe: base.yaml\nsearch: {type: optuna, trials: 2, pruner: median}\nspace: {optim.lr: [1]}\n"
         "metric: train_loss\noverrides: [train.eval_every=1]\n",
         "s.yaml:2: search.pruner: judges a trial by its evaluations, and train_loss is known only at its end"),
    ],
)  # fmt: skip
def test_faults_are_named_before_anything_runs(folder: Path, text: str, message: str) -> None:
    assert problem(text) == message


def test_a_fault_of_the_command_is_one_message(folder: Path) -> None:
    write("recipe: base.yaml\nspace: {method.rnk: [4]}\n")
    result = CliRunner().invoke(app, ["sweep", "s.yaml"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "error: s.yaml:2: space.method.rnk: method.rnk=4: unknown key; did you mean method.rank?\n"
    )
    assert not Path("sweeps").exists()


def test_optuna_that_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier import environment

    found = environment.util.find_spec
    monkeypatch.setattr(environment.util, "find_spec", lambda name: None if name == "optuna" else found(name))
    write("recipe: base.yaml\nsearch: {type: optuna, trials: 2}\nspace: {optim.lr: [1]}\n")
    result = CliRunner().invoke(app, ["sweep", "s.yaml"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: search.type: optuna needs ")
    assert result.stderr.endswith("not installed: pip install 'luthier[sweep]'\n")
    assert not Path("sweeps").exists()
