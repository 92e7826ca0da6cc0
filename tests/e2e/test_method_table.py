"""Every training method, and what must hold of each: a new row of the table inherits every check."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from luthier.errors import LuthierError
from luthier.methods import METHODS, build_method
from luthier.methods.adapter import Adapter
from luthier.methods.groups import count_parameters
from luthier.methods.lora import Lora, lora_layers
from luthier.model.reference import AdaptersOff
from luthier.recipe.schema import LoraSpec, Recipe
from luthier.trainer.trainer import PeftTrainer
from tests.tiny import VOCAB, random_samples, tiny_model
from tests.training import history, recipe_of, trainer_of

HIDDEN, INNER, KV, LAYERS, EXPERTS, EXPERT = 32, 48, 16, 2, 4, 16
SHAPES = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, KV), "v": (HIDDEN, KV), "o": (HIDDEN, HIDDEN)}
SHAPES |= {"gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
"""Inputs and outputs of the linear layers of a decoder layer of the tiny Llama."""
INPUTS = sum(inputs for inputs, _ in SHAPES.values())
OUTPUTS = sum(outputs for _, outputs in SHAPES.values())
BLOCK = sum(inputs * outputs for inputs, outputs in SHAPES.values()) + 2 * HIDDEN
LORA = LAYERS * 4 * (INPUTS + OUTPUTS)
"""Rank 4 on every linear layer."""
LINEAR = r"layers\.\d+\.(self_attn|mlp)\."

IDS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
SAMPLES = random_samples([9, 14, 7, 11, 8, 12], seed=3)


@dataclass(frozen=True)
class Case:
    """A row: the recipe's method, how many numbers train by a closed form, and the names of all that may."""

    method: Mapping[str, Any]
    trainable: int | Callable[[nn.Module], int]
    trains: str
    """A regular expression in the full name of every parameter that trains."""
    family: str = "llama"
    lr: float = 1e-2
    merges: bool = True
    base_stays: bool = True
    """Whether the model with its adapters off is the untouched base."""
    starts: float = 0.0
    """How far the logits may be from those of the base before the first step."""
    tolerance: float = 1e-4
    others: Mapping[str, Any] = field(default_factory=dict)


def lora(
    trainable: int | Callable[[nn.Module], int] = LORA,
    trains: str = rf"{LINEAR}.*lora_[AB]\.default",
    **fields: Any,
) -> Case:
    row = {name: fields.pop(name) for name in list(fields) if name in Case.__dataclass_fields__}
    return Case({"type": "lora", "rank": 4, **fields}, trainable, trains, **row)


def redistributed(model: nn.Module) -> int:
    """R (I + O) of every layer, by the ranks that its adapter's configuration tells; they add up to rank 4 each."""
    config: Any = model.peft_config["default"]  # type: ignore[index]
    adapted = {name.removeprefix("base_model.model."): layer for name, layer in lora_layers(model).items()}
    ranks = {name: config.rank_pattern.get(name, config.r) for name in adapted}
    assert sum(ranks.values()) == LAYERS * len(SHAPES) * 4
    assert max(ranks.values()) > 4 and max(ranks.values()) <= 8
    return sum(rank * sum(SHAPES[name.rsplit(".", 1)[-1].split("_")[0]]) for name, rank in ranks.items())


def peft(trainable: int, part: str, starts: float = 0.0, merges: bool = True, **config: Any) -> Case:
    return Case(
        {"type": "peft", "config": config}, trainable, rf"{LINEAR}.*{part}", starts=starts, merges=merges
    )


