"""torch.compile: the numbers of a run without it, one compilation for all layers and lengths, plain checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

import luthier
from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.model.attention import KERNELS
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.recipe.schema import CompileSpec, LoraSpec
from luthier.trainer.compilation import compile_layers
from luthier.trainer.trainer import PeftTrainer
from luthier.types import ModelError, RecipeError
from tests.tiny import FAMILIES, chat_model, random_samples, tiny_model, write_alpaca
from tests.training import assert_same_weights, history, recipe_of, trainer_of, weights

LENGTHS = [9, 30, 4, 17, 12, 40, 6, 8, 25, 3, 11, 19, 22, 5]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    for name, kernel in KERNELS.items():
        AttentionInterface.register(name, kernel)
    torch._dynamo.reset()


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model


def trainer(
    output: Path, family: str, method: dict[str, Any], *, checkpointing: bool = False, **train: Any
) -> PeftTrainer:
    recipe = recipe_of(
        output,
        data={"eval": ["held"]},
        method=method,
        optim={"lr": 5e-3, "eps": 1e-6},
        train={"tokens_per_batch": 80, "tokens_per_pass": 45, "epochs": 2, "eval_every": 2, **train},
    )
    model = tiny_model(family)
    held = {"held": random_samples([7, 13, 21], seed=5)}
    return trainer_of(recipe, checkpointed(model) if checkpointing else model, random_samples(LENGTHS), held)


LORA = {"type": "lora", "rank": 4, "dropout": 0.2}
FULL = {"type": "full"}


def assert_equal_runs(output: Path, spec: dict[str, Any], family: str, *how: Any) -> None:
    """Losses of training and evaluation to 1e-5, and the weights; dropout draws the same."""
    method, checkpointing = how
    plain = trainer(output / "plain", family, method, checkpointing=checkpointing)
    start = weights(plain.model)
    plain.train()
    assert not counters["frames"]
    compiled = trainer(output / "compiled", family, method, checkpointing=checkpointing, compile=spec)
    counters.clear()
    compiled.train()
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert counters["stats"]["unique_graphs"] > 0
    for key in ("loss", "eval_loss"):
        assert history(compiled, key) == pytest.approx(history(plain, key), rel=1e-5)
    assert_same_weights(weights(compiled.model), weights(plain.model), start, 2e-2)


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        ("llama", FULL, False),
        ("llama", LORA, True),
        ("gemma3-window", LORA, False),
        ("gpt2", FULL, True),
    ],
)
def test_graphs_give_the_same_run(family: str, method: Any, checkpointing: bool, tmp_path: Path) -> None:
    assert_equal_runs(tmp_path, {"backend": "eager"}, family, method, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "checkpointing"), [(FULL, False), (LORA, True)], ids=["full", "lora"])
def test_generated_code_gives_the_same_run(method: Any, checkpointing: bool, tmp_path: Path) -> None:
    assert_equal_runs(tmp_path, {}, "llama", method, checkpointing)


@pytest.mark.slow
def test_real_model(smollm2: Path, shared_data: Path, tmp_path: Path) -> None:
    """SmolLM2-135M, three steps of LoRA on real rows of many lengths: losses to 1e-5."""
    recipe = {
        "model": {"path": str(smollm2)},
        "data": {
            "train": ["alpaca_en_demo"], "directory": str(shared_data), "max_samples": 12, "max_length": 64,
            "overflow": "truncate", "max_lost": None, "cache": str(tmp_path / "cache"),
        },
        "method": {"type": "lora", "rank": 8},
        "optim": {"lr": 1e-3},
        "train": {
            "tokens_per_batch": 200, "tokens_per_pass": 128, "max_steps": 3, "log_every": 1, "save_every": None,
            "plots": False, "precision": "fp32", "output": str(tmp_path / "plain"),
        },
    }  # fmt: skip
    plain = luthier.train(recipe, quiet=True)
    compiled = luthier.train(
        recipe, ["train.compile={}", f"train.output={tmp_path / 'compiled'}"], quiet=True
    )
    assert compiled.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-5)
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 20  # thirty layers
    before, after = (load_file(run.output / "adapter_model.safetensors") for run in (plain, compiled))
    assert before.keys() == after.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_one_compilation_for_all_layers_and_lengths(adapter: bool, checkpointing: bool) -> None:
    """Twelve layers, more than torch's limit of recompilations. After a few passes no length is new."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 12
    base = AutoModelForCausalLM.from_config(config, attn_implementation="luthier_segments")
    if checkpointing:
        checkpointed(base)
    model: Any = build_method(LoraSpec(rank=2)).apply(base) if adapter else base
    install_target_forward(base)
    compile_layers(model, CompileSpec(backend="eager"))
    model.train()

    def run(lengths: list[int], seed: int) -> None:
        answers = ModelPolicy(model).logprobs(flat_batch(random_samples(lengths, seed)))
        answers.logprobs.sum().backward()

    def frames() -> int:
        assert counters["frames"]["ok"] == counters["frames"]["total"]
        return int(counters["frames"]["total"])

    run([9, 13], 0)
    first = frames()
    assert 0 < first <= 16
    for seed, lengths in enumerate([[5, 7, 8], [30], [11, 2, 3, 4, 17], [60, 61], [2] * 40, [200], [6, 5]]):
        run(lengths, seed)
    assert frames() == first
    model.eval()
    with torch.no_grad():
        run_evaluation(model, [8, 9])
        evaluated = frames()
        assert first < evaluated <= 2 * first
        for lengths in ([3], [40, 2], [7] * 9):
            run_evaluation(model, lengths)
    model.train()
    run([50, 3], 1)
    assert frames() == evaluated
    limits = [reason for reason in counters["graph_break"] if "limit" in reason]
    assert not limits


