"""Files that are often given in a recipe's place, recognised so that the message says what they are."""

from __future__ import annotations

from typing import Any

from luthier.recipe.earlier_keys import OLDER_NAMES
from luthier.recipe.known_keys import KEYS
from luthier.recipe.schema import Recipe
from luthier.types import RecipeError

_SIGNS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"compute_environment", "distributed_type"}),
        "configures accelerate, it is no recipe; give the file that names model and data",
    ),
    (
        frozenset({"zero_optimization", "train_micro_batch_size_per_gpu"}),
        "configures DeepSpeed, it is no recipe; give the file that names model and data",
    ),
    (frozenset({"peft_type"}), "describes an adapter, it is no recipe; name its folder in method.adapters"),
    (
        frozenset({"architectures", "model_type"}),
        "describes a model, it is no recipe; name its folder in model.path",
    ),
)
_V1 = frozenset(
    {"dist_config", "kernel_config", "micro_batch_size", "model_class", "peft_config", "train_dataset"}
)
_DATA_SETS = frozenset(
    {"cloud_file_name", "file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"}
)


def refuse_foreign(tree: dict[str, Any], label: str | None) -> None:
    """Raises RecipeError for a mapping that is some other tool's file, or nothing that could be a recipe."""
    text = _what_it_is(tree)
    if text is not None:
        raise RecipeError(f"{label}: {text}" if label else text)


def _what_it_is(tree: dict[str, Any]) -> str | None:
    for signs, text in _SIGNS:
        if signs & set(tree):
            return text
    if isinstance(tree.get("model"), str) and _V1 & set(tree):
        return (
            "LLaMA-Factory's v1 form is not read; "
            "write model_name_or_path, dataset and finetuning_type as in its other examples"
        )
    entries = list(tree.values())
    if entries and all(isinstance(entry, dict) and _DATA_SETS & set(entry) for entry in entries):
        return "describes data sets, it is no recipe; name its folder in data.directory"
    known = Recipe.model_fields.keys() | KEYS.keys() | OLDER_NAMES.keys()
    if not known & set(tree) and all(isinstance(entry, str) for entry in entries):
        return "is no recipe: it has neither model (a native recipe) nor model_name_or_path (a LLaMA-Factory file)"
    return None