def oft_numbers(block: int) -> int:
    """A skew-symmetric matrix for every block of inputs."""
    return LAYERS * sum(inputs // block * block * (block - 1) // 2 for inputs, _ in SHAPES.values())


CASES: dict[str, Case] = {
    "full": Case(
        {"type": "full"}, LAYERS * BLOCK + 2 * VOCAB * HIDDEN + HIDDEN, r"layers|embed_tokens|lm_head|norm"
    ),
    "full-frozen": Case(
        {"type": "full", "frozen": ["embed_tokens", r"layers\.0\.mlp", "norm"]},
        LAYERS * (BLOCK - 2 * HIDDEN) - 3 * HIDDEN * INNER + VOCAB * HIDDEN,
        r"layers\.\d+\.self_attn|layers\.1\.mlp|lm_head",
    ),
    "full-frozen-tied": Case(  # one matrix, frozen by the name of the head
        {"type": "full", "frozen": ["lm_head"]}, LAYERS * BLOCK + HIDDEN, r"layers|norm", family="llama-tied"
    ),
    "freeze": Case({"type": "freeze", "layers": 1}, BLOCK, r"layers\.1\."),
    "freeze-trains": Case(
        {
            "type": "freeze",
            "layers": 0,
            "trains": [r"layers\.\d+\.mlp\.(up|down)_proj", r"layers\.1\..*q_proj"],
        },
        LAYERS * 2 * HIDDEN * INNER + HIDDEN * HIDDEN,
        r"mlp\.(up|down)_proj|layers\.1\.self_attn\.q_proj",
    ),
    "freeze-patterns": Case(
        {"type": "freeze", "layers": 1, "trains": [r"^model\.norm\."], "frozen": ["_layernorm"]},
        BLOCK - 2 * HIDDEN + HIDDEN,
        r"layers\.1\.(self_attn|mlp)|^model\.norm",
    ),
    "freeze-tied": Case(
        {"type": "freeze", "layers": 1, "trains": ["lm_head"]},
        BLOCK + VOCAB * HIDDEN,
        r"layers\.1\.|embed_tokens",
        family="llama-tied",
    ),
    "llama_pro": Case({"type": "llama_pro", "blocks": 2}, 2 * BLOCK, r"layers\.[13]\."),
    "llama_pro-one": Case({"type": "llama_pro", "blocks": 1}, BLOCK, r"layers\.2\."),
    "llama_pro-mlp": Case(
        {"type": "llama_pro", "blocks": 2, "modules": ["mlp"]}, 2 * 3 * HIDDEN * INNER, r"layers\.[13]\.mlp"
    ),
    "lora": lora(),
    "lora-dropout": lora(dropout=0.2),
    "rslora": lora(rslora=True),
    "dora": lora(LORA + LAYERS * OUTPUTS, rf"{LINEAR}.*lora_([AB]|magnitude_vector)\.default", dora=True),
    "gaussian": lora(init="gaussian"),
    "orthogonal": lora(init="orthogonal", starts=1e-4),
    "pissa": lora(init="pissa", starts=1e-4),
    "pissa-fast": lora(init="pissa", init_iterations=4, starts=1e-4),
    "pissa-rslora": lora(init="pissa", rslora=True, dropout=0.1, starts=1e-4),
    "pissa-gpt2": lora(
        LAYERS * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)),
        r"h\.\d+\.(attn|mlp)\..*lora_[AB]\.default",
        family="gpt2",
        init="pissa",
        starts=1e-4,
    ),
    "olora": lora(init="olora", starts=1e-4),
    "eva": lora(init="eva", eva_rho=1.0),
    "eva-rho": lora(redistributed, init="eva", eva_rho=2.0, calibration_samples=4),
    "eva-lora-fa": lora(
        LAYERS * 4 * OUTPUTS, rf"{LINEAR}.*lora_B\.default", freeze_a=True, init="eva", eva_rho=1.0
    ),
    "corda-ipm": lora(init="corda", starts=1e-4),
    "corda-kpm": lora(init="corda", corda_mode="kpm", starts=1e-4),
    "corda-gpt2": lora(
        LAYERS * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)),
        r"h\.\d+\.(attn|mlp)\..*lora_[AB]\.default",
        family="gpt2",
        init="corda",
        starts=1e-4,
    ),
    "lora-fa": lora(LAYERS * 4 * OUTPUTS, rf"{LINEAR}.*lora_B\.default", freeze_a=True),
    "pissa-lora-fa": lora(
        LAYERS * 4 * OUTPUTS, rf"{LINEAR}.*lora_B\.default", freeze_a=True, init="pissa", starts=1e-4
    ),
    "lora-plus": lora(lora_plus_ratio=4.0, lr=3e-3),
    "layers": lora(LORA // 2, r"layers\.1\..*lora_[AB]\.default", layers=[1]),
    "patterns": lora(
        LORA + LAYERS * (2 - 4) * (HIDDEN + HIDDEN), rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3.0}
    ),
    "pissa-patterns": lora(
        LORA + LAYERS * (2 - 4) * (HIDDEN + HIDDEN),
        init="pissa",
        starts=1e-4,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"k_proj": 3.0},
    ),
    "bias": lora(
        LORA + LAYERS * (HIDDEN + 2 * KV),
        rf"{LINEAR}.*(lora_[AB]\.default|bias)",
        family="qwen2",
        bias="lora_only",
        base_stays=False,
    ),
    "experts": lora(
        LAYERS * EXPERTS * 4 * ((HIDDEN + 2 * EXPERT) + (EXPERT + HIDDEN)) + LAYERS * 4 * (2 * HIDDEN),
        r"(experts|q_proj).*lora_[AB]\.default",
        family="qwen3-moe",
        lr=3e-2,
        targets=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "tokens": lora(
        LORA + 2 * 3 * HIDDEN,
        rf"{LINEAR}.*lora_[AB]\.default|(embed_tokens|lm_head).*trainable_tokens_delta",
        trainable_tokens=[5, 6, 40],
        starts=1e-5,
    ),
    "oft": Case({"type": "oft", "block_size": 8}, oft_numbers(8), rf"{LINEAR}.*oft_R\.default"),
    "oft-exact": Case(
        {"type": "oft", "block_size": 4, "neumann_terms": None}, oft_numbers(4), rf"{LINEAR}.*oft_R\.default"
    ),
    "vera": Case(
        {"type": "vera", "rank": 8},
        LAYERS * (len(SHAPES) * 8 + OUTPUTS),
        rf"{LINEAR}.*vera_lambda_[bd]\.default",
        lr=5e-2,
    ),
    "ia3": Case(
        {"type": "ia3"}, LAYERS * (2 * KV + INNER), r"(k_proj|v_proj|down_proj)\.ia3_l\.default", lr=5e-2
    ),
    "miss": Case({"type": "miss", "rank": 4}, LAYERS * 4 * OUTPUTS, rf"{LINEAR}.*miss_block\.default"),
    "miss-bat": Case(
        {"type": "miss", "rank": 4, "init": "bat"}, LAYERS * 4 * OUTPUTS, rf"{LINEAR}.*miss_block\.default"
    ),
    "peft-loha": peft(2 * LORA, r"hada_w[12]_[ab]\.default", peft_type="LOHA", r=4),
    "peft-hra": peft(
        LAYERS * 4 * INPUTS, r"hra_u\.default", starts=1e-4, peft_type="HRA", r=4, target_modules="all-linear"
    ),
    "peft-delora": peft(
        LORA + LAYERS * len(SHAPES), r"delora_(A|B|lambda)\.default", peft_type="DELORA", r=4
    ),
    "peft-ln_tuning": Case(
        {"type": "peft", "config": {"peft_type": "LN_TUNING"}},
        (2 * LAYERS + 1) * HIDDEN,
        r"norm\.ln_tuning_layers\.default",
        lr=5e-2,
    ),
}