def run_evaluation(model: Any, lengths: list[int]) -> None:
    ModelPolicy(model).logprobs(flat_batch(random_samples(lengths)))


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_checkpoints_and_resume(method: dict[str, Any], tmp_path: Path) -> None:
    """Saved names are those without compiling, and a resumed run has the same bits."""
    model = chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 20)
    recipe = {
        "model": {"path": str(model)},
        "data": {"train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache")},
        "method": method,
        "train": {
            "tokens_per_batch": 300, "max_steps": 4, "output": str(tmp_path / "plain"), "log_every": 1,
            "save_every": 2, "plots": False,
        },
    }  # fmt: skip
    plain = luthier.train(recipe, quiet=True).output
    how = ["train.compile={backend: eager}", f"train.output={tmp_path / 'compiled'}"]
    compiled = luthier.train(recipe, how, quiet=True).output
    assert counters["frames"]["total"] > 0
    (name,) = (path.name for path in plain.glob("*.safetensors"))
    saved = load_file(compiled / name)
    assert saved.keys() == load_file(plain / name).keys()
    luthier.train(recipe, [*how, f"train.resume={compiled / 'checkpoint-2'}"], quiet=True)
    again = load_file(compiled / name)
    assert all(torch.equal(saved[key], again[key]) for key in saved)


def test_what_cannot_be_compiled() -> None:
    model = tiny_model("llama")
    with pytest.raises(
        RecipeError,
        match=r"^train\.compile\.backend=inductr: torch has no such backend; choose from .*inductor",
    ):
        compile_layers(model, CompileSpec(backend="inductr"))
    with pytest.raises(RecipeError) as caught:
        compile_layers(model, CompileSpec(backend="eager", mode="max-autotune"))
    assert str(caught.value) == "train.compile.mode=max-autotune is for the backend inductor, not eager"
    with pytest.raises(
        ModelError, match=r"^train\.compile: LlamaRotaryEmbedding has no list of 2 decoder layers"
    ):
        compile_layers(model.model.rotary_emb, CompileSpec())


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(ModelError) as caught,
    ):
        compile_layers(tiny_model("llama"), CompileSpec())
    assert str(caught.value).startswith("train.compile: torch cannot compile on this machine: ")
    assert "no-such-compiler" in str(caught.value)
    assert "needs a C++ compiler" in str(caught.value)
