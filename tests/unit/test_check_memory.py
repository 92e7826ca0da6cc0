"""The memory estimate: what is counted is what is there, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from luthier.check.estimate import divided
from luthier.check.memory import (
    HEAP_LIMIT,
    Activations,
    Growth,
    PassShape,
    Sizes,
    at_its_fullest,
    gradient_bytes,
    head_bytes,
    layer_bytes,
    measure_activations,
    reference_bytes,
    shape_of,
    tensor_bytes,
    trained,
    weight_bytes,
    without_checkpointing,
)
from luthier.check.saved import SavedTensors
from luthier.data.collate import branch_batch
from luthier.data.encode import EncodeOptions
from luthier.methods import build_method
from luthier.methods.groups import checkpoints_activations
from luthier.model import kernel
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.reference import AdaptersOff, AsItIs, OtherModel, StartingPoint
from luthier.model.rows import Rows
from luthier.optim.build import build_optimizer
from luthier.parallel.cost import BUCKET
from luthier.recipe.schema import AdamwSpec, DataSpec, FreezeSpec, FullSpec, LoraSpec, Recipe, SftSpec
from luthier.stages import build_stage
from luthier.types import IGNORE_INDEX, Sample
from tests.optimizers import CASES, WITHOUT_FORMULA
from tests.tiny import random_samples, tiny_model

METHODS = {"full": FullSpec(), "freeze": FreezeSpec(layers=1), "lora": LoraSpec(rank=4, alpha=8)}


def stage() -> Any:
    return build_stage(SftSpec(), EncodeOptions.of(DataSpec(train=("x",)), "sft"))


def model_of(method: str, family: str = "llama") -> Any:
    model = build_method(METHODS[method]).apply(tiny_model(family))
    install_target_forward(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return model


def backward(model: Any, lengths: Sequence[int]) -> None:
    batch = stage().collate(random_samples(lengths))
    model.train()
    stage().loss(ModelPolicy(model), batch, {}).terms["loss"].total.backward()


# --------------------------------------------------------------------------------------------------
# Weights, gradients, optimizer


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_weights_are_the_sum_of_all_tensors_once(family: str) -> None:
    # 97 x 32 embeddings, twice if untied; two layers of q, o (32 x 32), k, v (16 x 32), three of 48 x 32, two norms;
    # a last norm. The buffer is rotary's 4 frequencies, kept twice.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    numbers = 97 * 32 * (1 if family == "llama-tied" else 2) + 2 * layer + 32
    assert weight_bytes(tiny_model(family)) == 4 * (numbers + 2 * 4)


def test_weights_follow_their_type() -> None:
    model = tiny_model("llama")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * parameters + tensor_bytes(model.buffers())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_that_backward_leaves(method: str) -> None:
    model = model_of(method)
    backward(model, [9, 5])
    there = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradient_bytes(AdamwSpec(), model) == tensor_bytes(there) > 0


@pytest.mark.parametrize("name", ["galore_layerwise", "adalomo", "badam", "badam_random"])
def test_gradients_of_optimizers_that_never_have_all(name: str) -> None:
    """The most that is there at once while backward runs."""
    model, spec = model_of("full"), (CASES | WITHOUT_FORMULA)[name].spec
    expected = gradient_bytes(spec, model)
    assert expected < gradient_bytes(AdamwSpec(), model)
    largest = 0

    def look(_: torch.Tensor) -> None:
        nonlocal largest
        there = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        largest = max(largest, tensor_bytes(there))

    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(look)
    groups = [{"params": trained(model), "weight_decay": 0.0}]
    optimizer = build_optimizer(spec, groups, model)
    for _ in range(3):
        backward(model, [9, 5])
        optimizer.step()
        optimizer.zero_grad()
    assert largest == expected


# --------------------------------------------------------------------------------------------------
# Activations


def test_saved_tensors_of_a_toy_network() -> None:
    """Linear saves its input, tanh its output; the second linear's input is that same output, counted once."""
    network = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    x = torch.randn(7, 6)
    saved = SavedTensors(network.parameters())
    with saved:
        y = network(x)
    assert sorted(saved.release()) == [4 * 7 * 6, 4 * 7 * 10]
    assert saved.release() == []
    y.sum().backward()