@dataclass(frozen=True)
class Run:
    """A finished training in memory: the model before and after, and where its checkpoints are."""

    recipe: Recipe
    trainer: PeftTrainer
    before: dict[str, Tensor]
    folder: Path

    @property
    def model(self) -> nn.Module:
        return self.trainer.model  # type: ignore[return-value]

    @property
    def method(self) -> Any:
        return self.trainer.method


def recipe_for(case: Case, output: Path) -> Recipe:
    train = {"epochs": 4, "rows_per_device": 2, "accumulation": 1, "save_every": 4, "seed": 5}
    optim = {"type": "adamw", "lr": case.lr, "weight_decay": 0.1, "warmup": 0.1}
    return recipe_of(output, method=case.method, optim=optim, train=train)


def trained(case: Case, output: Path, resume: str | None = None) -> Run:
    recipe = recipe_for(case, output)
    checkpoint = None if resume is None else Path(resume)
    trainer = trainer_of(recipe, tiny_model(case.family), SAMPLES, resumed=checkpoint)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    trainer.saver.writer.wait()
    return Run(recipe, trainer, before, output)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


# ---- what must hold of each -----------------------------------------------------------------------------------


def check_count(case: Case, run: Run) -> None:
    expected = case.trainable(run.model) if callable(case.trainable) else case.trainable
    assert count_parameters(run.model).trainable == expected


def check_learns(case: Case, run: Run) -> None:
    """The loss on the same six rows falls, epoch after epoch."""
    losses = history(run.trainer, "loss")
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses


def check_changes(case: Case, run: Run) -> None:
    """All that trains has changed, it is what the row names, and nothing else has."""
    parameters = dict(run.model.named_parameters())
    changed = {name for name, value in run.before.items() if not torch.equal(parameters[name], value)}
    assert changed == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert changed
    assert [name for name in changed if not re.search(case.trains, name)] == []


def check_start(case: Case, run: Run) -> None:
    """Before its first step the model says what the base says."""
    fresh = trainer_of(run.recipe, tiny_model(case.family), SAMPLES).model
    difference = (logits(fresh) - logits(tiny_model(case.family))).abs().max()
    assert difference <= case.starts


