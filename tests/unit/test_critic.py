"""The critic of a policy: its values, what trains, what is written, and that policy and critic leave each other alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing import start_processes  # type: ignore[attr-defined]
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from luthier.data.collate import branch_batch, flat_batch
from luthier.exporting.merge import keep_value_head
from luthier.methods import build_method
from luthier.methods.adapter_files import attach_scorer
from luthier.methods.critic import WithCritic, attach_critic
from luthier.methods.groups import count_parameters
from luthier.methods.lora import lora_layers
from luthier.model.active_adapters import keeping_adapters
from luthier.model.calibration import Calibration
from luthier.model.checkpointing import checkpoint_layers
from luthier.model.critic import critic_of, critic_parameters, is_critics
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.neftune import EmbeddingNoise
from luthier.model.quantized_layers import dequantized, quantized_layers
from luthier.model.reference import AdaptersOff, StartingPoint
from luthier.model.rows import FLAT, Rows
from luthier.model.selftest import require_isolation
from luthier.model.sharing import require_sharing
from luthier.model.value_head import VALUE_HEAD_NAME, write_head
from luthier.optim.roles import places
from luthier.recipe.online import FunctionRewardSpec, PpoSpec
from luthier.recipe.schema import (
    CheckpointingSpec,
    FreezeSpec,
    FullSpec,
    Ia3Spec,
    LoraSpec,
    ModelSpec,
    VeraSpec,
)
from luthier.trained.source import Trained
from luthier.trainer.snapshot import HostCopies, model_state
from luthier.types import IGNORE_INDEX, Batch, CheckpointError, ModelError
from tests.tiny import FAMILIES, chat_model, random_pairs, random_samples, tiny_model

METHODS: dict[str, Any] = {
    "full": FullSpec(),
    "freeze": FreezeSpec(layers=1),
    "lora": LoraSpec(rank=4),
    "lora-head": LoraSpec(rank=4, modules_to_save=("lm_head",)),
    "lora-rows": LoraSpec(rank=4, trainable_tokens=(51, 78, 79)),
    "lora-no-rows-of-head": LoraSpec(rank=4, trainable_tokens=(51, 78, 79), modules_to_save=("lm_head",)),
    "lora-a-held": LoraSpec(rank=4, freeze_a=True),
    "dora": LoraSpec(rank=4, dora=True),
    "pissa": LoraSpec(rank=4, init="pissa"),
    "vera": VeraSpec(rank=8, targets=("q_proj", "o_proj")),
    "ia3": Ia3Spec(),
}
CRITICS = ("shared", "own")
BOTH = [(method, critic) for method in METHODS for critic in CRITICS]


def spec(critic: str, **fields: Any) -> PpoSpec:
    return PpoSpec(rewards=(FunctionRewardSpec(path="a:b"),), critic=critic, **fields)  # type: ignore[arg-type]


def policy_with(
    method: str,
    critic: str,
    *,
    family: str = "llama",
    attention: str = "luthier_segments",
    rows: Rows = FLAT,
    prepare: Callable[[Any], Any] = lambda model: None,
    say: Callable[[str], None] = lambda text: None,
    **fields: Any,
) -> tuple[Any, WithCritic]:
    base = tiny_model(family, attention)
    prepare(base)
    set_seed(7)
    built = build_method(METHODS[method])
    model = built.apply(base)
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model, rows)
    return attach_critic(spec(critic, **fields), model, built, say)


def stir(model: nn.Module, scale: float = 0.1) -> Any:
    """Move everything that trains, each by its own name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def batch_of(lengths: tuple[int, ...] = (9, 5, 14)) -> Batch:
    return flat_batch(random_samples(lengths))


def answers(model: Any, batch: Batch, **wanted: Any) -> tuple[Tensor, Tensor]:
    found = ModelPolicy(model).logprobs(batch, values=True, **wanted)
    assert found.values is not None and found.values.dtype == torch.float32
    return found.logprobs, found.values


