"""Parameter groups by pattern: first match wins, the method's own learning rates stay, schedules scale each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import luthier
from luthier.methods.groups import decay_groups
from luthier.optim.build import build_optimizer
from luthier.optim.groups import cut_groups
from luthier.optim.schedule import build_schedule
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import AdamwSpec, GroupSpec
from luthier.types import RecipeError
from tests.optimizers import CASES, WITHOUT_FORMULA, give_gradients
from tests.tiny import chat_model, tiny_model, write_alpaca


def settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of every parameter by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
    return found


def spec_of(*rules: dict[str, Any]) -> AdamwSpec:
    return AdamwSpec(lr=0.5, groups=[GroupSpec(**rule) for rule in rules])


def test_the_first_match_wins() -> None:
    model = tiny_model("llama")
    spec = spec_of(
        {"match": r"layers\.1\.", "lr": 0.1},
        {"match": r"layers\.\d\.self_attn", "lr_scale": 3.0, "weight_decay": 0.7},
        {"match": "norm", "weight_decay": 0.2},
    )
    found = settings(model, cut_groups(spec, decay_groups(model, 0.01), model))
    assert found["model.layers.1.self_attn.q_proj.weight"] == (0.1, 0.01)
    assert found["model.layers.1.input_layernorm.weight"] == (0.1, 0.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (1.5, 0.7)
    assert found["model.layers.0.input_layernorm.weight"] == (0.5, 0.2)
    assert found["model.norm.weight"] == (0.5, 0.2)
    assert found["model.layers.0.mlp.up_proj.weight"] == found["lm_head.weight"] == (0.5, 0.01)


def test_a_method_s_learning_rate_stays_and_is_scaled() -> None:
    model = tiny_model("llama")
    heads, others = [model.lm_head.weight], [p for n, p in model.named_parameters() if n != "lm_head.weight"]
    groups = [
        {"params": others, "weight_decay": 0.0},
        {"params": heads, "weight_decay": 0.0, "lr": 8.0},
    ]
    assert settings(model, cut_groups(spec_of(), groups, model))["lm_head.weight"] == (8.0, 0.0)
    scaled = cut_groups(spec_of({"match": "lm_head|mlp", "lr_scale": 0.5}), groups, model)
    assert settings(model, scaled)["lm_head.weight"] == (4.0, 0.0)
    assert settings(model, scaled)["model.layers.0.mlp.up_proj.weight"] == (0.25, 0.0)
    assert groups[1]["lr"] == 8.0


def test_a_tied_parameter_has_all_its_names() -> None:
    model = tiny_model("llama-tied")
    for match in ("lm_head", "embed_tokens"):
        found = settings(
            model, cut_groups(spec_of({"match": match, "lr": 0.1}), decay_groups(model, 0.0), model)
        )
        assert found["model.embed_tokens.weight"] == (0.1, 0.0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"match": "lora_A", "lr": 0.1}],
            r"optim\.groups\[0\]\.match='lora_A': no parameter that trains has such a name",
        ),
        (
            [{"match": "mlp", "lr": 0.1}, {"match": "up_proj", "lr": 0.2}],
            r"optim\.groups\[1\]\.match='up_proj': earlier entries match all that it matches",
        ),
    ],
)
def test_an_entry_that_decides_nothing_is_an_error(rules: list[dict[str, Any]], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match=message):
        cut_groups(spec_of(*rules), decay_groups(model, 0.0), model)


def test_frozen_parameters_match_nothing() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    with pytest.raises(RecipeError, match="no parameter that trains"):
        cut_groups(spec_of({"match": "lm_head", "lr": 0.1}), decay_groups(model, 0.0), model)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{match: '(', lr: 1}", "'(' is no regular expression"),
        ("{match: a, lr: 1, lr_scale: 2}", "give lr or lr_scale, not both"),
        ("{match: a}", "give lr, lr_scale or weight_decay"),
    ],
)
def test_entries_that_say_nothing(entry: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: [a]}}\noptim: {{groups: [{entry}]}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value) and "r.yaml:3" in str(caught.value)


@pytest.mark.parametrize("name", CASES | WITHOUT_FORMULA)
def test_every_optimizer_and_schedule_respects_the_groups(name: str) -> None:
    """A group whose rate is 0 stays where it is, another moves; the schedule scales both rates by one factor."""
    case = (CASES | WITHOUT_FORMULA)[name]
    if not case.installed:
        pytest.skip(f"{case.needs} is not installed")
    model = tiny_model("llama")
    rules = [{"match": r"q_proj|input_layernorm|down_proj", "lr": 0.0}, {"match": "k_proj", "lr_scale": 0.5}]
    spec = case.spec.model_copy(
        update={"groups": [GroupSpec(**rule) for rule in rules], "schedule": "linear"}
    )
    optimizer = build_optimizer(spec, decay_groups(model, 0.1), model)
    schedule = build_schedule(spec, optimizer, 10)
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    rates = []
    for step in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for key, parameter in model.named_parameters():
        still = any(part in key for part in ("q_proj", "input_layernorm", "down_proj"))
        # BAdam leaves what is outside its blocks alone, in ratio mode embeddings and head
        outside = name.startswith("badam") and ".layers." not in key
        if not outside:
            assert torch.equal(parameter, start[key]) == still, key
    assert {round(rate / spec.lr, 6) for rate in rates[0]} == {0.0, 0.5, 1.0}
    for step, line in enumerate(rates):
        assert line == pytest.approx([rate * (10 - step) / 10 for rate in rates[0]])


def test_groups_through_a_run(tmp_path: Path) -> None:
    """With LoRA: a rate of 0 for B leaves the adapter's product at zero. What matches nothing leaves nothing behind."""
    base = chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 8)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": {"type": "lora", "rank": 2},
        "optim": {"lr": 0.01, "groups": [{"match": r"lora_B", "lr": 0.0}]},
        "train": {"max_steps": 2, "save_every": None, "plots": False, "output": str(tmp_path / "run")},
    }
    from safetensors.torch import load_file

    saved = load_file(luthier.train(recipe, quiet=True).output / "adapter_model.safetensors")
    assert all(not tensor.any() for key, tensor in saved.items() if "lora_B" in key)
    recipe["optim"]["groups"] = [{"match": "lora_C", "lr": 0.0}]
    recipe["train"]["output"] = str(tmp_path / "refused")
    with pytest.raises(RecipeError, match=r"optim\.groups\[0\]"):
        luthier.train(recipe, quiet=True)
    assert not (tmp_path / "refused").exists()
