"""A trainer on a tiny model, put together as `luthier.run` does, from samples instead of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from luthier import arrange
from luthier.assemble import begin_adapter
from luthier.data.encode import EncodeOptions
from luthier.data.packing import best_fit
from luthier.data.prepare import PreparedData
from luthier.data.table import SampleTable
from luthier.data.template import ChatTemplate
from luthier.methods import build_method
from luthier.methods.lora import Lora
from luthier.model.load import ModelSource
from luthier.model.logprobs import install_target_forward
from luthier.model.neftune import EmbeddingNoise
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.recipe.schema import Recipe
from luthier.references import live_reference
from luthier.stages import build_stage
from luthier.trainer.arguments import training_arguments
from luthier.trainer.compilation import compile_layers
from luthier.trainer.memory import FitMemory
from luthier.trainer.metrics import Metric
from luthier.trainer.precision import AUTOCAST
from luthier.trainer.trainer import PeftTrainer
from luthier.types import Sample
from tests.tiny import chat_tokenizer

NO_FILES = ModelSource("tiny", local=True)
CPU = Hardware("cpu", "a processor", 2**33, True, 2)


def recipe_of(output: Path, **sections: Mapping[str, Any]) -> Recipe:
    """A resolved recipe for this machine's CPU; nothing is saved or drawn unless a section says so."""
    train = {
        "output": str(output),
        "log_every": 1,
        "save_every": None,
        "plots": False,
        **sections.get("train", {}),
    }
    data = {"train": ["made"], **sections.get("data", {})}
    rest = {name: dict(section) for name, section in sections.items() if name not in ("train", "data")}
    return resolve(load_recipe({"model": {"path": "tiny"}, "data": data, "train": train, **rest}), CPU).recipe


def trainer_of(
    recipe: Recipe,
    model: PreTrainedModel,
    samples: Sequence[Sample],
    eval_samples: Mapping[str, Sequence[Sample]] | None = None,
    metrics: Sequence[Metric] = (),
    say: Callable[[str], None] = lambda text: None,
    resumed: Path | None = None,
) -> PeftTrainer:
    """The trainer of a resolved recipe over these samples, on this model; `resumed` is the checkpoint to go on from."""
    set_seed(recipe.train.seed)
    method = build_method(recipe.method)
    trained = method.apply(model)
    install_target_forward(trained.get_base_model() if isinstance(trained, PeftModel) else trained)
    table = SampleTable.of_mixed(list(samples))
    if recipe.data.packing:
        table = table.with_groups(best_fit(table.lengths.tolist(), recipe.data.max_length))
    sets = {name: SampleTable.of_mixed(list(rows)) for name, rows in (eval_samples or {}).items()}
    stage = build_stage(recipe.stage, EncodeOptions.of(recipe.data, recipe.stage.type))
    unused = cast(ChatTemplate, None)
    material = arrange.Material(unused, stage, PreparedData(table, sets, [], {}))
    if isinstance(method, Lora):
        begin_adapter(recipe, NO_FILES, torch.device("cpu"), trained, method, material, resumed, say)
    if recipe.train.neftune_alpha:
        EmbeddingNoise(trained, recipe.train.neftune_alpha)
    if recipe.train.compile is not None:
        compile_layers(trained, recipe.train.compile)
    steps = arrange.training_steps(recipe, material, 1, 0)
    return PeftTrainer(
        model=trained,
        args=training_arguments(recipe, use_cpu=True),
        stage=stage,
        method=method,
        optim=recipe.optim,
        steps=steps,
        eval_sets=arrange.eval_sets(recipe, material, 1),
        tokenizer=chat_tokenizer(),
        callbacks=[],
        metrics=metrics,
        eval_arithmetic=AUTOCAST[recipe.train.eval_precision],
        fit_memory=FitMemory(steps, say) if recipe.train.fit_memory and steps is not None else None,
        reference=live_reference(recipe, CPU, trained, material),
    )


def history(trainer: Any, key: str) -> list[float]:
    """What was logged under `key`, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, under the names that it has without PEFT's or our wrapper."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_weights(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor], relative: float
) -> None:
    """Both moved from `start` by the same: within `relative` of the largest movement."""
    assert actual.keys() == expected.keys() == start.keys()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert moved > 0
    for name, weight in expected.items():
        difference = float((actual[name] - weight).abs().max())
        assert difference <= relative * moved, f"{name}: {difference:.3g} of {moved:.3g}"
    assert all(torch.isfinite(weight).all() for weight in actual.values())
