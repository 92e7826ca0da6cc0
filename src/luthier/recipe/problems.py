"""Validation of a recipe's tree, with every problem in plain words at the place where it was written.

pydantic checks; this module only finds, for each of its errors, the place in the user's file and the
sentence: what was expected, what was found, and which key was probably meant.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from luthier.recipe.key_rules import Rule
from luthier.recipe.known_keys import known_key
from luthier.recipe.schema import ModelSpec, Recipe, Spec
from luthier.recipe.source import Document, KeyPath, dotted
from luthier.types import RecipeError

Root = TypeVar("Root", bound=Spec)

_TYPE_ERRORS = ("_type", "_parsing", "int_from_float", "literal_error", "none_required")


def validate(document: Document) -> Recipe:
    """The typed recipe. Raises RecipeError with one line for every problem in the document."""
    return validate_as(Recipe, document)


def validate_as(root: type[Root], document: Document) -> Root:
    """The document as a value of `root`, a recipe or another file of ours; raises like `validate`."""
    try:
        # Strict JSON is exactly the strictness wanted: a list may become a tuple, "8" does not become 8.
        return root.model_validate_json(json.dumps(document.tree), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_sentences(error, document, root))) from None


# --------------------------------------------------------------------------------------------------
# The schema as a tree of annotations


def members(annotation: Any) -> tuple[Any, ...]:
    """The kinds that a union admits, None left out; the annotation itself where it is no union."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = tuple(kind for part in get_args(annotation) for kind in members(part))
        return tuple(kind for kind in kinds if kind is not type(None))
    return (annotation,)


def specs(annotation: Any) -> tuple[type[Spec], ...]:
    """The parts of a recipe (`Spec` classes) that an annotation admits."""
    return tuple(kind for kind in members(annotation) if isinstance(kind, type) and issubclass(kind, Spec))


def tag(spec: type[Spec]) -> str | None:
    """The `type:` that chooses this kind of a tagged union."""
    field = spec.model_fields.get("type")
    return None if field is None else str(field.default)


def annotation_at(path: KeyPath, tree: Any, root: type[Spec] = Recipe) -> Any:
    """What the schema says of `path` in this tree; None where it knows no such key."""
    annotation: Any = root
    for part in path:
        annotation = _child(annotation, part, tree)
        tree = _value(tree, part)
    return annotation


def _value(tree: Any, part: str | int) -> Any:
    if isinstance(tree, dict):
        return tree.get(part)
    return tree[part] if isinstance(tree, list) and isinstance(part, int) and part < len(tree) else None


def _chosen(annotation: Any, value: Any) -> type[Spec] | None:
    """Which kind a mapping is: the only one, or the one that its `type` names."""
    kinds = specs(annotation)
    if len(kinds) > 1 and isinstance(value, dict):
        return next((kind for kind in kinds if tag(kind) == value.get("type")), None)
    return kinds[0] if kinds else None


def _child(annotation: Any, part: str | int, value: Any) -> Any:
    kind = _chosen(annotation, value)
    if kind is not None and isinstance(part, str) and part in kind.model_fields:
        return kind.model_fields[part].annotation
    for member in members(annotation):
        arguments = get_args(member)
        if get_origin(member) is tuple and isinstance(part, int):
            return arguments[0] if arguments[-1] is Ellipsis else arguments[min(part, len(arguments) - 1)]
        if get_origin(member) is dict:
            return arguments[1]
    return None


