"""A LLaMA-Factory file gives the same tokens, targets, row order and first losses as that program gave.

Expected values: `data/llamafactory/*.json`, recorded from LLaMA-Factory 0.9.5; see the README beside them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.arrange import batch_rule
from luthier.data.batching import plan_epoch
from luthier.data.table import SampleTable
from luthier.environment import detect_hardware
from luthier.material import read_material
from luthier.model.load import load_tokenizer, locate
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import resolve
from luthier.recipe.schema import Recipe

CASES = Path(__file__).parent / "data" / "llamafactory"
NAMES = sorted(path.stem for path in CASES.glob("*.yaml"))


def golden(name: str) -> dict[str, Any]:
    tree = json.loads((CASES / f"{name}.json").read_text())
    assert isinstance(tree, dict)
    return tree


def translated(name: str, model: Path, data: Path, output: Path) -> dict[str, Any]:
    text = (CASES / f"{name}.yaml").read_text()
    tree = yaml.safe_load(
        text.replace("MODEL", str(model)).replace("DATA", str(data)).replace("OUTPUT", str(output))
    )
    assert isinstance(tree, dict)
    return tree


def prepared(name: str, model: Path, data: Path, folder: Path) -> tuple[Recipe, SampleTable]:
    """The resolved recipe of a case and its tokenized training rows, made as a run makes them."""
    file = translated(name, model, data, folder / "out")
    settings = resolve(load_recipe(file, [f"data.cache={folder / 'cache'}"]), detect_hardware()).recipe
    tokenizer = load_tokenizer(settings.model, locate(settings.model))
    return settings, read_material(settings, tokenizer, lambda text: None).data.train


@pytest.mark.parametrize("name", NAMES)
def test_same_rows_tokens_and_targets(name: str, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    expected = golden(name)
    settings, table = prepared(name, smollm2, shared_data, tmp_path)
    rows = table.groups if table.groups is not None else [[index] for index in range(len(table))]
    assert len(rows) == expected["tokenized"]["train"]["count"]
    for number, facts in expected["tokenized"]["train"]["rows"].items():
        samples = [table[index] for index in rows[int(number)]]
        ids = [token for sample in samples for token in sample.input_ids.tolist()]
        targets = sum(int((sample.weights > 0).sum()) for sample in samples)
        if settings.stage.type == "pt":
            assert len(ids) == facts["tokens"]
            assert digest([ids, None]) == facts["sha256"]
        elif not settings.data.packing:  # packed rows are padded there
            labels = [
                token if weight > 0 else -100
                for token, weight in zip(ids, samples[0].weights.tolist(), strict=True)
            ]
            assert (len(ids), targets) == (facts["tokens"], facts["targets"])
            assert digest([ids, labels]) == facts["sha256"]
        else:
            assert targets == facts["targets"]

    visited = []
    epoch = 0
    while len(visited) < len(expected["steps"]):
        plan = plan_epoch(
            table.lengths,
            rule=batch_rule(settings),
            epoch=epoch,
            seed=settings.train.data_seed or 42,
            groups=table.groups,
        )
        visited += [plan[step][0] for step in range(len(plan))]
        epoch += 1
    where = {index: number for number, members in enumerate(rows) for index in members}
    for step, passes in zip(expected["steps"], visited, strict=False):
        ours = [list(dict.fromkeys(where[index] for index in batch)) for batch in passes]
        assert ours == step["rows"]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"),
    [("sft_lora", 3), ("sft_full", 2), ("sft_freeze", 3), ("sft_neat_packing", 1), ("pt_lora", 2)],
)
def test_same_first_losses(name: str, steps: int, smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """Warm-up is one step in these cases, so a shorter run has the same learning rates in its first two steps,
    and those decide the first three losses."""
    expected = golden(name)["steps"][:steps]
    file = tmp_path / "their.yaml"
    tree = translated(name, smollm2, shared_data, tmp_path / "out")
    tree.pop("warmup_ratio")
    file.write_text(yaml.safe_dump(tree | {"max_steps": steps, "warmup_steps": 1}))
    luthier.train(file, [f"data.cache={tmp_path / 'cache'}"], quiet=True)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    lines = [line for line in history if "loss" in line]
    rates = [step["learning_rate"] for step in expected[:2]]
    assert [line["learning_rate"] for line in lines[:2]] == pytest.approx(rates)
    factors = [1.0] * steps
    if name == "pt_lora":
        factors = divided_by_all_labels(expected, prepared(name, smollm2, shared_data, tmp_path)[1])
    losses = [step["loss"] * factor for step, factor in zip(expected, factors, strict=True)]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=2e-5)
    norms = [step["grad_norm"] * factor for step, factor in zip(expected, factors, strict=True)]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=5e-4)


def divided_by_all_labels(steps: list[dict[str, Any]], table: SampleTable) -> list[float]:
    """What undoes that program's division of pre-training losses by all labels, first tokens included.

    Nothing predicts a first token; the token mean divides by the predicted ones, as later transformers do.
    """
    factors = []
    for step in steps:
        weights = [table[row].weights > 0 for batch in step["rows"] for row in batch]
        factors.append(sum(int(w.sum()) for w in weights) / sum(int(w[1:].sum()) for w in weights))
    return factors