def check_saved(case: Case, run: Run) -> None:
    """What is saved gives the same logits: here, and where nobody has heard of this project."""
    expected, folder = logits(run.model), run.folder / "saved"
    run.method.save(run.model, folder)
    again = build_method(run.recipe.method)
    other = again.apply(tiny_model(case.family))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)  # whatever was there is overwritten
    again.load(other, folder)
    assert torch.equal(logits(other), expected)
    torch.testing.assert_close(logits(plain(case, folder)), expected, rtol=0, atol=case.tolerance)


def check_merged(case: Case, run: Run) -> None:
    if not isinstance(run.method, Adapter):
        return
    folder = run.folder / "to-merge"
    run.method.save(run.model, folder)
    merged = plain(case, folder).merge_and_unload()
    assert not any("lora_" in name or "oft_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(run.model), rtol=0, atol=case.tolerance)


def check_reference(case: Case, run: Run) -> None:
    """With its adapters off the model is the untouched base; afterwards the same parameters train."""
    if not isinstance(run.model, PeftModel) or not case.base_stays:
        return
    trains = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    expected = logits(run.model)
    with AdaptersOff(run.model).active(run.model) as frozen:
        assert torch.equal(logits(frozen), logits(tiny_model(case.family)))
    assert {name: parameter.requires_grad for name, parameter in run.model.named_parameters()} == trains
    assert torch.equal(logits(run.model), expected)


def check_resume(case: Case, run: Run) -> None:
    """From the checkpoint of a third of the way on: the same weights, bit by bit."""
    resumed = trained(case, run.folder / "resumed", str(run.folder / "checkpoint-4"))
    assert history(resumed.trainer, "loss")[-8:] == history(run.trainer, "loss")[-8:]
    expected = dict(run.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def plain(case: Case, folder: Path) -> Any:
    base = tiny_model(case.family, "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if (folder / "adapter_config.json").is_file():
            return PeftModel.from_pretrained(base, str(folder))
        return type(base).from_pretrained(folder, attn_implementation="sdpa")


CHECKS = (
    check_count,
    check_learns,
    check_changes,
    check_start,
    check_saved,
    check_merged,
    check_reference,
    check_resume,
)


@pytest.mark.parametrize("name", CASES)
def test_method(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = trained(case, tmp_path)
    for check in CHECKS:
        check(case, run)


def test_every_method_has_a_row() -> None:
    assert {case.method["type"] for case in CASES.values()} == set(METHODS)


# ---- the checks can fail --------------------------------------------------------------------------------------


def failures(case: Case, folder: Path) -> set[str]:
    run, failed = trained(case, folder), set()
    for check in CHECKS:
        try:
            check(case, run)
        except (AssertionError, RuntimeError, LuthierError):
            failed.add(check.__name__)
    return failed


def test_wrong_targets_are_found(tmp_path: Path) -> None:
    row = replace(CASES["lora"], method={**CASES["lora"].method, "targets": ["q_proj", "lm_head"]})
    assert {"check_count", "check_changes"} <= failures(row, tmp_path)


def test_a_pattern_that_freezes_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.methods.full.matched", lambda model, patterns, key: {})
    assert {"check_count", "check_changes"} <= failures(CASES["full-frozen"], tmp_path)


def test_an_adapter_that_never_trains_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Lora, model: nn.Module, weight_decay: float, lr: float) -> list[dict[str, Any]]:
        return [{"params": [p for p in model.parameters() if p.requires_grad][:1], "lr": 0.0}]

    monkeypatch.setattr(Lora, "parameter_groups", none)
    assert {"check_learns", "check_changes"} <= failures(CASES["lora"], tmp_path)


def test_a_base_that_was_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiSSA as PEFT does it takes its factors off the base: neither the saved adapter nor the reference holds then."""
    attach = Lora._new

    def mutated(self: Lora, model: Any) -> PeftModel:
        made = attach(Lora(LoraSpec(rank=4), self.vocabulary), model)
        for layer in made.modules():
            if hasattr(layer, "pissa_init"):
                layer.pissa_init("default", "pissa")  # type: ignore[operator]
        return made

    monkeypatch.setattr(Lora, "_new", mutated)
    found = failures(CASES["pissa"], tmp_path)
    assert {"check_saved", "check_merged", "check_reference"} <= found
    assert not found & {"check_count", "check_learns", "check_changes", "check_resume"}


def test_a_start_that_is_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.methods.lora.write_plain", lambda folder, state: None)
    assert "check_saved" in failures(CASES["pissa"], tmp_path)


def test_ranks_that_are_lost_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.methods.lora.take_ranks", lambda model, weights: None)
    found = failures(CASES["eva-rho"], tmp_path)
    assert {"check_saved", "check_resume"} <= found and "check_learns" not in found