def all_keys(spec: type[Spec] = Recipe, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key of the schema, sections before what is in them."""
    for name, field in spec.model_fields.items():
        yield (*path, name)
        for kind in specs(field.annotation):
            yield from all_keys(kind, (*path, name))


# --------------------------------------------------------------------------------------------------
# Words


def expected(annotation: Any) -> str:
    """What a value may be, in words."""
    words: list[str] = []
    choices: list[str] = []
    for kind in members(annotation):
        if get_origin(kind) is Literal:
            choices += [str(choice) for choice in get_args(kind)]
        elif get_origin(kind) is tuple:
            arguments = get_args(kind)
            count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
            inner = expected(arguments[0]).removeprefix("a ").removeprefix("mapping of keys")
            plural = {"text": "texts", "number": "numbers", "whole number": "whole numbers"}.get(inner)
            words.append(f"a list of {count}{plural}" if plural else "a list")
        elif _is_mapping(kind):
            words.append("a mapping of keys")
        else:
            plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            words.append(plain.get(kind, "a value"))
    if choices:
        words.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
    if type(None) in get_args(annotation):
        words.append("null")
    words = list(dict.fromkeys(words))
    if "a number" in words and "a whole number" in words:
        words.remove("a whole number")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def found(value: Any) -> str:
    """What stood there instead, in words."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "a list" if isinstance(value, list) else "a mapping of keys"


def nearest(key: str, choices: list[str]) -> str | None:
    """The choice that `key` is probably a misspelling of."""
    close = difflib.get_close_matches(key, choices, n=1, cutoff=0.6)
    return close[0] if close else None


def _unknown(path: KeyPath, document: Document, root: type[Spec]) -> str:
    """The sentence about a key that the schema does not have, with the key that was probably meant."""
    key, section = str(path[-1]), path[:-1]
    annotation = annotation_at(section, document.tree, root)
    value = document.tree
    for part in section:
        value = _value(value, part)
    kind = _chosen(annotation, value)
    owners = [other for other in specs(annotation) if key in other.model_fields]
    if owners and kind is not None:
        changed = document.places.get((*section, "type"))
        whole = ""
        if changed is not None and changed.override is not None:
            # The file was written for another kind, and the command line changed the kind alone.
            name = dotted(section)
            whole = f"; remove it, or replace the section with {name}='{{type: {tag(kind)}}}'"
        return f"does not go with type: {tag(kind)}; it belongs to {_kinds(owners)}{whole}"
    foreign = known_key(key) if root is Recipe else None
    if foreign is not None and foreign.target and key != foreign.target.rpartition(".")[2]:
        return f"unknown key; LLaMA-Factory's {key} is {foreign.target} in a native recipe"
    names = list(kind.model_fields) if kind is not None else []
    keys = [known for known in all_keys(root) if "type" not in known]
    elsewhere = [known for known in keys if known[-1] == key]
    if elsewhere:
        return f"unknown key; did you mean {dotted(_likeliest(elsewhere, document, root))}?"
    if foreign is not None and foreign.rule is Rule.REFUSED:
        return f"unknown key; {foreign.text}"
    if foreign is not None and foreign.rule is Rule.EXTRA:
        return f"unknown key; transformers' {key} goes into train.extra"
    near = nearest(key, names)
    if near is not None:
        return f"unknown key; did you mean {dotted((*section, near))}?"
    near = nearest(key, [str(known[-1]) for known in keys])
    if near is not None:
        named = [known for known in keys if known[-1] == near]
        return f"unknown key; did you mean {dotted(_likeliest(named, document, root))}?"
    whole_file = f"a {root.__name__.removesuffix('Spec').lower()} has"
    where = f"{dotted(section)} has" if section else whole_file
    return f"unknown key; {where} {', '.join(names)}"


def _likeliest(keys: list[KeyPath], document: Document, root: type[Spec]) -> KeyPath:
    """Of several keys the first that goes with the kinds that the document has chosen."""
    fitting = [key for key in keys if annotation_at(key, document.tree, root) is not None]
    return (fitting or keys)[0]


def _kinds(owners: list[type[Spec]]) -> str:
    *others, last = (str(tag(owner)) for owner in owners)
    return f"type: {', '.join(others)} or {last}" if others else f"type: {last}"


# --------------------------------------------------------------------------------------------------
# pydantic's errors


def _locate(location: tuple[int | str, ...], tree: Any, root: type[Spec]) -> tuple[KeyPath, Any, Any]:
    """(path, annotation, value) of an error, whose location also names the branches of unions."""
    annotation: Any = root
    path: KeyPath = ()
    in_branch = False
    for part in location:
        # pydantic names the branch that it tried, but not where the other branch is only None.
        if len(members(annotation)) > 1 and not in_branch:
            in_branch = True
            continue
        annotation, tree = _child(annotation, part, tree), _value(tree, part)
        path, in_branch = (*path, part), False
    return path, annotation, tree


def _sentences(error: ValidationError, document: Document, root: type[Spec]) -> list[str]:
    """One line for each problem, in the order of the file."""
    lines: dict[tuple[int, str], None] = {}
    for problem in error.errors(include_url=False):
        path, annotation, value = _locate(problem["loc"], document.tree, root)
        if problem["type"].endswith(("_type", "literal_error")) and _suits(annotation, value):
            continue  # another branch of the union takes such values, and says what is wrong with this one
        if problem["type"] == "extra_forbidden":
            text = _unknown(path, document, root)
        elif path and path[-1] == "[key]":
            path = path[:-1]
            text = _unknown_key_of_mapping(path, document, root)
        else:
            text = _sentence(problem, annotation, value)
        lines[document.place(path).line or 0, document.problem(path, text)] = None
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def _suits(annotation: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_mapping(kind) for kind in members(annotation))
    return isinstance(value, list) and any(get_origin(kind) is tuple for kind in members(annotation))


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, Spec))


