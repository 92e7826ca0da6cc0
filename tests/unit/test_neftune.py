"""Noise on the embeddings: its size by each sample's own length, where it is on, and that nothing keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import luthier
from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.neftune import EmbeddingNoise
from luthier.model.rows import Rows
from luthier.recipe.schema import LoraSpec
from luthier.types import ModelError
from tests.tiny import chat_model, random_samples, tiny_model, write_alpaca

ALPHA, HIDDEN = 5.0, 32
LENGTHS = [3, 17, 9, 41]


class Seen:
    """What the embedding gave, with and without the noise: hooks run in the order in which they were added."""

    def __init__(self, model: Any) -> None:
        self.embedding = model.get_input_embeddings()
        self.outputs: list[Tensor] = []
        self.handle = self.embedding.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Tensor) -> None:
        self.outputs.append(output.detach().clone())

    @property
    def output(self) -> Tensor:
        return self.outputs[-1]

    def noise(self, ids: Tensor) -> Tensor:
        return self.output - torch.nn.functional.embedding(ids, self.embedding.weight.detach())


def noisy(family: str = "llama", rows: Rows | None = None) -> tuple[Any, Seen]:
    model = tiny_model(family)
    install_target_forward(model, *([rows] if rows is not None else []))
    model.train()
    EmbeddingNoise(model, ALPHA)
    return model, Seen(model)


def draws(seed: int, *shape: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.empty(*shape).uniform_(-1, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-window"])
def test_the_size_of_the_noise_is_that_of_each_sample(family: str) -> None:
    """In closed form: the uniform draws times alpha / sqrt(length of the sample * hidden size)."""
    model, seen = noisy(family)
    batch = flat_batch(random_samples(LENGTHS))
    torch.manual_seed(7)
    ModelPolicy(model).logprobs(batch)
    clean = seen.output
    model.eval()
    ModelPolicy(model).logprobs(batch)
    noise = (clean - seen.output)[0]
    size = torch.tensor([ALPHA / (length * HIDDEN) ** 0.5 for length in LENGTHS for _ in range(length)])[
        :, None
    ]
    torch.testing.assert_close(noise, draws(7, 1, sum(LENGTHS), HIDDEN)[0] * size, atol=2e-6, rtol=1e-4)
    for part, length in zip(torch.split(noise, LENGTHS), LENGTHS, strict=True):
        bound = ALPHA / (length * HIDDEN) ** 0.5
        assert 0.9 * bound < float(part.abs().max()) <= bound * (1 + 1e-4)


def test_packed_is_alone() -> None:
    """A sample's noise is as large in a row with others as alone; a scale by the row's length would be less."""
    samples = random_samples(LENGTHS)
    model, seen = noisy()
    batch = flat_batch(samples)
    torch.manual_seed(7)
    ModelPolicy(model).logprobs(batch)
    packed = torch.split(seen.noise(batch.input_ids)[0], LENGTHS)
    for sample, part, length in zip(samples, packed, LENGTHS, strict=True):
        alone = flat_batch([sample])
        ModelPolicy(model).logprobs(alone)
        other = seen.noise(alone.input_ids)[0]
        # Same distribution, other draws: the root mean square of U(-b, b) is b / sqrt(3).
        bound = ALPHA / (length * HIDDEN) ** 0.5
        for noise in (part, other):
            assert float(noise.square().mean().sqrt()) == pytest.approx(bound / 3**0.5, rel=0.15)
        by_row = ALPHA / (sum(LENGTHS) * HIDDEN) ** 0.5
        assert float(part.abs().max()) > 1.2 * by_row


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_are_scaled_by_their_real_length(side: Any) -> None:
    model, seen = noisy(rows=Rows(padded=True, side=side))
    batch = flat_batch(random_samples(LENGTHS))
    torch.manual_seed(7)
    ModelPolicy(model).logprobs(batch)
    width = max(LENGTHS)
    assert seen.output.shape == (len(LENGTHS), width, HIDDEN)
    raw = draws(7, len(LENGTHS), width, HIDDEN)
    for row, (start, length) in enumerate(zip(batch.cu_seqlens.tolist(), LENGTHS, strict=False)):
        ids = batch.input_ids[0, start : start + length]
        real = slice(0, length) if side == "right" else slice(width - length, width)
        clean = torch.nn.functional.embedding(ids, seen.embedding.weight.detach())
        expected = clean + raw[row, real] * ALPHA / (length * HIDDEN) ** 0.5
        torch.testing.assert_close(seen.output[row, real], expected, atol=2e-6, rtol=1e-5)


def test_only_where_a_model_trains() -> None:
    """Not in evaluation, not without gradients, not in generation; the ordinary forward in training has it too."""
    model, seen = noisy()
    batch = flat_batch(random_samples([8, 5]))
    with torch.no_grad():
        ModelPolicy(model).logprobs(batch)
    assert not seen.noise(batch.input_ids).any()
    model.eval()
    ModelPolicy(model).logprobs(batch)
    assert not seen.noise(batch.input_ids).any()
    prompts = torch.randint(3, 90, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model.generate(input_ids=prompts, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [tuple(output.shape[:2]) for output in seen.outputs[2:]] == [(2, 6), (2, 1), (2, 1)]
    clean = torch.nn.functional.embedding(prompts, seen.embedding.weight.detach())
    assert torch.equal(seen.outputs[2], clean)
    model.train()
    torch.manual_seed(3)
    model(input_ids=prompts, attention_mask=mask)
    size = ALPHA / (torch.tensor([4, 6])[:, None, None] * HIDDEN).sqrt()
    torch.testing.assert_close(seen.noise(prompts), draws(3, 2, 6, HIDDEN) * size, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4),
        LoraSpec(rank=4, targets=("embed_tokens", "q_proj")),
        LoraSpec(rank=4, modules_to_save=("embed_tokens",)),
    ],
    ids=["layers", "embedding", "copy"],
)
def test_adapters(spec: LoraSpec) -> None:
    """PEFT's wrapper and its own embedding layers do not hide it."""
    model = build_method(spec).apply(tiny_model("llama"))
    install_target_forward(model.get_base_model())
    model.train()
    noise = EmbeddingNoise(model, ALPHA)
    seen = Seen(model.get_base_model())
    batch = flat_batch(random_samples(LENGTHS))
    torch.manual_seed(7)
    ModelPolicy(model).logprobs(batch)
    with_noise = seen.output
    noise.remove()
    ModelPolicy(model).logprobs(batch)
    size = torch.tensor([ALPHA / (length * HIDDEN) ** 0.5 for length in LENGTHS for _ in range(length)])[
        :, None
    ]
    expected = draws(7, 1, sum(LENGTHS), HIDDEN)[0] * size
    torch.testing.assert_close((with_noise - seen.output)[0], expected, atol=2e-6, rtol=1e-4)


