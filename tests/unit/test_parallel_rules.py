"""What `parallel: fsdp2` refuses, and that it says why before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.types import RecipeError

BASE: dict[str, Any] = {
    "model": {"path": "tiny"},
    "data": {"train": ["made"]},
    "train": {"output": "run"},
    "parallel": {"type": "fsdp2"},
}


def resolved(processes: int, **sections: dict[str, Any]) -> None:
    recipe = {
        name: {**BASE.get(name, {}), **sections.get(name, {})} for name in BASE.keys() | sections.keys()
    }
    hardware = Hardware("cpu", "a processor", 2**33, True, 2, world_size=processes)
    resolve(load_recipe(recipe), hardware)


REFUSED: dict[str, tuple[int, dict[str, dict[str, Any]], str]] = {
    "answers": (2, {"stage": {"type": "grpo", "rewards": [{"type": "length", "most": 9}]}}, "stage: grpo"),
    "head in pieces": (2, {"stage": {"type": "sft", "loss": "asft"}}, "stage.loss: asft"),
    "adapter": (2, {"method": {"type": "peft", "config": {"peft_type": "LOHA"}}}, "method.type: peft"),
    "offload in fp16": (
        2,
        {"parallel": {"cpu_offload": True}, "train": {"precision": "fp16"}},
        "train.precision: fp16",
    ),
    "compiled": (2, {"train": {"compile": {}}}, "train.compile"),
    "offload alone": (1, {"parallel": {"cpu_offload": True}}, "cpu_offload needs several processes"),
    "types alone": (1, {"parallel": {"param_dtype": "bfloat16"}}, "param_dtype needs several processes"),
    **{
        name: (2, {"optim": {"type": name}}, f"optim.type: {name}")
        for name in ("adafactor", "muon", "galore", "apollo", "badam", "badam_ratio", "adam_mini")
    },
    "8 bits": (2, {"optim": {"type": "adamw", "bits": 8}}, "optim.type: adamw"),
    "paged": (2, {"optim": {"type": "lion", "paged": True}}, "optim.type: lion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused(name: str) -> None:
    processes, sections, said = REFUSED[name]
    with pytest.raises(RecipeError, match=said):
        resolved(processes, **sections)


@pytest.mark.parametrize("optim", ["adamw", "sgd", "lion", "schedule_free"])
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "oft", "vera", "ia3", "miss"])
def test_what_is_proven_is_not(optim: str, method: str) -> None:
    resolved(2, optim={"type": optim}, method={"type": method})


def test_one_process_trains_as_it_always_does() -> None:
    """Whatever it is that two could not divide."""
    resolved(1, optim={"type": "muon"})
