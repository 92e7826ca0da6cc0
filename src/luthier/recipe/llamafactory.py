"""A LLaMA-Factory file as a native recipe: every key is translated, accepted with a note, or an error.

The file's own defaults are LLaMA-Factory's, so a file that trained there trains the same here. Where that
tool lets packed conversations see each other, Luthier does not, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from luthier.recipe.earlier_keys import EARLY_MARKS, OLDER_NAMES
from luthier.recipe.flat import TOOL_DEFAULT, Flat
from luthier.recipe.key_rules import Rule
from luthier.recipe.known_keys import KEYS
from luthier.recipe.llamafactory_data import DATA_SUBJECTS
from luthier.recipe.llamafactory_export import EXPORT_SUBJECTS, exports
from luthier.recipe.llamafactory_generation import GENERATION_SUBJECTS, predicts, talks, trains
from luthier.recipe.llamafactory_keys import EXPORT_KEYS
from luthier.recipe.llamafactory_model import ANSWERING_SUBJECTS, EXPORTED_SUBJECTS, MODEL_SUBJECTS
from luthier.recipe.llamafactory_ppo import in_optimizer_steps
from luthier.recipe.llamafactory_stage import STAGE_SUBJECTS
from luthier.recipe.llamafactory_train import TRAIN_SUBJECTS
from luthier.recipe.problems import nearest, specs, tag
from luthier.recipe.schema import Recipe, Spec
from luthier.recipe.source import Document

Subjects = tuple[Callable[[Flat], None], ...]
"""What translates a file, a function for each of its parts."""

EARLY_DEFAULTS = (
    "from an early version with other defaults (lora_target: q_proj,v_proj; lora_dropout: 0.1); "
    "what the file leaves out takes those of 0.9.5"
)


def recognises(tree: dict[str, Any]) -> bool:
    """Whether a file is a LLaMA-Factory one, be it without a model."""
    if "model_name_or_path" in tree:
        return True
    sections = [name for name in Recipe.model_fields if name not in KEYS or isinstance(tree.get(name), dict)]
    return not set(sections) & set(tree) and bool((KEYS.keys() | OLDER_NAMES.keys()) & set(tree))


def translate(document: Document, *, to_export: bool = False) -> Document:
    """The native tree of a flat document; `to_export`: it may train nothing, but export or answer alone.

    Raises RecipeError, one line for every key that cannot be kept.
    """
    flat = Flat(document)
    _check_names(flat)
    alone = to_export and (predicts(flat) or not (flat.given("dataset") or flat.given("eval_dataset")))
    _check_verb(flat, alone=alone)
    _check_values(flat)
    for key, rule in KEYS.items():
        if rule.rule is Rule.DIRECT:
            flat.put(rule.target, flat.get(key), key)
        elif rule.rule is Rule.EXTRA and flat.changed(key):
            flat.put(f"train.extra.{key}", flat.get(key), key)
    model: Subjects = MODEL_SUBJECTS
    train: Subjects = TRAIN_SUBJECTS
    if alone:
        model = ANSWERING_SUBJECTS if predicts(flat) or talks(flat) else EXPORTED_SUBJECTS
        train = (_no_run,)
    for subject in (*model, *STAGE_SUBJECTS, *DATA_SUBJECTS, *EXPORT_SUBJECTS, *train, *GENERATION_SUBJECTS):
        subject(flat)
    flat.refuse()
    in_optimizer_steps(flat)
    _forget_our_defaults(flat)
    return flat.native


def _no_run(flat: Flat) -> None:
    """A file that only exports or answers names no run."""
    if flat.native.tree["train"].get("output") is None:
        flat.drop("train.output")


def _check_names(flat: Flat) -> None:
    for key in flat.source.tree:
        if key not in KEYS:
            flat.problem(key, _unknown(key))
    if not flat.given("model_name_or_path"):
        flat.problem("model_name_or_path", "is missing; name the model")
    early = [key for key in (*flat.older, *flat.source.tree) if key in EARLY_MARKS]
    if early:
        flat.note(f"{early[0]}: {EARLY_DEFAULTS}")


def _unknown(key: str) -> str:
    if key in Recipe.model_fields:
        return (
            "a section of a native recipe cannot stand in a LLaMA-Factory file; `luthier migrate` writes one"
        )
    near = nearest(key, [*KEYS, *OLDER_NAMES])
    return f"LLaMA-Factory has no such key; did you mean {near}?" if near else "LLaMA-Factory has no such key"


def _check_verb(flat: Flat, *, alone: bool) -> None:
    """Files that belong to another verb, and only that is worth saying. `alone`: one that trains nothing is welcome."""
    verb = None
    if flat.given("task") and not trains(flat):
        verb = "task", f"this file runs a benchmark: {_benchmark(flat)}"
    elif alone or trains(flat):
        return
    elif exports(flat):
        key = next(key for key in EXPORT_KEYS if flat.changed(key))
        verb = key, "this file exports a model: run `luthier export` with it"
    elif predicts(flat):
        key = "do_predict" if flat.flag("do_predict") else "predict_with_generate"
        verb = key, "this file answers a data set: run `luthier predict` with it"
    elif talks(flat):
        verb = (
            "infer_backend" if flat.given("infer_backend") else "do_train",
            "this file names a model to talk to: run `luthier chat` or `luthier serve` with it; "
            "to train add do_train: true and dataset",
        )
    if verb is not None:
        flat.problem(*verb)
        flat.refuse()


def _benchmark(flat: Flat) -> str:
    """The command that does what a file for that tool's `eval` says."""
    given = {"task": "--task", "task_dir": "--task-dir", "n_shot": "--n-shot", "lang": "--lang"}
    words = [f"{option} {flat.get(key)}" for key, option in given.items() if flat.given(key)]
    model = flat.get("adapter_name_or_path") or flat.get("model_name_or_path")
    return f"run luthier evaluate {model} {' '.join(words)}"


def _check_values(flat: Flat) -> None:
    """Refused keys, and the notes of those that are accepted."""
    for key, value in flat.source.tree.items():
        if key not in KEYS:
            continue
        if isinstance(value, str) and "${" in value:
            flat.problem(key, "variables (${...}) are not replaced; write the value itself")
        entry = KEYS[key]
        if flat.changed(key) and entry.rule is Rule.REFUSED:
            flat.problem(key, entry.text)
        elif flat.changed(key) and entry.rule is Rule.NOTED:
            flat.note(f"{flat.written(key)}: {entry.text}")


def _forget_our_defaults(flat: Flat) -> None:
    """Where both tools have the same default there is nothing to tell: it is the default."""
    native = flat.native
    for path, place in list(native.places.items()):
        if len(path) != 2 or place.origin != TOOL_DEFAULT or path[1] == "type":
            continue
        section, name = str(path[0]), str(path[1])
        values = native.tree[section]
        default = _our_default(section, values).get(name)
        default = list(default) if isinstance(default, tuple) else default
        if values[name] == default and isinstance(values[name], bool) == isinstance(default, bool):
            flat.drop(f"{section}.{name}")


def _our_default(section: str, values: dict[str, Any]) -> dict[str, Any]:
    info = Recipe.model_fields[section]
    kinds = specs(info.annotation)
    kind: type[Spec] = next((kind for kind in kinds if tag(kind) == values.get("type")), kinds[0])
    return {name: field.default for name, field in kind.model_fields.items()}