def at_targets(batch: Batch, of_segment: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function of each segment alone (1, L) -> (L,) says at its targets."""
    said = []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        at = (batch.targets[start:stop] != IGNORE_INDEX).nonzero()[:, 0]
        said.append(of_segment(batch.input_ids[:, start:stop])[at])
    return torch.cat(said)


def plain_values(model: Any, head: dict[str, Tensor], batch: Batch) -> Tensor:
    """By transformers alone: the last hidden states of each segment, times the head that was saved."""

    def of_segment(ids: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = model(**given, output_hidden_states=True).hidden_states[-1][0]
        return (hidden @ head["v_head.summary.weight"].T)[:, 0] + head["v_head.summary.bias"]

    return at_targets(batch, of_segment)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: one.grad for name, one in model.named_parameters() if one.requires_grad}


# --------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(("method", "critic"), BOTH)
def test_the_critic_changes_nothing_of_the_policy(method: str, critic: str) -> None:
    built = build_method(METHODS[method])
    base = tiny_model("llama")
    set_seed(7)
    plain = built.apply(base)
    trained = {name for name, one in plain.named_parameters() if one.requires_grad}
    install_target_forward(plain.get_base_model() if isinstance(plain, PeftModel) else plain)
    model, _ = policy_with(method, critic)
    assert {n for n, one in model.named_parameters() if one.requires_grad and not is_critics(n)} == trained
    batch = batch_of()
    expected = ModelPolicy(stir(plain)).logprobs(batch)
    found, values = answers(stir(model), batch)
    assert torch.equal(found, expected.logprobs)
    assert torch.equal(ModelPolicy(model).logprobs(batch).logprobs, expected.logprobs)
    assert values.shape == found.shape and values.std() > 0.01


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_starts_from_zeros_and_learns_at_once(method: str, critic: str) -> None:
    model, _ = policy_with(method, critic)
    _, values = answers(model, batch_of())
    assert not values.any()
    (values - 1).square().sum().backward()
    head = critic_of(model)
    assert head is not None and head.head.weight.grad is not None and head.head.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2-softcap", "opt", "qwen3-moe"])
@pytest.mark.parametrize(
    ("method", "critic"), [("full", "shared"), ("lora", "shared"), ("full", "own"), ("lora", "own")]
)
def test_values_are_those_of_plain_transformers(
    method: str, critic: str, family: str, tmp_path: Path
) -> None:
    """Of files that a checkpoint holds, each segment alone, with transformers' own attention."""
    model, both = policy_with(method, critic, family=family)
    stir(model, 0.05).eval()
    batch = batch_of()
    _, values = answers(model, batch)
    both.save(model, tmp_path)
    base: Any = tiny_model(family, "eager")
    beside = tmp_path if critic == "shared" else tmp_path / "critic"
    if method == "lora":
        plain = PeftModel.from_pretrained(base, str(beside))
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        if critic == "own":
            plain.base_model.load_state_dict(load_file(beside / "trunk.safetensors"), strict=False)
    expected = plain_values(plain.eval(), load_file(beside / VALUE_HEAD_NAME), batch)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_say_the_same(critic: str, side: Any) -> None:
    batch = batch_of()
    model, _ = policy_with("lora", critic)
    padded, _ = policy_with("lora", critic, attention="eager", rows=Rows(padded=True, side=side))
    for expected, found in zip(answers(stir(model), batch), answers(stir(padded), batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("critic", CRITICS)
def test_shared_prompts_say_the_same(critic: str) -> None:
    """A branch's values are those that it has behind a prompt of its own."""
    pairs = random_pairs([(5, 4, 7), (9, 3, 3)])
    model, _ = policy_with("lora", critic, rows=Rows(shares_prompts=True))
    stir(model)
    _, apart = answers(model, branch_batch(pairs, share_prompts=False))
    _, shared = answers(model, branch_batch(pairs, share_prompts=True))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)
    assert apart.std() > 0.01


@pytest.mark.parametrize("critic", CRITICS)
def test_under_autocast_the_head_is_float32(critic: str) -> None:
    model, _ = policy_with("lora", critic)
    stir(model)
    seen: list[Tensor] = []
    head = critic_of(model)
    assert head is not None
    head.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = ModelPolicy(model, torch.bfloat16).logprobs(batch_of(), values=True).values
    expected = seen[0].float() @ head.head.weight.T + head.head.bias
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, found.bfloat16().float())


def test_without_a_critic_there_are_no_values() -> None:
    model = tiny_model("llama")
    install_target_forward(model)
    with pytest.raises(ModelError, match="was given no critic"):
        ModelPolicy(model).logprobs(batch_of(), values=True)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_batch_without_targets_reaches_the_critic(critic: str) -> None:
    """So that every process of several calls the same modules."""
    model, _ = policy_with("lora", critic)
    batch = batch_of()
    batch.targets.fill_(IGNORE_INDEX)
    logprobs, values = answers(model, batch)
    assert logprobs.shape == values.shape == (0,)
    (logprobs.sum() + values.sum()).backward()
    assert all(grad is not None for grad in grads(model).values())


# --------------------------------------------------------------------------------------------------
# What trains


OWN = list(METHODS)


@pytest.mark.parametrize("method", OWN)
def test_policy_and_critic_of_its_own_leave_each_other_alone(method: str) -> None:
    model, _ = policy_with(method, "own")
    stir(model).train()
    logprobs, values = answers(model, batch_of())
    critics = critic_parameters(model)
    assert sum(one.requires_grad for one in critics) > 2
    logprobs.square().sum().backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == (parameter.requires_grad and parameter not in critics), name
    model.zero_grad()
    values.square().sum().backward()
    for name, parameter in model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == (parameter.requires_grad and parameter in critics), name


def test_a_shared_critic_bends_the_trunk() -> None:
    model, _ = policy_with("lora", "shared")
    stir(model)
    _, values = answers(model, batch_of())
    values.square().sum().backward()
    assert all(grad is not None and grad.any() for grad in grads(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "critic"), [("lora", "own"), ("lora-head", "own"), ("full", "own"), ("lora", "shared")]
)
def test_gradients_do_not_depend_on_recomputing(method: str, critic: str, reentrant: bool) -> None:
    """What is computed again in backward is computed with the adapter that it was computed with."""

    def recompute(base: Any) -> None:
        checkpoint_layers(base, CheckpointingSpec(reentrant=reentrant))

    found = []
    for prepare in (lambda base: None, recompute):
        model, _ = policy_with(method, critic, prepare=prepare)
        stir(model).train()
        logprobs, values = answers(model, batch_of())
        (logprobs.square().sum() + 3 * values.square().sum()).backward()
        found.append(grads(model))
    plain, recomputed = found
    assert any(one is not None and one.abs().max() > 0.1 for name, one in plain.items() if is_critics(name))
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "lora-rows"])
def test_the_critic_is_the_adapter_that_peft_computes(method: str) -> None:
    """Values and their gradients by PEFT's own switch, through its own layers."""
    model, _ = policy_with(method, "own")
    stir(model).eval()
    batch, head = batch_of(), critic_of(model)
    assert head is not None
    _, values = answers(model, batch)
    weights = torch.linspace(-1, 1, len(values))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and is_critics(n)]
    ours = torch.autograd.grad((weights * values).sum(), [one for _, one in trained])
    model.set_adapter("critic")

    def of_segment(ids: Tensor) -> Tensor:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = model(**given, output_hidden_states=True).hidden_states[-1][0]
        return (hidden @ head.head.weight.T)[:, 0] + head.head.bias

    expected = at_targets(batch, of_segment)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    theirs = torch.autograd.grad((weights * expected).sum(), [one for _, one in trained])
    for (name, _), grad, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(
            grad, other, rtol=1e-3, atol=1e-4 * max(float(other.abs().max()), 1), msg=name
        )


