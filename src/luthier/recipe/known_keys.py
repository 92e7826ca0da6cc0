"""Every key of a LLaMA-Factory file that Luthier knows, in the groups of that tool's own documentation."""

from __future__ import annotations

from luthier.recipe.earlier_keys import EARLIER_KEYS, OLDER_NAMES
from luthier.recipe.finetuning_keys import FINETUNING_KEYS
from luthier.recipe.key_rules import Key
from luthier.recipe.llamafactory_keys import (
    BENCHMARK_KEYS,
    DATA_KEYS,
    EXPORT_KEYS,
    GENERATION_KEYS,
    MODEL_KEYS,
)
from luthier.recipe.training_keys import TRAINING_KEYS

GROUPS: dict[str, dict[str, Key]] = {
    "Model": MODEL_KEYS,
    "Data": DATA_KEYS,
    "Fine-tuning": FINETUNING_KEYS,
    "Training": TRAINING_KEYS,
    "Generation": GENERATION_KEYS,
    "Export": EXPORT_KEYS,
    "Benchmark": BENCHMARK_KEYS,
    "Other versions": EARLIER_KEYS,
}

KEYS: dict[str, Key] = {name: key for group in GROUPS.values() for name, key in group.items()}


def known_key(name: str) -> Key | None:
    """The entry of a key under any of its names."""
    return KEYS.get(OLDER_NAMES.get(name, name))
