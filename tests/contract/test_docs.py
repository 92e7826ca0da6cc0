"""What the documents say can be done: commands parse, recipes validate, files exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from luthier.cli import app
from luthier.data.registry import resolve_datasets
from luthier.quickstart.tour import FOLDER as QUICKSTART, read_questions
from luthier.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "benchmarks")
DOCUMENTS = sorted(path for folder in FOLDERS for path in folder.glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(luthier [^`\n]+)`")
SHELLS = {"", "bash", "console", "sh", "shell"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(path: Path) -> Iterator[str]:
    """Every `luthier ...` line of a shell block or an example's comment, and every `luthier ...` in a sentence."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yield from re.findall(r"^#.*?(luthier train \S+)$", text, re.MULTILINE)
        return
    for language, block in FENCE.findall(text):
        if language in SHELLS:
            lines = (line.strip().removeprefix("$ ") for line in block.splitlines())
            yield from (line for line in lines if line.startswith("luthier "))
    yield from INLINE.findall(FENCE.sub("", text))


def documented() -> list[tuple[str, str]]:
    return [(name(path), line) for path in [*DOCUMENTS, *EXAMPLES] for line in commands(path)]


def parse(line: str) -> None:
    """Parse one command line as the program would, without running it; it raises where it does not fit."""
    words = shlex.split(line, comments=True)[1:]
    words = words[: next((at for at, word in enumerate(words) if word in {">", "|"}), len(words))]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    if words[0].startswith("-"):
        assert words[0] in {"--help", "--version"}
        return
    assert words[0] in commands, f"there is no command {words[0]!r}"
    if "--help" not in words and len(words) > 1:
        commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize(("document", "line"), documented())
def test_documented_commands_parse(document: str, line: str) -> None:
    parse(line)


def test_the_readme_shows_commands() -> None:
    lines = [line for document, line in documented() if document == "README.md"]
    assert len(lines) >= 4, "the pattern that finds commands finds none: it is broken"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("luthier teach x.yaml", "there is no command 'teach'"),
        ("luthier train x.yaml --nonsense", "No such option: --nonsense"),
    ],
)
def test_a_wrong_command_is_found(line: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse(line)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_examples_validate_and_their_data_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_recipe(path)
    data = loaded.recipe.data
    assert loaded.llamafactory == path.name.startswith("llamafactory_")
    for attr in resolve_datasets([*data.train, *data.eval], data):
        assert all(file.is_file() for file in attr.files())


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "llamafactory" not in path.name], ids=name)
def test_native_examples_point_editors_to_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found is not None
    assert (path.parent / found[1]).resolve() == ROOT / "examples" / "recipe.schema.json"


def recipes_in_documents() -> list[tuple[str, str]]:
    return [
        (name(path), block)
        for path in DOCUMENTS
        for language, block in FENCE.findall(path.read_text(encoding="utf-8"))
        if language == "yaml"
    ]


@pytest.mark.parametrize(("document", "text"), recipes_in_documents())
def test_recipes_in_documents_validate(document: str, text: str) -> None:
    tree = yaml.safe_load(text)
    # Some of them only export, or only answer.
    assert load_recipe(tree, to_export=True).llamafactory == ("model_name_or_path" in tree)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_documents_name_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    links = [
        link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link and "@" not in link
    ]
    missing = [link for link in links if not (path.parent / link).exists()]
    roots = r"`((?:src|tests|docs|examples|benchmarks|\.ci|\.github)/[\w./-]+)`"
    missing += [file for file in re.findall(roots, text) if not (ROOT / file).exists()]
    assert not missing


def test_make_targets_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z]+)", text) + re.findall(r"^make ([a-z]+)", text, re.MULTILINE)
        assert set(named) <= targets, name(path)


def test_held_out_questions_are_held_out() -> None:
    trained = (QUICKSTART / "train.jsonl").read_text(encoding="utf-8")
    questions = read_questions()
    assert len(questions) >= 10
    assert {question.check for question in questions} == {"contains", "exact"}
    assert not [question.question for question in questions if question.question in trained]