@pytest.mark.parametrize(("method", "critic"), BOTH)
def test_every_parameter_that_trains_is_in_one_group(method: str, critic: str) -> None:
    model, both = policy_with(method, critic)
    groups = both.parameter_groups(model, 0.1, 1e-3)
    grouped = [id(one) for group in groups for one in group["params"]]
    trained = [id(one) for one in model.parameters() if one.requires_grad]
    assert sorted(grouped) == sorted(trained)
    head = critic_of(model)
    assert head is not None and all(one.requires_grad for one in head.head.parameters())
    decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    assert decay[id(head.head.weight)] == 0.1 and decay[id(head.head.bias)] == 0.0
    assert count_parameters(model).trainable == sum(
        one.numel() for one in model.parameters() if one.requires_grad
    )
    assert places(model)[id(head.head.weight)].role == "score"


def test_lora_plus_leaves_the_head_its_rate() -> None:
    METHODS["lora-plus"] = LoraSpec(rank=4, lora_plus_ratio=16.0)
    try:
        model, both = policy_with("lora-plus", "own")
    finally:
        del METHODS["lora-plus"]
    groups = both.parameter_groups(model, 0.0, 1e-3)
    rates = {id(one): group.get("lr", 1e-3) for group in groups for one in group["params"]}
    named = {name: rates[id(one)] for name, one in model.named_parameters() if one.requires_grad}
    assert {rate for name, rate in named.items() if "luthier_critic" in name} == {1e-3}
    assert {rate for name, rate in named.items() if ".lora_B.critic" in name} == {1.6e-2}


