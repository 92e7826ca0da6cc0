"""The user's own code that a recipe names, as `package.module:Name` or `file.py:Name`.

Naming it in a recipe is asking for it to be run. A file is looked for in the working directory, then beside the
recipe; a package has to be installed, or on PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import TrainerCallback

from luthier.optim.schedule import Factor
from luthier.recipe.problems import nearest
from luthier.types import RecipeError

FORMS = "package.module:Name or file.py:Name"


def load_named(reference: str, key: str, beside: Path | None) -> Any:
    """The object that `reference` names; `key` is the recipe's key, for messages, `beside` the recipe's folder.

    Raises RecipeError where the reference is not written like one, its file, module or name does not exist, or
    importing it fails; the original error is its cause.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise RecipeError(f"{key}: {reference!r}: write {FORMS}")
    module = _from_file(where, key, beside) if where.endswith(".py") else _from_package(where, key, beside)
    try:
        return getattr(module, name)
    except AttributeError:
        near = nearest(name, [known for known in vars(module) if not known.startswith("__")])
        hint = f"; did you mean {near}?" if near else ""
        raise RecipeError(f"{key}: {where} has no {name}{hint}") from None


def _from_file(where: str, key: str, beside: Path | None) -> ModuleType:
    places = _places(where, beside)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        tried = " and ".join(str(place.absolute()) for place in dict.fromkeys(places))
        raise RecipeError(f"{key}: there is no file {where} (looked for {tried})")
    # Known to Python by its content: what is named twice is one module, what was edited since is another.
    content = hashlib.sha256(str(file.resolve()).encode() + file.read_bytes()).hexdigest()[:16]
    known = f"luthier_recipe_{file.stem}_{content}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[known] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code may raise anything; it is the cause of what is raised here
        del sys.modules[known]
        raise RecipeError(f"{key}: {file} cannot be imported: {_words(error)}") from error
    return module


def _places(where: str, beside: Path | None) -> list[Path]:
    """Where a file that a recipe names is looked for, in this order."""
    if beside is None or Path(where).is_absolute():
        return [Path(where)]
    return [Path(where), beside / where]


def anywhere(reference: str, beside: Path | None) -> str:
    """The same reference for a recipe that stands in no folder, or in another; as it is where there is no such file."""
    where, colon, name = reference.rpartition(":")
    file = next((place for place in _places(where, beside) if place.is_file()), None)
    return reference if file is None else f"{file.absolute()}{colon}{name}"


def _from_package(where: str, key: str, beside: Path | None) -> ModuleType:
    try:
        return importlib.import_module(where)
    except Exception as error:  # user code may raise anything; it is the cause of what is raised here
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if not absent or not f"{where}.".startswith(f"{error.name}."):  # type: ignore[attr-defined]
            raise RecipeError(f"{key}: {where} cannot be imported: {_words(error)}") from error
    file = Path(*where.split(".")).with_suffix(".py")
    there = next(
        (place for place in (Path(), beside) if place is not None and (place / file).is_file()), None
    )
    hint = f"; the file is named as {file.as_posix()}" if there is not None else "; is it on PYTHONPATH?"
    raise RecipeError(f"{key}: there is no module {where}{hint}")


def load_callbacks(references: Sequence[str], beside: Path | None) -> list[TrainerCallback]:
    """The transformers callbacks that `train.callbacks` names, each made without arguments.

    Raises RecipeError where one cannot be found or made, is no class derived from `TrainerCallback`, or has the
    name of another: a checkpoint keeps their state by the name of the class.
    """
    key = "train.callbacks"
    callbacks: dict[str, TrainerCallback] = {}
    for reference in references:
        kind = load_named(reference, key, beside)
        if not isinstance(kind, type) or not issubclass(kind, TrainerCallback):
            raise RecipeError(
                f"{key}: {reference} is {describe(kind)}; "
                f"a callback is a class derived from transformers.TrainerCallback"
            )
        if kind.__name__ in callbacks:
            raise RecipeError(f"{key}: two callbacks are called {kind.__name__}; rename one")
        try:
            callbacks[kind.__name__] = kind()
        except Exception as error:  # user code may raise anything; it is the cause of what is raised here
            raise RecipeError(
                f"{key}: {reference} cannot be made (it gets no arguments): {_words(error)}"
            ) from error
    return list(callbacks.values())


def load_schedule(reference: str | None, beside: Path | None) -> Factor | None:
    """The function that `optim.schedule_function` names. Raises RecipeError where there is none."""
    if reference is None:
        return None
    function = load_named(reference, "optim.schedule_function", beside)
    if not callable(function) or isinstance(function, type):
        raise RecipeError(
            f"optim.schedule_function: {reference} is {describe(function)}; a schedule is a function of the steps "
            "taken and the number of all steps"
        )
    return function  # type: ignore[no-any-return]


def describe(value: Any) -> str:
    """What an object is, in words, where another kind was wanted."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, TrainerCallback):
        return f"an instance of {type(value).__name__}"
    if isinstance(value, ModuleType):
        return "a module"
    kind = type(value).__name__
    return {"function": "a function", "NoneType": "None"}.get(kind, f"a value ({kind})")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