def _words(annotation: Any) -> list[str]:
    """The words that an annotation admits where it admits no other plain value."""
    kinds = [kind for kind in members(annotation) if not _is_mapping(kind)]
    literal = bool(kinds) and all(get_origin(kind) is Literal for kind in kinds)
    return [str(choice) for kind in kinds for choice in get_args(kind)] if literal else []


def _unknown_key_of_mapping(path: KeyPath, document: Document, root: type[Spec]) -> str:
    """The sentence about a key of a mapping whose keys are certain words."""
    annotation = annotation_at(path[:-1], document.tree, root)
    kinds = [kind for kind in members(annotation) if get_origin(kind) is dict]
    return f"unknown key; {_choose(str(path[-1]), _words(get_args(kinds[0])[0]))}"


def _sentence(problem: Any, annotation: Any, value: Any) -> str:
    kind = problem["type"]
    if kind == "json_invalid":
        return "a text in it holds half a character (a lone surrogate); write the whole one"
    if kind == "missing":
        return f"is missing; give {expected(annotation)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [str(tag(spec)) for spec in specs(annotation)]
        if not isinstance(value, dict) or "type" not in value:
            return f"type is missing; choose from {', '.join(tags)}"
        return f"type: {value['type']}: no such kind; {_choose(str(value['type']), tags)}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "too_long" or kind == "too_short":
        return f"expected {expected(annotation)}, found {len(value)}"
    if isinstance(value, str) and (words := _words(annotation)):
        return f"{value!r} is none of its values; {_choose(value, words)}"
    if any(mark in kind for mark in _TYPE_ERRORS) or kind in ("model_type", "dict_type", "tuple_type"):
        return f"expected {expected(annotation)}, found {found(value)}{_advice(annotation, value)}"
    message = str(problem["msg"]).removeprefix("Input ")
    return f"{message}, found {found(value)}"


def _choose(value: str, choices: list[str]) -> str:
    near = nearest(value, choices)
    listed = ", ".join(choices)
    return f"did you mean {near}? Choose from {listed}" if near else f"choose from {listed}"


def _advice(annotation: Any, value: Any) -> str:
    kinds = members(annotation)
    if str in kinds and isinstance(value, (int, float)):
        return "; put it in quotes"
    if isinstance(value, str) and any(get_origin(kind) is tuple for kind in kinds):
        return f"; write [{value}]"
    if isinstance(value, str) and ModelSpec in kinds:
        return f"; write {{path: {value}}}"
    if isinstance(value, str) and "$" in value:
        return "; variables are not replaced here"
    return ""
