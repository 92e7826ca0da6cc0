"""The user's own code, named in a recipe: how it is found, and the sentence for each way in which it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from luthier.trainer.plugins import load_callbacks, load_named
from luthier.types import RecipeError

CODE = """
import transformers

class Stop(transformers.TrainerCallback):
    pass

class Wanting(transformers.TrainerCallback):
    def __init__(self, patience):
        self.patience = patience

class Broken(transformers.TrainerCallback):
    def __init__(self):
        raise KeyError("no such thing")

class Other:
    pass

stop = Stop()

def share(rows):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory is empty; `mine.py` is beside the recipe, in a folder that can be imported from."""
    (tmp_path / "empty").mkdir()
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "mine.py").write_text(CODE)
    (beside / "broken.py").write_text("import math\nmath.nothing\n")
    (beside / "unwritten.py").write_text("def half(:\n")
    (beside / "hungry.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.chdir(tmp_path / "empty")
    return beside


def test_a_file_beside_the_recipe(folder: Path) -> None:
    (found,) = load_callbacks(["mine.py:Stop"], folder)
    assert isinstance(found, TrainerCallback) and type(found).__name__ == "Stop"


def test_the_working_directory_comes_first(folder: Path) -> None:
    Path("mine.py").write_text("name = 'here'\n")
    assert load_named("mine.py:name", "train.metrics", folder) == "here"


def test_a_file_named_twice_is_one_module_until_it_is_edited(folder: Path) -> None:
    function = load_named("mine.py:share", "train.metrics", folder)
    assert load_named(f"{folder / 'mine.py'}:share", "train.metrics", None) is function
    assert sys.modules[function.__module__].share is function
    (folder / "mine.py").write_text(CODE.replace("1.0", "2.0"))
    assert load_named("mine.py:share", "train.metrics", folder)([]) == 2.0


def test_an_importable_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_named("json.decoder:JSONDecoder", "train.callbacks", None).__name__ == "JSONDecoder"
    (folder / "importable_callbacks.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    (found,) = load_callbacks(["importable_callbacks:Stop"], None)
    assert type(found).__module__ == "importable_callbacks"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine.py", "'mine.py': write package.module:Name or file.py:Name"),
        ("mine.py:", "'mine.py:': write package.module:Name or file.py:Name"),
        (":Stop", "':Stop': write package.module:Name or file.py:Name"),
        ("mine.py:Stop()", "'mine.py:Stop()': write package.module:Name or file.py:Name"),
        (
            "absent.py:Stop",
            "there is no file absent.py (looked for {empty}/absent.py and {beside}/absent.py)",
        ),
        ("mine.py:Stops", "mine.py has no Stops; did you mean Stop?"),
        ("mine.py:Zebra", "mine.py has no Zebra"),
        (
            "broken.py:Stop",
            "{beside}/broken.py cannot be imported: AttributeError: module 'math' has no attribute 'nothing'",
        ),
        (
            "unwritten.py:Stop",
            "{beside}/unwritten.py cannot be imported: SyntaxError: invalid syntax (unwritten.py, line 1)",
        ),
        (
            "hungry.py:Stop",
            "{beside}/hungry.py cannot be imported: ModuleNotFoundError: No module named 'a_library_that_nobody_has'",
        ),
        ("luthier.nothing:Stop", "there is no module luthier.nothing; is it on PYTHONPATH?"),
        ("nowhere.at.all:Stop", "there is no module nowhere.at.all; is it on PYTHONPATH?"),
        ("mine:Stop", "there is no module mine; the file is named as mine.py"),
        ("json:Stop", "json has no Stop"),
        ("..mine:Stop", "..mine cannot be imported: TypeError: the 'package' argument is required"),
        (
            "mine.py:Other",
            "mine.py:Other is the class Other; a callback is a class derived from transformers.TrainerCallback",
        ),
        (
            "mine.py:share",
            "mine.py:share is a function; a callback is a class derived from transformers.TrainerCallback",
        ),
        (
            "mine.py:stop",
            "mine.py:stop is an instance of Stop; a callback is a class derived from transformers.TrainerCallback",
        ),
        (
            "mine.py:transformers",
            "mine.py:transformers is a module; a callback is a class derived from transformers.TrainerCallback",
        ),
        (
            "mine.py:Wanting",
            "mine.py:Wanting cannot be made (it gets no arguments): TypeError: Wanting.__init__() missing 1 required "
            "positional argument: 'patience'",
        ),
        (
            "mine.py:Broken",
            "mine.py:Broken cannot be made (it gets no arguments): KeyError: 'no such thing'",
        ),
    ],
)
def test_refused(reference: str, message: str, folder: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_callbacks([reference], folder)
    told = message.format(empty=Path.cwd(), beside=folder)
    assert str(error.value).startswith(f"train.callbacks: {told}")


def test_the_original_error_is_the_cause(folder: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_callbacks(["mine.py:Broken"], folder)
    assert isinstance(error.value.__cause__, KeyError)


def test_an_import_inside_a_package_that_fails_is_not_a_missing_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(
        RecipeError, match="hungry cannot be imported: ModuleNotFoundError: No module named 'a_lib"
    ):
        load_callbacks(["hungry:Stop"], None)


def test_two_of_one_name(folder: Path) -> None:
    with pytest.raises(RecipeError, match="two callbacks are called Stop; rename one"):
        load_callbacks(["mine.py:Stop", f"{folder / 'mine.py'}:Stop"], folder)
