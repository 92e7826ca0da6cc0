"""The processes of a LLaMA-Factory file: DeepSpeed, FSDP, and how long they wait for each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.recipe.flat import Flat
from luthier.recipe.sharding_keys import Values, fsdp_options, fsdp_values

A_DAY = 86_400
"""Seconds. Files ask for more where others would wait for the preparation of the data; nobody waits for it here."""


def read_processes(flat: Flat) -> None:
    """`parallel` of the recipe."""
    if flat.given("deepspeed") and flat.get("deepspeed") and _fsdp_words(flat):
        flat.problem("fsdp", "and deepspeed divide the same weights; keep one")
    elif flat.get("deepspeed"):
        flat.put("parallel.type", "deepspeed", "deepspeed")
        flat.put("parallel.config", flat.get("deepspeed"), "deepspeed")
    elif words := _fsdp_words(flat):
        _read_fsdp(flat, words)
    if flat.given("ddp_timeout") and 0 < flat.number("ddp_timeout") <= A_DAY:
        if "parallel" not in flat.native.tree:
            flat.put("parallel.type", "ddp", "ddp_timeout")
        flat.put("parallel.timeout", int(flat.number("ddp_timeout")), "ddp_timeout")


def _fsdp_words(flat: Flat) -> list[str]:
    value = flat.get("fsdp")
    if not value:
        return []
    if value is True:
        return ["full_shard"]
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        flat.problem("fsdp", "expected words such as full_shard auto_wrap")
        return []
    return words


def _read_fsdp(flat: Flat, words: list[str]) -> None:
    values = fsdp_options(words, flat.problem)
    config: Any = flat.get("fsdp_config") or {}
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            flat.problem("fsdp_config", f"{config} cannot be read: {error}")
            return

    def problem(key: str, text: str) -> None:
        flat.problem("fsdp_config", f"{key}: {text}")

    settings: Values = values | fsdp_values(config, problem)
    for target, value in settings.items():
        if target == "model.gradient_checkpointing":
            flat.put(target, value, "fsdp_config")
        else:
            flat.put(target, value, "fsdp_config" if target not in values else "fsdp")