def test_a_frozen_layer_is_not_copied() -> None:
    said: list[str] = []
    model, _ = policy_with("freeze", "own", say=said.append)
    trained = sum(
        one.numel() for n, one in model.named_parameters() if one.requires_grad and not is_critics(n)
    )
    layer = sum(one.numel() for one in model.model.layers[1].parameters())
    assert trained == layer
    assert sum(one.numel() for one in critic_parameters(model)) == layer + 33
    assert said == [f"critic: own, {layer + 33:,} parameters of its own, {(layer + 33) * 4 / 2**20:.2f} MiB"]


def test_an_adapter_costs_an_adapter() -> None:
    model, _ = policy_with("lora", "own")
    adapters: dict[bool, int] = {False: 0, True: 0}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            adapters[is_critics(name)] += parameter.numel()
    assert adapters[True] == adapters[False]
    assert sum(one.numel() for one in critic_parameters(model)) == adapters[True] + 33


# --------------------------------------------------------------------------------------------------
# Beside a reference, and further adapters


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(
    ("method", "kind"), [("lora", AdaptersOff), ("pissa", AdaptersOff), ("full", StartingPoint)]
)
def test_the_reference_between_forward_and_backward(method: str, kind: Any, critic: str) -> None:
    batch, found = batch_of(), []
    for asked in (False, True):
        model, _ = policy_with(method, critic)
        reference = kind(model)
        stir(model).train()
        policy = ModelPolicy(model, reference=reference)
        before = {name: one.requires_grad for name, one in model.named_parameters()}
        said = policy.logprobs(batch, values=True, temperature=0.7)
        if asked:
            policy.reference_logprobs(batch, temperature=0.7)
        assert said.values is not None
        (said.logprobs.square().sum() + said.values.square().sum()).backward()
        assert {name: one.requires_grad for name, one in model.named_parameters()} == before
        found.append(grads(model))
    for name, grad in found[0].items():
        assert grad is not None and torch.equal(grad, found[1][name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("critic", CRITICS)
def test_the_reference_is_no_copy_of_the_critic(critic: str) -> None:
    model, _ = policy_with("full", critic)
    policy_names = sum(one.numel() for name, one in model.named_parameters() if not is_critics(name))
    assert sum(copy.numel() for copy in StartingPoint(model)._copies) == policy_names


def reward_folder(folder: Path, method: str, seed: int = 5) -> Any:
    """A reward model as stage rm saves it, stirred; returns it."""
    config = FAMILIES["llama"]()
    config.num_labels = 1
    base = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    base.load_state_dict(tiny_model("llama").state_dict(), strict=False)
    built = build_method(METHODS[method])
    torch.manual_seed(seed)
    model = built.apply(base)
    stir(model, 0.07).eval()
    folder.mkdir()
    built.save(model, folder)
    return model


@pytest.mark.parametrize("first", ["judge", "critic"])
def test_adapters_of_reward_models_beside_it(first: str, tmp_path: Path) -> None:
    """Attached before or after: policy and critic say what they said, and train as they did."""
    reward_folder(tmp_path / "rm", "lora")
    batch, alone = batch_of(), stir(policy_with("lora", "own")[0])
    built, base = build_method(METHODS["lora"]), tiny_model("llama")
    set_seed(7)
    model = built.apply(base)
    install_target_forward(model.get_base_model())
    for step in ("judge", "critic") if first == "judge" else ("critic", "judge"):
        if step == "critic":
            _, both = attach_critic(spec("own"), model, built)
            continue
        with keeping_adapters(model):
            attach_scorer(model, str(tmp_path / "rm"), "judge", "rewards")
        for name, parameter in model.named_parameters():
            if ".judge" in name:
                parameter.requires_grad_(False)
    stir(model)
    for expected, found in zip(answers(alone, batch), answers(model, batch), strict=True):
        assert torch.equal(found, expected)
        found.sum().backward(retain_graph=True)
        expected.sum().backward(retain_graph=True)
    expected_grads, found_grads = grads(alone), grads(model)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert grad is not None and torch.equal(grad, found_grads[name]), name  # type: ignore[arg-type]
    both.save(model, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()) == ["critic"]
    both.load(model, tmp_path / "saved")


# --------------------------------------------------------------------------------------------------
# Its start


@pytest.mark.parametrize("policy", ["full", "freeze", "lora", "pissa"])
@pytest.mark.parametrize("saved", ["full", "lora"])
def test_a_shared_head_starts_from_a_reward_model(policy: str, saved: str, tmp_path: Path) -> None:
    reward = reward_folder(tmp_path / "rm", saved)
    model, _ = policy_with(policy, "shared", value_start=str(tmp_path / "rm"))
    head = critic_of(model)
    assert head is not None
    weight = next(one for name, one in reward.named_parameters() if "score" in name and one.requires_grad)
    assert torch.equal(head.head.weight, weight) and not head.head.bias.any()


def scores(reward: Any, batch: Batch) -> Tensor:
    """What a reward model says at every target, by transformers' own forward and head."""
    seen: list[Tensor] = []
    head = reward.score if not isinstance(reward, PeftModel) else reward.base_model.model.score
    head.register_forward_hook(lambda module, args, output: seen.append(output))

    def of_segment(ids: Tensor) -> Tensor:
        reward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return seen[-1][0, :, 0]

    return at_targets(batch, of_segment)


@pytest.mark.parametrize(
    ("policy", "saved"),
    [("full", "full"), ("freeze", "full"), ("lora", "lora"), ("pissa", "lora"), ("lora", "pissa")],
)
def test_a_critic_of_its_own_starts_as_the_reward_model(policy: str, saved: str, tmp_path: Path) -> None:
    reward = reward_folder(tmp_path / "rm", saved)
    model, both = policy_with(policy, "own", value_start=str(tmp_path / "rm"))
    batch = batch_of()
    before, _ = policy_with(policy, "shared")
    logprobs, values = answers(model, batch)
    torch.testing.assert_close(values, scores(reward, batch), rtol=1e-4, atol=1e-4)
    assert torch.equal(logprobs, answers(before, batch)[0])
    both.save(stir(model), tmp_path / "saved")
    again, other = policy_with(policy, "own", value_start=str(tmp_path / "rm"))
    other.load(again, tmp_path / "saved")
    assert torch.equal(answers(model, batch)[1], answers(again, batch)[1])


def test_a_critic_of_its_own_starts_where_the_policy_stands(tmp_path: Path) -> None:
    """With a continued adapter that is not the base."""
    model, both = policy_with("lora", "own")
    both.save(stir(model), tmp_path / "first")
    METHODS["continued"] = LoraSpec(rank=4, adapters=(str(tmp_path / "first"),))
    try:
        model, _ = policy_with("continued", "own")
    finally:
        del METHODS["continued"]
    named = dict(model.named_parameters())
    pairs = [(one, named[n.replace(".critic.", ".default.")]) for n, one in named.items() if ".critic." in n]
    assert len(pairs) == 28
    assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in pairs)
    assert any(one.abs().max() > 0.05 for n, one in named.items() if ".lora_B.critic." in n)


FAULTS: dict[str, tuple[str, str, str, str]] = {
    "nothing": ("lora", "shared", "none", "no such folder"),
    "no head": ("lora", "shared", "empty", "no value head of one output"),
    "narrow head": ("lora", "shared", "narrow", "reads 7 numbers, and the policy's hidden states have 32"),
    "damaged": ("full", "shared", "damaged", "damaged or cut short"),
    "whole for an adapter": ("lora", "own", "full", "is a whole model"),
    "adapter for a trunk": ("full", "own", "lora", "merge it with luthier export"),
    "another kind": ("ia3", "own", "lora", "peft types"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_start_that_does_not_fit(fault: str, tmp_path: Path) -> None:
    method, critic, kind, text = FAULTS[fault]
    folder = tmp_path / "rm"
    if kind in METHODS:
        reward_folder(folder, kind)
    elif kind != "none":
        folder.mkdir()
    if kind == "narrow":
        write_head(folder, torch.zeros(1, 7), torch.zeros(1))
    if kind == "damaged":
        (folder / VALUE_HEAD_NAME).write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match=text) as caught:
        policy_with(method, critic, value_start=str(folder))
    assert str(folder) in str(caught.value)


def test_biases_of_the_base_are_not_the_critics() -> None:
    METHODS["biased"] = LoraSpec(rank=4, bias="all")
    try:
        policy_with("biased", "shared", family="qwen2")
        with pytest.raises(ModelError, match=r"method\.bias"):
            policy_with("biased", "own", family="qwen2")
    finally:
        del METHODS["biased"]


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(("method", "critic"), BOTH)
def test_training_goes_on_with_the_same_bits(method: str, critic: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint written from a copy while the model moves on, two steps in another process's place."""

    def learner() -> tuple[Any, WithCritic, Any]:
        model, both = policy_with(method, critic)
        return model, both, torch.optim.AdamW(both.parameter_groups(model, 0.01, 1e-2), lr=1e-2)

    def steps(model: Any, optimizer: Any) -> None:
        for lengths in ((9, 5), (4, 11)):
            logprobs, values = answers(model.train(), batch_of(lengths))
            (logprobs.square().mean() + (values - 1).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, both, optimizer = learner()
    steps(model, optimizer)
    copies = HostCopies()
    state, moments = model_state(model, copies, optimizer), copies.tree("optimizer", optimizer.state_dict())
    steps(model, optimizer)
    both.save(model, tmp_path, state.tensors)
    again, other, fresh = learner()
    stir(again)
    other.load(again, tmp_path)
    fresh.load_state_dict(moments)
    steps(again, fresh)
    named = dict(again.named_parameters())
    moved = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name
        assert parameter.requires_grad == named[name].requires_grad, name
        moved += parameter.requires_grad
    assert moved == len(moments["state"])


@pytest.mark.parametrize(("method", "critic"), BOTH)
def test_the_final_folder_is_the_policy_for_plain_libraries(
    method: str, critic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, both = policy_with(method, critic)
    stir(model).eval()
    both.publish(model, tmp_path)
    assert not (tmp_path / "critic").exists()
    assert (tmp_path / VALUE_HEAD_NAME).is_file() == (critic == "shared")
    weights = "adapter_model.safetensors" if isinstance(model, PeftModel) else "model.safetensors"
    assert not [name for name in load_file(tmp_path / weights) if is_critics(name) or "v_head" in name]
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing`"
        )  # PEFT's, of transformers' new name
        if isinstance(model, PeftModel):
            plain = PeftModel.from_pretrained(tiny_model("llama", "eager"), str(tmp_path))
        else:
            plain, loading = AutoModelForCausalLM.from_pretrained(
                tmp_path, attn_implementation="eager", output_loading_info=True
            )
            assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not caplog.records
    batch = batch_of((12,))
    table = plain.eval()(batch.input_ids).logits[0].log_softmax(-1)
    at = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    expected = table[at, batch.targets[at]]
    torch.testing.assert_close(answers(model, batch)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "critic"), [("full", "shared"), ("full", "own"), ("lora", "shared"), ("lora", "own")]
)
def test_a_checkpoint_without_its_critic_is_refused(method: str, critic: str, tmp_path: Path) -> None:
    model, both = policy_with(method, critic)
    both.method.save(*_without(model, tmp_path))
    with pytest.raises(CheckpointError, match=f"holds no critic for stage.critic={critic}"):
        both.load(model, tmp_path)
    before = {name for name, one in model.named_parameters() if one.requires_grad}
    both.save(model, tmp_path)
    both.load(model, tmp_path)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == before


def _without(model: Any, folder: Path) -> tuple[Any, Path, dict[str, Tensor]]:
    return model, folder, {name: one for name, one in model.state_dict().items() if not is_critics(name)}


def test_a_critic_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, both = policy_with("full", "own")
    both.save(model, tmp_path)
    write_head(tmp_path / "critic", torch.zeros(1, 7), torch.zeros(1))
    with pytest.raises(CheckpointError, match="does not fit the critic"):
        both.load(model, tmp_path)
    model, both = policy_with("lora", "own")
    both.save(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "critic" / "adapter_model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="does not fit the critic"):
        both.load(model, tmp_path / "adapter")


# --------------------------------------------------------------------------------------------------
# With the rest


@pytest.mark.parametrize(
    ("method", "critic"), [("full", "shared"), ("full", "own"), ("lora", "shared"), ("lora", "own")]
)
def test_the_self_tests_of_the_start_still_pass(method: str, critic: str) -> None:
    model, _ = policy_with(method, critic, rows=Rows(shares_prompts=True))
    stir(model)
    require_isolation(model)
    require_sharing(model)


def test_apply_attaches_too() -> None:
    both = WithCritic(build_method(METHODS["lora"]), spec("own"))
    model = both.apply(tiny_model("llama"))
    assert critic_of(model) is not None and "critic" in model.peft_config


PARALLEL = [("full", "shared"), ("full", "own"), ("lora", "shared"), ("lora", "own")]


def _gradients_in_ddp(rank: int, folder: str) -> None:
    """One of two processes. It writes its gradients by DDP, and those of both rows of texts without it."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    torch.set_num_threads(1)
    for method, critic in PARALLEL:
        plain, wrapped = (stir(policy_with(method, critic)[0]) for _ in range(2))
        parallel = nn.parallel.DistributedDataParallel(wrapped)
        for model, rows in ((plain, (0, 1)), (parallel, (rank,))):
            for lengths in (((9, 5), (4, 11)), ((7,), (3, 8))):
                for row in rows:
                    with torch.no_grad():
                        answers(model, batch_of(lengths[row]))
                    logprobs, values = answers(model, batch_of(lengths[row]))
                    # DDP takes the mean of both processes
                    ((logprobs.square().sum() + values.square().sum()) / len(rows)).backward()
        torch.save((grads(wrapped), grads(plain)), f"{folder}/{method}-{critic}-{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def in_ddp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In processes of their own: what a process group leaves behind in one can hold up the next."""
    folder = tmp_path_factory.mktemp("ddp")
    start_processes(_gradients_in_ddp, (str(folder),), nprocs=2, start_method="spawn")  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("method", "critic"), PARALLEL)
def test_inside_ddp(method: str, critic: str, rank: int, in_ddp: Path) -> None:
    """One forward reaches every parameter, so nothing has to be looked for; gradients are those without it."""
    found, plain = torch.load(in_ddp / f"{method}-{critic}-{rank}")
    assert found.keys() == plain.keys() and found
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5, msg=name)


def test_generation_is_the_policys(tmp_path: Path) -> None:
    """The ordinary forward never meets the critic."""
    model, both = policy_with("lora", "own")
    stir(model).eval()
    both.publish(model, tmp_path)
    plain = PeftModel.from_pretrained(tiny_model("llama", "eager"), str(tmp_path)).eval()
    prompt = torch.tensor([[5, 9, 17, 4]])
    wanted = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **wanted), plain.generate(prompt, **wanted))


def test_the_trunk_is_an_ordinary_one(tmp_path: Path) -> None:
    """Its file has a backbone's names."""
    model, both = policy_with("full", "own")
    both.save(model, tmp_path)
    trunk = AutoModel.from_config(FAMILIES["llama"]())
    result = trunk.load_state_dict(load_file(tmp_path / "critic" / "trunk.safetensors"), strict=True)
    assert not result.missing_keys


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantized_base(critic: str, bits: int, tmp_path: Path) -> None:
    """Values are those on the plain base with the rounded weights; a checkpoint brings back the bits."""
    folder = chat_model(tmp_path / "base", "llama", hidden_size=64, intermediate_size=128, head_dim=16)

    def policy() -> tuple[Any, WithCritic]:
        described = ModelSpec.model_validate(
            {"path": str(folder), "dtype": "float32", "quantization": {"type": "bitsandbytes", "bits": bits}}
        )
        base = load_model(described, locate(described), torch.device("cpu"))
        set_seed(7)
        built = build_method(METHODS["lora"])
        model = built.apply(base)
        install_target_forward(model.get_base_model())
        return attach_critic(spec(critic), model, built)

    model, both = policy()
    stir(model).eval()
    batch = batch_of()
    _, values = answers(model, batch)
    values.sum().backward()
    trained = [one for name, one in grads(model).items() if critic == "shared" or is_critics(name)]
    assert all(grad is not None and grad.any() for grad in trained)
    both.save(model, tmp_path / "saved")
    beside = tmp_path / "saved" if critic == "shared" else tmp_path / "saved" / "critic"
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        for name, layer in quantized_layers(model).items():
            inside = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            plain.get_submodule(inside).weight.copy_(dequantized(layer))
    plain = PeftModel.from_pretrained(plain, str(beside)).eval()
    expected = plain_values(plain, load_file(beside / VALUE_HEAD_NAME), batch)
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-3)
    again, other = policy()
    other.load(again, tmp_path / "saved")
    for expected, found in zip(answers(model, batch), answers(again.eval(), batch), strict=True):
        assert torch.equal(found, expected)


def test_ranks_that_the_data_chose_are_the_critics_too() -> None:
    built = build_method(LoraSpec(rank=4, init="eva", eva_rho=2.0, calibration_samples=6))
    model = built.apply(tiny_model("llama"))
    install_target_forward(model.get_base_model())
    batches = [flat_batch(random_samples((40, 30), seed)) for seed in range(3)]
    built.calibrate(
        model,
        Calibration(
            batches, torch.device("cpu"), scores=False, arithmetic=None, label="eva", say=lambda _: None
        ),
    )
    model, _ = attach_critic(spec("own"), model, built)
    ranks = [
        (layer.r["default"], layer.r["critic"])
        for layer in lora_layers(model).values()
        if "default" in layer.r
    ]
    assert len({one for one, _ in ranks}) > 1
    assert all(one == other for one, other in ranks)
    scales = [
        (layer.scaling["default"], layer.scaling["critic"])
        for layer in lora_layers(model).values()
        if "default" in layer.r
    ]
    assert all(one == other for one, other in scales)


@pytest.mark.parametrize(("method", "critic"), [("full", "own"), ("lora", "own"), ("full", "shared")])
def test_noise_on_embeddings_stays_within_the_policy_and_its_critic(method: str, critic: str) -> None:
    """Hooks that were there before: every forward pass in training draws anew, and evaluations draw nothing."""
    base = tiny_model("llama")
    built = build_method(METHODS[method])
    model = built.apply(base)
    install_target_forward(model.get_base_model() if isinstance(model, PeftModel) else model)
    EmbeddingNoise(model, 5.0)
    model, _ = attach_critic(spec(critic), model, built)
    stir(model).train()
    (_, first), (_, second) = answers(model, batch_of()), answers(model, batch_of())
    assert not torch.equal(first, second)
    model.eval()
    plain, _ = policy_with(method, critic)
    plain.load_state_dict(model.state_dict())
    for expected, found in zip(answers(plain.eval(), batch_of()), answers(model, batch_of()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_export_leaves_the_head_out(method: str, tmp_path: Path) -> None:
    model, both = policy_with(method, "shared")
    both.publish(model, tmp_path / "run")
    path = ModelSpec(path=str(tmp_path / "run"))
    adapters = (path.path,) if method == "lora" else ()
    trained = Trained("run", path, adapters, path.path, "language")
    (tmp_path / "out").mkdir()
    keep_value_head(tiny_model("llama"), trained, tmp_path / "out")
    assert (tmp_path / "run" / VALUE_HEAD_NAME).is_file() and not list((tmp_path / "out").iterdir())