def test_saved_tensors_count_a_view_as_the_whole_that_it_keeps() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    saved = SavedTensors([x])
    with saved:
        whole = x * 2.0
        first, second = whole[:2].sin(), whole[2:].cos()
    assert saved.release() == [4 * 8 * 4]
    assert first.shape[0] + second.shape[0] == 8


def test_growth_goes_through_its_three_points_and_on() -> None:
    def true(positions: int, squares: int) -> int:
        return 1000 + 24 * positions + 3 * squares

    shapes = [PassShape(8, 64, 0), PassShape(16, 200, 0), PassShape(24, 470, 0)]
    growth = Growth.through(shapes, [true(shape.positions, shape.squares) for shape in shapes])
    assert (growth.constant, growth.per_token, growth.per_square) == pytest.approx((1000.0, 24.0, 3.0))
    assert growth(100, 100**2) == true(100, 100**2)
    assert growth(100, 2 * 50**2) == 1000 + 24 * 100 + 3 * 2 * 50**2


def test_the_shape_of_a_pass_by_hand() -> None:
    """A prompt of five tokens; the last begins both answers, of three and two tokens, which attend to the others."""
    ids, weights = np.arange(1, 11, dtype=np.int32), np.zeros(10, np.float32)
    weights[5:] = 1
    sample = Sample(ids, weights, branches=(5, 8))
    shared = branch_batch([sample], share_prompts=True)
    assert shape_of(shared) == PassShape(4 + 4 + 3, 4 * 4 + 4 * 8 + 3 * 7, 5)
    copied = branch_batch([sample], share_prompts=False)
    assert shape_of(copied) == PassShape(8 + 7, 8**2 + 7**2, 5)
    assert shape_of(copied, padded=True) == PassShape(2 * 8, 2 * 8**2, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2-softcap", "gpt2"])
def test_the_growth_foretells_a_longer_pass_of_several_segments(method: str, family: str) -> None:
    """Gemma 2's capped scores are of segment length squared. The counted pass has no targets either."""
    model = model_of(method, family)
    lengths = (40, 61, 23)
    batch = stage().collate(random_samples(lengths))
    batch.targets.fill_(IGNORE_INDEX)
    saved = SavedTensors([*model.parameters(), *model.buffers()])
    model.train()
    with saved:
        loss = stage().loss(ModelPolicy(model), batch, {})
    growth = measure_activations(model, "language", None, longest=60).growth
    expected = growth(sum(lengths), sum(length**2 for length in lengths))
    # Segments of their own save bounds and masks of some bytes more than one segment does.
    assert sum(saved.release()) == pytest.approx(expected, rel=0.02)
    assert loss.terms["loss"].total.item() == 0.0


def test_an_adapter_that_trains_saves_what_its_node_saves() -> None:
    """One LoRA layer alone: its input, and the input's product with A; weights are known."""
    model = model_of("lora")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(1, 11, 32, requires_grad=True)
    saved = SavedTensors(model.parameters())
    with saved:
        y = layer(x)
    assert sorted(saved.release()) == [4 * 11 * 4, 4 * 11 * 32]
    assert y.shape == (1, 11, 48)


def test_checkpointing_keeps_one_input_for_each_layer() -> None:
    model = tiny_model("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = build_method(FullSpec()).apply(model)
    install_target_forward(model)
    shallow = measure_activations(model, "language", None, longest=60).growth
    with without_checkpointing(model):
        assert not checkpoints_activations(model)
        deep = measure_activations(model, "language", None, longest=60).growth
    assert checkpoints_activations(model)
    plain = measure_activations(model_of("full"), "language", None, longest=60).growth
    assert deep == plain
    # Two layers and the last norm keep 32 floats of each token; the norm and the ids keep a little more.
    assert 2 * 32 * 4 <= shallow.per_token < plain.per_token / 4


def test_pieces_that_outgrow_the_heap_leave_no_holes() -> None:
    activations = Activations(Growth(0, 1.0), 10, (HEAP_LIMIT // 4, HEAP_LIMIT // 8, HEAP_LIMIT // 8))
    assert activations.heap_share(10) == 1.0
    assert activations.heap_share(39) == 1.0
    assert activations.heap_share(40) == 0.5
    assert activations.heap_share(80) == 0.0


def test_a_layer_is_a_share_of_the_whole_and_whole_where_it_is_computed_again() -> None:
    plain, shape = Growth(0, 800.0), PassShape(100, 0, 0)
    assert layer_bytes(plain, shape, 4, checkpointed=False) == 5_000
    assert layer_bytes(plain, shape, 4, checkpointed=True) == 25_000


def test_pairs_are_measured_as_pairs() -> None:
    """What answers that share a prompt keep, foretold from pairs of other lengths and proportions."""
    model = model_of("lora", "gemma2-softcap")
    install_target_forward(model.get_base_model(), Rows(shares_prompts=True))
    rng = np.random.default_rng(1)
    samples = [
        Sample(
            rng.integers(3, 97, sum(parts)).astype(np.int32),
            np.zeros(sum(parts), np.float32),
            branches=(parts[0], parts[0] + parts[1]),
        )
        for parts in ((40, 9, 31), (12, 25, 26))
    ]
    batch = branch_batch(samples, share_prompts=True)
    saved = SavedTensors([*model.parameters(), *model.buffers()])
    model.train()
    with saved:
        answers = ModelPolicy(model).logprobs(batch)
    shape, growth = (
        shape_of(batch),
        measure_activations(model, "language", None, longest=90, pairs=True).growth,
    )
    assert sum(saved.release()) == pytest.approx(growth(shape.positions, shape.squares), rel=0.05)
    assert len(answers.logprobs) == 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_reference_costs_what_is_kept_of_it(method: str) -> None:
    model = model_of(method)
    assert reference_bytes(StartingPoint(model), model) == gradient_bytes(AdamwSpec(), model) > 0
    other = model_of("full", "gpt2")
    assert reference_bytes(OtherModel(other), model) == weight_bytes(other)
    assert reference_bytes(AsItIs(), model) == reference_bytes(None, model) == 0
    if method == "lora":
        assert reference_bytes(AdaptersOff(model), model) == 0


# --------------------------------------------------------------------------------------------------
# The head


def head(method: str, targets: int, **how: Any) -> tuple[int, int]:
    how = {"arithmetic": None, "smoothed": False} | how
    return head_bytes(model_of(method), PassShape(500, 0, targets), **how)


def test_a_head_that_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 97 * 40)
    assert head("lora", 30) == (30 * 32 * 4, 30 * 97 * 8)
    assert head("lora", 100) == (100 * 32 * 4, 40 * 97 * 8)
    assert head("lora", 100, smoothed=True) == (2 * 100 * 32 * 4, 40 * 97 * 12)
    assert head("lora", 100, arithmetic=torch.bfloat16) == (100 * 32 * 2, 40 * 97 * 10)
    assert head("lora", 0) == (0, 0)


def test_a_head_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LOGITS_PER_CHUNK", 97 * 40)
    gradient = 97 * 32 * 4
    assert head("full", 100) == (100 * 32 * 4, max(40 * 97 * 16, 3 * gradient))
    assert head("full", 30) == (30 * 32 * 4, max(30 * 97 * 16, gradient + 30 * 97 * 8))


# --------------------------------------------------------------------------------------------------
# The sum


def sizes(**changes: int) -> Sizes:
    parts = {
        "process": 100, "weights": 1000, "gradients": 200, "optimizer": 400, "activations": 3000, "logits": 50,
        "workspace": 7, "allocator": 11,
    }  # fmt: skip
    return Sizes(**(parts | changes))


def test_training_is_fullest_when_the_last_backward_begins() -> None:
    memory = at_its_fullest(sizes(), 10_000, several_passes=True, copies_remain=False)
    assert memory.fullest == "backward begins"
    assert memory.total == 100 + 1000 + 200 + 400 + 3000 + 50 + 7 + 11
    assert sum(memory.parts.values()) == memory.total == memory.moments["backward begins"]
    assert memory.fits
    single = at_its_fullest(sizes(), 4_567, several_passes=False, copies_remain=False)
    assert single.total == memory.total - 200
    assert not single.fits


def test_a_full_model_with_a_short_pass_is_fullest_when_backward_ends() -> None:
    short = sizes(activations=100, gradients=1000, optimizer=2000, head_gradient=300, workspace=0)
    memory = at_its_fullest(short, 10_000, several_passes=False, copies_remain=False)
    assert memory.fullest == "backward ends"
    assert memory.total == 100 + 1000 + 2000 + 1000 + 2 * 300 + 11


def test_a_checkpoint_is_copied_beside_the_training_or_only_at_its_end() -> None:
    copied = sizes(copied=5000)
    during = at_its_fullest(copied, 10**6, several_passes=False, copies_remain=True)
    assert during.fullest == "backward begins"
    assert during.parts["checkpoint"] == 5000
    after = at_its_fullest(copied, 10**6, several_passes=False, copies_remain=False)
    assert after.fullest == "saving"
    assert after.total == 100 + 1000 + 400 + 5000 + 11


def test_weights_of_another_type_are_there_twice_while_they_load() -> None:
    memory = at_its_fullest(sizes(converted=9000), 10**6, several_passes=False, copies_remain=False)
    assert memory.fullest == "loading"
    assert memory.parts == {"process": 100, "weights": 1000, "file": 9000}


def test_a_reference_is_there_always_or_before_training_only() -> None:
    beside = at_its_fullest(sizes(reference=5000), 10**6, several_passes=True, copies_remain=False)
    assert beside.parts["reference"] == 5000
    assert beside.total == 5000 + 100 + 1000 + 200 + 400 + 3000 + 50 + 7 + 11
    assert "asking the reference" not in beside.moments
    before = at_its_fullest(sizes(asked=5000), 10**6, several_passes=True, copies_remain=False)
    assert before.fullest == "asking the reference"
    assert before.parts == {"process": 100, "weights": 1000, "reference": 5000}
    assert before.moments["backward begins"] == beside.total - 5000


def test_an_estimate_that_is_largely_a_guess_says_so() -> None:
    known = at_its_fullest(sizes(allocator=700), 10**6, several_passes=False, copies_remain=False)
    assert known.parts["allocator"] / known.total < 0.15
    assert known.rough is None
    guessed = at_its_fullest(sizes(allocator=2**30), 10**10, several_passes=False, copies_remain=False)
    assert guessed.rough is not None
    assert "rough: 1.0 GiB of it is a guess" in guessed.rough


# --------------------------------------------------------------------------------------------------
# Of several processes


def test_what_one_of_four_processes_holds() -> None:
    """By hand, for a tiny model: every part against the formulae of docs/scaling.md."""
    model = tiny_model("llama").requires_grad_(True)
    count = sum(parameter.numel() for parameter in model.parameters())
    sizes = Sizes(0, 4 * count, 4 * count, 8 * count, 0, 0, 0, 0)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.lm_head)}
    group = max(layer, 4 * sum(ends.values()))
    plain = {"model": {"path": "m"}, "data": {"train": ["a"]}, "method": {"type": "full"}}
    expected = {
        "ddp": (4 * count, 8 * count, 8 * count),
        "fsdp2": (count + 2 * group, count + group, 2 * count),
        "deepspeed": (4 * count, count + min(BUCKET, 4 * count), 2 * count),
    }
    for kind, (weights, gradients, optimizer) in expected.items():
        recipe = Recipe.model_validate(plain | {"parallel": {"type": kind, "processes": 4}})
        found = divided(sizes, recipe, model, 4)
        assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer), kind
