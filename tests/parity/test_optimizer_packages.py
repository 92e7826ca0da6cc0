"""Own optimizers against what their authors' packages gave: `data/optimizers.json`, recorded once.

galore-torch 1.0, apollo-torch 1.0.3, schedulefree 1.4.1 and adam-mini 1.1.1 on torch 2.13, CPU: six steps on a tall and a
wide matrix with gradients that are in the file. No weight decay where a package applies it after the update and we before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.optim.adam_mini import AdamMini
from luthier.optim.apollo import Apollo
from luthier.optim.galore import GaLore
from luthier.optim.schedule_free import ScheduleFreeAdamW

RECORD: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "optimizers.json").read_text(encoding="utf-8")
)
ADAM = {"lr": RECORD["lr"], "betas": (0.9, 0.999), "eps": 1e-8}
LOW_RANK = {"rank": 2, "update_every": 3}


def optimizer_of(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    kind, _, variant = name.partition("_")
    group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0}
    if kind == "galore":
        # The package adds eps before the bias correction, so both take one that is nothing.
        return GaLore([group | LOW_RANK | {"scale": 0.5, "side": variant}], ADAM | {"eps": 1e-12})
    if kind == "apollo":
        scale_type, place = variant.split("_")
        how = {"scale": 4.0, "side": "std", "projection": "svd", "scale_type": scale_type, "seed": 0}
        return Apollo([group | LOW_RANK | how | {"scale_front": place == "front"}], ADAM | {"eps": 1e-12})
    group["weight_decay"] = 0.1
    if name == "schedule_free":
        return ScheduleFreeAdamW([group], ADAM | {"r": 0.0, "weight_lr_power": 2.0})
    return AdamMini([group], ADAM, {id(parameter): parameter.shape[1] for parameter in parameters})


@pytest.mark.parametrize("name", RECORD["results"])
def test_the_package_gives_the_same(name: str) -> None:
    parameters = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in RECORD["values"].items()}
    optimizer = optimizer_of(name, list(parameters.values()))
    for step in range(len(RECORD["grads"]["tall"])):
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(RECORD["grads"][key][step])
        optimizer.step()
    if isinstance(optimizer, ScheduleFreeAdamW):
        optimizer.eval()
    for key, parameter in parameters.items():
        expected = torch.tensor(RECORD["results"][name][key])
        moved = float((expected - torch.tensor(RECORD["values"][key])).abs().max())
        assert moved > 1e-3
        # Projected on both sides by its own vectors a gradient is diagonal; Adam makes its rounding errors visible.
        near = 1e-3 if name == "galore_full" else 1e-4
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=near * moved)
