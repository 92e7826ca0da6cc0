"""Reward models drive rollouts: what a run of stage rm says of a conversation, loaded apart or on the policy's base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from luthier.assemble import build_model
from luthier.data.collate import flat_batch
from luthier.environment import detect_hardware
from luthier.experience import Completion, RewardError
from luthier.material import load_tokens
from luthier.model.base_record import BaseRecord, read_base, remember_base, write_base
from luthier.model.load import fingerprint, locate
from luthier.model.logprobs import ModelPolicy
from luthier.recipe.load import load_recipe
from luthier.recipe.online import ModelRewardSpec
from luthier.recipe.quantization import TorchaoSpec
from luthier.recipe.resolve import resolve
from luthier.rewards import Rewards, build_rewards
from luthier.rewards.models import ScoredByModel
from luthier.rewards.shared import SharedRewardModel, why_apart
from luthier.run import train
from luthier.score import score_file
from luthier.types import Batch, Method, ModelError
from tests.completions import completion, prompt
from tests.reward import plain_scores, reward_recipe, write_pairs
from tests.tiny import chat_model, chat_tokenizer, random_samples

REWARD_METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "rank": 4},
    "few-layers": {
        "type": "lora",
        "rank": 2,
        "targets": ["q_proj", "down_proj"],
        "rslora": True,
        "dropout": 0.2,
    },
    "dora": {"type": "lora", "rank": 2, "dora": True},
    "pissa": {"type": "lora", "rank": 4, "init": "pissa"},
}
POLICIES: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 3},
    "dropout": {"type": "lora", "rank": 3, "dropout": 0.3, "targets": ["v_proj"]},
    "frozen-a": {"type": "lora", "rank": 3, "freeze_a": True},
    "dora": {"type": "lora", "rank": 2, "dora": True},
    "pissa": {"type": "lora", "rank": 2, "init": "pissa"},
    "tokens": {"type": "lora", "rank": 2, "trainable_tokens": [40, 41, 42, 2]},
    "embeddings": {"type": "lora", "rank": 2, "modules_to_save": ["embed_tokens", "lm_head"]},
}
Run = tuple[str, Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and pairs, in which every run below trains."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=REWARD_METHODS)
def run(request: pytest.FixtureRequest, home: Path) -> Run:
    return request.param, trained(home, request.param)


@pytest.fixture(scope="module")
def adapter(home: Path) -> Path:
    return trained(home, "lora")


def trained(home: Path, name: str) -> Path:
    """The folder of a run of stage rm of six steps, trained once; its value head is large enough to tell answers apart."""
    output = home / name
    if not output.is_dir():
        train(reward_recipe(home, REWARD_METHODS[name], output=str(output)), quiet=True)
    return output


def pairs(home: Path) -> list[Completion]:
    """The answers of the pairs, the better ones first, as a rollout has them."""
    rows = json.loads((home / "pairs.json").read_text())
    return [
        completion(row[name], prompt(row["instruction"], index))
        for name in ("chosen", "rejected")
        for index, row in enumerate(rows)
    ]


def expected(home: Path, model: Path) -> Tensor:
    """(2n,) what `luthier score` says of them."""
    found = score_file(model, home / "pairs.json").rows
    return torch.tensor([row.scores[side] for side in (0, 1) for row in found])


def built(path: Path | str, **around: Any) -> Rewards:
    said = around.pop("spec", {})
    return build_rewards([ModelRewardSpec(path=str(path), **said)], decode=lambda ids: "", **around)


def policy_on(
    base: Path, method: Mapping[str, Any], *, known: bool = True, **model: Any
) -> tuple[PeftModel, Method]:
    """A policy as a run has it after its first steps: its adapter is no longer nothing."""
    hardware = detect_hardware()
    tree = {
        "model": {"path": str(base), **model},
        "data": {"train": ["rows"]},
        "stage": {"type": "sft"},
        "method": dict(method),
    }
    settings = resolve(load_recipe(tree), hardware).recipe
    source = locate(settings.model)
    policy, how = build_model(settings, source, hardware, load_tokens(settings, source, lambda text: None)[1])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if known:
        remember_base(
            policy, BaseRecord(fingerprint(source), settings.model.quantization, settings.model.dtype)
        )
    return policy, how  # type: ignore[return-value]


def some_batch() -> Batch:
    return flat_batch(random_samples([9, 14, 5], vocab_size=250))


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    """Of a fixed loss, in training mode, dropout drawn anew from the same seed."""
    torch.manual_seed(3)
    policy.zero_grad()
    ModelPolicy(policy).logprobs(some_batch()).logprobs.sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def logprobs(policy: nn.Module) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return ModelPolicy(policy).logprobs(some_batch()).logprobs


# --------------------------------------------------------------------------------------------------
# Apart


def test_scores_are_those_of_luthier_score(run: Run, home: Path) -> None:
    _, folder = run
    completions = pairs(home)
    heard: list[str] = []
    rewards = built(folder, say=heard.append)
    found = rewards(completions)
    assert found.shape == (len(completions), 1) and rewards.names == ("model",)
    torch.testing.assert_close(torch.from_numpy(found[:, 0]), expected(home, folder), atol=1e-5, rtol=0)
    assert np.ptp(found) > 0.1
    # One by one they are what they are together.
    alone = [float(rewards([one])[0, 0]) for one in completions[:4]]
    np.testing.assert_allclose(alone, found[:4, 0], atol=1e-5, rtol=0)


def test_another_family_reads_its_own_template(home: Path, tmp_path: Path) -> None:
    """A reward model that no run of Luthier wrote, of other layers, other tokens and another template."""
    tokenizer = other_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = saved(config, tokenizer, tmp_path / "judge")
    adapter_home = home if (home / "pairs.json").is_file() else write_home(home)
    completions = pairs(adapter_home)
    rows = json.loads((adapter_home / "pairs.json").read_text())
    wanted = plain_scores(model, AutoTokenizer.from_pretrained(tmp_path / "judge"), rows)
    found = built(tmp_path / "judge")(completions)[:, 0]
    torch.testing.assert_close(torch.from_numpy(found), wanted.T.flatten(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("template", [True, False])
def test_an_encoder_reads_a_conversation_or_a_pair(template: bool, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    if not template:
        tokenizer.chat_template = None
    tokenizer.model_max_length = 64
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = saved(config, tokenizer, tmp_path / "judge", head="classifier")
    texts = ["1 2 3", "", "no", "1 2 3 4 5 6"]
    asked = prompt("Count to 3.")
    found = built(tmp_path / "judge")([completion(text, asked) for text in texts])[:, 0]
    read = AutoTokenizer.from_pretrained(tmp_path / "judge")
    for text, score in zip(texts, found, strict=True):
        if template:
            chat = [{"role": "user", "content": "Count to 3."}, {"role": "assistant", "content": text}]
            shown = read.apply_chat_template(chat, tokenize=False)
            one = read(shown, add_special_tokens=False, return_tensors="pt")
        else:
            one = read("Count to 3.", text, return_tensors="pt")
        with torch.no_grad():
            assert float(score) == pytest.approx(float(model(**one).logits[0, 0]), abs=1e-5)
    assert np.ptp(found) > 1e-3
    with pytest.raises(
        RewardError,
        match=r"reward model: sums, row 3: prompt and answer are \d+ tokens of the reward model, which has positions for 64",
    ):
        built(tmp_path / "judge")([completion("1 " * 60, prompt("Count.", 3))])


def other_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|im_end|>~{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    return tokenizer


def saved(config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, head: str = "score") -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    nn.init.normal_(getattr(model, head).weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_home(home: Path) -> Path:
    chat_model(home / "base")
    write_pairs(home / "pairs.json")
    return home


# --------------------------------------------------------------------------------------------------
# On the policy's base


def test_an_adapter_says_the_same_on_the_policys_base(run: Run, home: Path) -> None:
    name, folder = run
    completions = pairs(home)
    policy, _ = policy_on(home / "base", POLICIES["lora"])
    heard: list[str] = []
    rewards = built(folder, policy=policy, policy_base=str(home / "base"), say=heard.append)
    policy.train()  # its dropout, and the reward adapter's own, are off while answers are scored
    found = torch.from_numpy(rewards(completions)[:, 0])
    torch.testing.assert_close(found, expected(home, folder), atol=1e-5, rtol=0)
    judge = rewards._judges[0]
    assert isinstance(judge, ScoredByModel) and judge.shared == (name != "full")
    assert heard == ([f"reward model: {folder} shares the policy's base"] if name != "full" else [])
    if judge.shared:
        assert judge.scorer._model is policy  # nothing else was loaded


@pytest.mark.parametrize("kind", POLICIES)
def test_the_policy_is_what_it_was(kind: str, home: Path, adapter: Path, tmp_path: Path) -> None:
    """Outputs and gradients to the bit, what trains, what is active, the modes, what is saved, and the optimizer."""
    completions = pairs(home)
    policy, method = policy_on(home / "base", POLICIES[kind])
    policy.train()
    policy.base_model.model.model.layers[0].eval()  # somebody's choice
    before = logprobs(policy), gradients(policy)
    trains = {name: p.requires_grad for name, p in policy.named_parameters()}
    modes = {name: module.training for name, module in policy.named_modules()}
    groups = group_names(policy, method)
    method.save(policy, tmp_path / "before")

    rewards = built(adapter, policy=policy, policy_base=str(home / "base"))
    for _ in range(2):
        found = torch.from_numpy(rewards(completions)[:, 0])
        torch.testing.assert_close(found, expected(home, adapter), atol=1e-5, rtol=0)

    after = logprobs(policy), gradients(policy)
    assert torch.equal(after[0], before[0])
    assert renamed(after[1]) == renamed(before[1]) != set()
    old = {plain(name): gradient for name, gradient in before[1].items()}
    for name, gradient in after[1].items():
        assert torch.equal(gradient, old[plain(name)]), name
    now = {plain(name): p.requires_grad for name, p in policy.named_parameters()}
    assert {name for name, trained in now.items() if trained} == {
        plain(n) for n, trained in trains.items() if trained
    }
    assert not any(trained for name, trained in now.items() if "reward" in name.split("."))
    assert all(module.training == modes[name] for name, module in policy.named_modules() if name in modes)
    assert policy.active_adapter == "default" and policy.base_model.active_adapter in ("default", ["default"])
    assert group_names(policy, method) == groups

    method.save(policy, tmp_path / "after")
    assert sorted(p.name for p in (tmp_path / "after").iterdir()) == sorted(
        p.name for p in (tmp_path / "before").iterdir()
    )
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert first.keys() == second.keys() and not any("reward" in name for name in second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # And it is loaded again, with the reward adapter beside it.
    method.load(policy, tmp_path / "before")
    assert torch.equal(logprobs(policy), before[0])
    with policy.disable_adapter():
        off = logprobs(policy)
    untouched, _ = policy_on(home / "base", POLICIES[kind])
    untouched.train()
    untouched.base_model.model.model.layers[0].eval()
    with untouched.disable_adapter():
        assert torch.equal(off, logprobs(untouched))


def plain(name: str) -> str:
    """A layer that the reward adapter alone adapts is wrapped now, and its weight is named so."""
    return name.replace(".base_layer.", ".")


def renamed(found: Mapping[str, Tensor]) -> set[str]:
    return {plain(name) for name in found}


def group_names(policy: nn.Module, method: Method) -> list[list[str]]:
    names = {id(p): plain(name) for name, p in policy.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in method.parameter_groups(policy, 0.1, 1e-3)]


def test_several_adapters_share_it(home: Path, adapter: Path) -> None:
    """Each has its own name and head, and an error in between leaves the policy as it was."""
    other = trained(home, "few-layers")
    completions = pairs(home)
    policy, _ = policy_on(home / "base", POLICIES["pissa"])
    before = logprobs(policy)
    rewards = build_rewards(
        [ModelRewardSpec(path=str(adapter)), ModelRewardSpec(path=str(other), name="few")],
        decode=lambda ids: "",
        policy=policy,
        policy_base=str(home / "base"),
    )
    found = torch.from_numpy(rewards(completions))
    wanted = torch.stack([expected(home, adapter), expected(home, other)], dim=1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert sorted(policy.peft_config) == ["default", "reward", "reward_2", "start"]
    broken = some_batch()
    shared = rewards._judges[0].scorer._policy  # type: ignore[attr-defined]
    assert isinstance(shared, SharedRewardModel)
    turned = [shared.scores(replace(broken, rows=torch.tensor(order))) for order in ([0, 1, 2], [2, 0, 1])]
    assert torch.equal(turned[1], turned[0][[2, 0, 1]]) and len(set(turned[0].tolist())) == 3
    with pytest.raises(RuntimeError, match="planted"), torch.no_grad():
        handle = policy.base_model.model.model.register_forward_pre_hook(planted)
        try:
            shared.scores(replace(broken, rows=torch.tensor([0])))
        finally:
            handle.remove()
    assert torch.equal(logprobs(policy), before)


def planted(module: nn.Module, args: Any) -> None:
    raise RuntimeError("planted")


def test_where_the_base_is_another_it_is_loaded_apart(home: Path, adapter: Path, tmp_path: Path) -> None:
    completions = pairs(home)
    other = tmp_path / "other"
    chat_model(other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    policy, _ = policy_on(other, POLICIES["lora"])
    heard: list[str] = []
    rewards = built(adapter, policy=policy, policy_base=str(other), say=heard.append)
    torch.testing.assert_close(
        torch.from_numpy(rewards(completions)[:, 0]), expected(home, adapter), atol=1e-5, rtol=0
    )
    assert heard == [f"reward model: {adapter} has its base loaded apart: it was trained on another base"]
    assert list(policy.peft_config) == ["default"]


def test_why_it_is_apart(home: Path, adapter: Path, tmp_path: Path) -> None:
    base, lora = home / "base", POLICIES["lora"]
    policy, _ = policy_on(base, lora)
    assert why_apart(policy, adapter) is None
    full, _ = policy_on(base, {"type": "full"})
    assert why_apart(full, adapter) == "the policy trains its base"
    unknown, _ = policy_on(base, lora, known=False)
    assert why_apart(unknown, adapter) == "the adapter does not say which base it was trained on"
    record = read_base(adapter)
    assert record is not None

    def changed(record_changes: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
        folder = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in adapter.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        written = json.loads((folder / "adapter_config.json").read_text()) | dict(config)
        (folder / "adapter_config.json").write_text(json.dumps(written))
        fields = {
            "fingerprint": record.fingerprint,
            "quantization": None,
            "dtype": record.dtype,
            "adapters": (),
        }
        write_base(folder, BaseRecord(**(fields | dict(record_changes))))  # type: ignore[arg-type]
        return why_apart(policy, folder)

    assert changed({}, {}) is None
    assert changed({"fingerprint": "sha256:0"}, {}) == "it was trained on another base"
    assert (
        changed({"dtype": "bfloat16"}, {})
        == f"the policy's base is in {record.dtype}, its own was in bfloat16"
    )
    assert (
        changed({"adapters": ("a",)}, {})
        == "other adapters are merged into the policy's base than into its own"
    )
    assert "quantized (type: torchao" in str(changed({"quantization": TorchaoSpec(type="torchao")}, {}))
    assert changed({}, {"bias": "all"}) == "the adapter of the reward model changes the base itself"
    assert (
        changed({}, {"init_lora_weights": "orthogonal"})
        == "the adapter of the reward model changes the base itself"
    )
    assert changed({}, {"modules_to_save": ["score", "embed_tokens"]}) == "modules of it train as a whole"
    assert (
        changed({}, {"target_parameters": ["a.weight"]})
        == "the adapter of the reward model is on parameters, not on layers"
    )
    other, _ = policy_on(base, {"type": "ia3"})
    assert why_apart(other, adapter) == "the adapter of the policy is none of LoRA"


# --------------------------------------------------------------------------------------------------
# What is said in any case


@pytest.mark.parametrize("shared", [True, False])
def test_empty_and_cut_answers_have_scores(shared: bool, home: Path, adapter: Path) -> None:
    policy, _ = policy_on(home / "base", POLICIES["lora"])
    around = {"policy": policy, "policy_base": str(home / "base")} if shared else {}
    rewards = built(adapter, **around)
    asked = prompt("Count to 3.")
    found = rewards([completion("", asked), completion("1 2 3", asked), completion("1 2", asked)])[:, 0]
    assert np.isfinite(found).all() and len(set(found.tolist())) == 3
    model = AutoModelForSequenceClassification.from_pretrained(home / "base", num_labels=1)
    plain_model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    wanted = plain_scores(
        plain_model, tokenizer, [{"instruction": "Count to 3.", "chosen": "", "rejected": "1 2 3"}]
    )
    np.testing.assert_allclose(found[:2], wanted[0].numpy(), atol=1e-5, rtol=0)
    with pytest.raises(
        RewardError,
        match=r"reward model: sums, row 5: prompt and answer are \d+ tokens of the reward model, which has positions for 256",
    ):
        rewards([completion("x" * 300, prompt("Count.", 5))])


def test_what_is_no_reward_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        built(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no reward model but a LlamaForCausalLM"):
        built(chat_model(tmp_path / "language"))
    policy, method = policy_on(tmp_path / "language", POLICIES["lora"])
    method.save(policy, tmp_path / "adapter")
    for around in ({}, {"policy": policy, "policy_base": str(tmp_path / "language")}):
        with pytest.raises(ModelError, match="is an adapter of a language model"):
            built(tmp_path / "adapter", **around)
    config = BertConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
    )
    saved(config, chat_tokenizer(), tmp_path / "three", head="classifier")
    with pytest.raises(ModelError, match="a BertForSequenceClassification of 3 labels"):
        built(tmp_path / "three")
    with pytest.raises(
        ModelError, match=r"stage\.rewards\.0\.base: .* is a whole model, which has no model below it"
    ):
        built(tmp_path / "three", spec={"base": "x"})
