"""The claim that a resumed run is the uninterrupted one, by two short runs of the recipe itself."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from safetensors.torch import load_file

from luthier.recipe.optim import AT_EVALUATIONS
from luthier.recipe.schema import OnlineSpec
from luthier.run import train
from luthier.selfcheck.bench import Bench
from luthier.selfcheck.outcome import Outcome
from luthier.selfcheck.rollout_checks import LONGEST
from luthier.trainer.plugins import anywhere

STEPS, AT = 4, 2
NOISE = 5.0
"""A NEFTune strength where the recipe draws nothing random: generators that are not restored must show."""


def resumed(bench: Bench) -> Outcome:
    """Four steps in one go, and two steps, a checkpoint and two more, end with the same bits."""
    straight = train(_short(bench, "straight"), quiet=True).output
    again = bench.folder / "resumed"
    again.mkdir()
    for name in ("recipe.yaml", "trainer_log.jsonl"):
        shutil.copy(straight / name, again / name)
    shutil.copytree(straight / f"checkpoint-{AT}", again / f"checkpoint-{AT}")
    train(_short(bench, "resumed", resume="auto"), quiet=True)
    first, second = _weights(straight), _weights(again)
    claim = "resumed = straight"
    if first.keys() != second.keys():
        return Outcome("resumed", claim, float("inf"), 0.0, "", "other weights were saved")
    measured = max(float((second[name].double() - first[name].double()).abs().max()) for name in first)
    # On a GPU some backward kernels add in an order that differs from run to run.
    bound = 0.0 if bench.hardware.device == "cpu" or bench.settings.train.deterministic else 1e-4
    detail = f"{len(first)} tensors after {STEPS} steps, one run stopped after {AT}"
    return Outcome("resumed", claim, measured, bound, "in a weight", detail)


def _short(bench: Bench, name: str, resume: str = "never") -> dict[str, Any]:
    """The recipe, for a few steps into a folder of its own, reporting to nobody."""
    tree: dict[str, Any] = bench.settings.model_dump(mode="json")
    if (function := bench.settings.optim.schedule_function) is not None:
        tree["optim"]["schedule_function"] = anywhere(function, bench.beside)  # the tree stands in no folder
    elif bench.settings.optim.schedule in AT_EVALUATIONS:  # of which there are none here
        tree["optim"] |= {"schedule": "constant", "schedule_options": {}}
    tree["data"] |= {"eval": [], "dev_split": 0.0, "max_lost": None}
    online = isinstance(bench.settings.stage, OnlineSpec)
    if online:  # what is drawn must come back, and needs not be long for that
        longest = bench.settings.generation.max_new_tokens or LONGEST
        tree["generation"]["max_new_tokens"] = min(longest, LONGEST)
        for reward in tree["stage"]["rewards"]:
            if reward["type"] == "function":
                reward["path"] = anywhere(reward["path"], bench.beside)
    tree["train"] |= {
        "output": str(bench.folder / name),
        "resume": resume,
        "overwrite": False,
        "max_steps": STEPS,
        "save_every": AT,
        "save_total_limit": None,
        "save_only_model": False,
        "log_every": 1,
        "eval_every": None,
        "eval_only": False,
        "load_best": False,
        "early_stopping": None,
        "metrics": [],
        "callbacks": [],
        "report_to": [],
        "plots": False,
        "push_to_hub": None,
        "neftune_alpha": 0.0 if online else bench.settings.train.neftune_alpha or NOISE,
    }
    return tree


def _weights(run: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(run.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