def test_removed_is_gone() -> None:
    model = tiny_model("llama")
    install_target_forward(model)
    model.train()
    names = set(model.state_dict())
    noise = EmbeddingNoise(model, ALPHA)
    assert set(model.state_dict()) == names
    batch = flat_batch(random_samples([8, 5]))
    noise.remove()
    before = torch.get_rng_state()
    ModelPolicy(model).logprobs(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.get_input_embeddings()._forward_hooks and not model.base_model._forward_pre_hooks


def test_a_model_without_a_backbone_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^train\.neftune_alpha: LlamaModel has no input embedding behind a backbone"
    ):
        EmbeddingNoise(tiny_model("llama").base_model, ALPHA)


def test_a_run_resumes_bit_by_bit(tmp_path: Path) -> None:
    """The noise is drawn from torch's generator, which a checkpoint holds; what is saved has no trace of it."""
    model = chat_model(tmp_path / "model")
    write_alpaca(tmp_path / "rows.json", 20)
    recipe = {
        "model": {"path": str(model)},
        "data": {
            "train": ["rows.json"], "directory": str(tmp_path), "cache": str(tmp_path / "cache"), "dev_split": 4,
        },
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 1e-2},
        "train": {
            "tokens_per_batch": 400, "max_steps": 4, "output": str(tmp_path / "straight"), "log_every": 1,
            "save_every": 2, "eval_every": 1, "plots": False, "neftune_alpha": ALPHA,
        },
    }  # fmt: skip
    straight = luthier.train(recipe, quiet=True)
    resumed = luthier.train(
        recipe,
        [f"train.output={tmp_path / 'straight'}", f"train.resume={tmp_path / 'straight' / 'checkpoint-2'}"],
        quiet=True,
    )
    silent = luthier.train(
        recipe, [f"train.output={tmp_path / 'silent'}", "train.neftune_alpha=0"], quiet=True
    )
    saved = load_file(straight.output / "checkpoint-4" / "adapter_model.safetensors")
    again = load_file(resumed.output / "adapter_model.safetensors")
    other = load_file(silent.output / "adapter_model.safetensors")
    assert saved.keys() == again.keys() == other.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert any(not torch.equal(saved[name], other[name]) for name in saved)
    assert straight.metrics["eval_loss"] == resumed.metrics["eval_loss"]
