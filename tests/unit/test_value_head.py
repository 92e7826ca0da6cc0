"""Reward models: scores by flat and padded rows, what is loaded and drawn, what trains, what is written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from luthier.data.collate import flat_batch
from luthier.methods import build_method
from luthier.methods.lora import Lora
from luthier.model.attention import NotIsolatedError
from luthier.model.load import load_model, locate
from luthier.model.logprobs import ModelPolicy, chosen_rows
from luthier.model.rows import FLAT, Rows
from luthier.model.selftest import require_isolation, run_self_test
from luthier.model.value_head import (
    ScoreProbe,
    choose_padding,
    install_score_forward,
    value_head,
    write_value_head,
)
from luthier.model.vocabulary import extend_tokenizer, resize_embeddings
from luthier.recipe.schema import FreezeSpec, FullSpec, LoraSpec, ModelSpec, VocabularySpec
from luthier.types import Batch, ModelError, RecipeError
from tests.tiny import FAMILIES, chat_model, chat_tokenizer, random_samples

SCORED = sorted(FAMILIES.keys() - {"granite-scaled", "cohere-scaled"})
CPU = torch.device("cpu")
LENGTHS = (9, 4, 13)


def reward_model(
    family: str = "llama", attention: str = "luthier_segments", seed: int = 0
) -> PreTrainedModel:
    """A float32 reward model with large random weights."""
    config = FAMILIES[family]()
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.eval()


def scored_batch() -> Batch:
    """Three segments, scored in another order than they stand."""
    batch = flat_batch(random_samples(LENGTHS))
    return replace(batch, rows=torch.tensor([2, 0, 1]))


def plain_scores(model: PreTrainedModel, rows: list[Tensor], pad_id: int = 0) -> Tensor:
    """Pooled logits of a right-padded batch by transformers' own forward."""
    width = max(len(ids) for ids in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    scores: Tensor = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return scores


def segments(batch: Batch) -> list[Tensor]:
    parts = torch.split(batch.input_ids[0], batch.cu_seqlens.diff().tolist())
    return [parts[int(row)] for row in batch.rows]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", SCORED)
@pytest.mark.parametrize(
    "rows", [FLAT, Rows(padded=True), Rows(padded=True, side="left")], ids=["flat", "right", "left"]
)
def test_scores_and_gradients_are_those_of_transformers_own_batch(family: str, rows: Rows) -> None:
    batch, plain = scored_batch(), reward_model(family, "eager")
    model = reward_model(family, "eager" if rows.padded else "luthier_segments")
    install_score_forward(model, rows)
    weights = torch.tensor([1.0, -2.0, 0.5])
    expected = plain_scores(plain, segments(batch))
    found = ModelPolicy(model).scores(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float(expected.detach().std()) > 0.1
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    largest = max(float(other.grad.abs().max()) for other in plain.parameters() if other.grad is not None)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
            continue
        # The bias of keys has no gradient but rounding: a softmax does not feel it.
        own = float(other.grad.abs().max())
        difference = float((parameter.grad - other.grad).abs().max())  # type: ignore[operator]
        assert difference <= 2e-4 * own + 1e-6 * largest, f"{name}: {difference:.3g} of {own:.3g}"


def test_without_positions_the_model_answers_as_before() -> None:
    model, plain = reward_model(), reward_model(attention="eager")
    install_score_forward(model)
    rows = segments(scored_batch())
    torch.testing.assert_close(plain_scores(model, rows), plain_scores(plain, rows), atol=2e-5, rtol=1e-5)
    assert type(model).__name__ == "LlamaForSequenceClassification"


def test_the_head_computes_in_float32_whatever_the_backbone_does() -> None:
    """Under bfloat16 scores keep digits that bfloat16 has not."""
    model = reward_model()
    install_score_forward(model)
    scores = ModelPolicy(model, torch.bfloat16).scores(scored_batch())
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    exact = ModelPolicy(model, torch.float32).scores(scored_batch())
    assert not torch.equal(scores, exact)


def test_positions_with_a_mask_are_refused() -> None:
    model = reward_model()
    install_score_forward(model)
    with pytest.raises(ModelError, match="takes no attention_mask"):
        model(
            input_ids=torch.ones(1, 3, dtype=torch.long),
            attention_mask=torch.ones(1, 3),
            positions=torch.tensor([2]),
        )


def test_a_language_model_takes_no_score_forward() -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    assert value_head(model) is None
    with pytest.raises(ModelError, match="no value head"):
        install_score_forward(model)


# --------------------------------------------------------------------------------------------------
# The self-test


@pytest.mark.parametrize("scale", [1.0, 1e-5], ids=["large", "small"])
def test_the_self_test_sees_a_leak_whatever_the_size_of_the_head(scale: float) -> None:
    """Scores are measured in units of their spread: a head of tiny weights hides nothing."""
    isolated, leaking = reward_model(), reward_model()

    def remember(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + 0.3 * output.cumsum(dim=1)

    leaking.model.layers[0].register_forward_hook(remember)
    results = []
    for model in (isolated, leaking):
        with torch.no_grad():
            model.score.weight.mul_(scale)
        probe = ScoreProbe()
        probe.install(model, FLAT)
        results.append(run_self_test(model, probe))
    assert results[0].difference < 1e-4 and results[0].leak == 0 and results[0].reach == 0
    assert results[0].attention_calls > 0
    assert results[1].difference > 0.1 and results[1].leak > 0.1 and results[1].reach > 1e-3
    probe = ScoreProbe()
    probe.install(leaking, FLAT)
    with pytest.raises(NotIsolatedError):
        require_isolation(leaking, None, probe)
    assert chosen_rows(isolated) == FLAT


def test_a_head_that_says_nothing_proves_nothing() -> None:
    model, probe = reward_model(), ScoreProbe()
    nn.init.zeros_(model.score.weight)
    probe.install(model, FLAT)
    with pytest.raises(NotIsolatedError, match="every token the same score"):
        require_isolation(model, None, probe)


# --------------------------------------------------------------------------------------------------
# Loading


def load(folder: Path, seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    spec = ModelSpec(path=str(folder), dtype="float32", attention="sdpa", gradient_checkpointing=False)
    return load_model(spec, locate(spec), CPU, kind="reward")


def test_a_language_model_gets_a_head_drawn_from_the_seed_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "base")
    first, again, other = load(folder), load(folder), load(folder, seed=1)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.shape == (1, 32) and float(first.score.weight.detach().std()) > 0
    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in first.state_dict().items():
        if name != "score.weight":
            assert torch.equal(weight, base[name]), name


def test_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    model = load(chat_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "reward")
    chat_tokenizer().save_pretrained(tmp_path / "reward")
    assert torch.equal(load(tmp_path / "reward", seed=5).score.weight, model.score.weight)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GraniteForCausalLM with a value head"):
        load(chat_model(tmp_path / "granite", "granite-scaled"))
    config = FAMILIES["llama"]()
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        load(tmp_path / "three")


def test_other_weights_may_not_be_missing(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "base")
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "damaged", state_dict=state)
    with pytest.raises(ModelError, match=r"1 of the \d+ weights .* model.norm.weight"):
        load(tmp_path / "damaged")
    # A reward model without its head is damaged, too: nothing is drawn in its place.
    reward = load(folder)
    whole = {name: weight for name, weight in reward.state_dict().items() if name != "score.weight"}
    reward.save_pretrained(tmp_path / "headless", state_dict=whole)
    with pytest.raises(ModelError, match=r"score\.weight"):
        load(tmp_path / "headless")


# --------------------------------------------------------------------------------------------------
# Padding


def test_padding_that_ends_no_row_stays() -> None:
    tokenizer = chat_tokenizer()
    assert choose_padding(tokenizer, 2, (2,), named=False) is None
    assert tokenizer.pad_token == "<|pad|>"


def test_padding_that_ends_rows_is_changed_to_a_special_token_that_does_not() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    note = choose_padding(tokenizer, 2, (2,), named=False)
    assert note is not None and "'<|pad|>'" in note and tokenizer.pad_token == "<|pad|>"


def test_padding_is_refused_where_the_recipe_named_it_or_nothing_is_left() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    with pytest.raises(RecipeError, match=r"model\.vocabulary\.pad_token: '<\|im_end\|>' ends rows"):
        choose_padding(tokenizer, 2, (2,), named=True)
    # The begin token is nothing to pad with, and the others end answers.
    with pytest.raises(RecipeError, match="name a new one"):
        choose_padding(tokenizer, 2, (0, 1, 2), named=False)


# --------------------------------------------------------------------------------------------------
# Methods


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_and_freeze_train_the_head() -> None:
    model = build_method(FullSpec()).apply(reward_model())
    assert all(parameter.requires_grad for parameter in model.parameters())
    names = trained_names(build_method(FreezeSpec(layers=1)).apply(reward_model()))
    assert "score.weight" in names
    assert {name.split(".")[0:3][-1] for name in names if name != "score.weight"} == {"1"}
    assert trained_names(build_method(FreezeSpec(layers=0)).apply(reward_model())) == {"score.weight"}


def test_lora_trains_the_whole_head_and_adapts_the_others() -> None:
    method = build_method(LoraSpec(rank=2, targets="all-linear"))
    model = method.apply(reward_model())
    names = trained_names(model)
    assert "base_model.model.score.modules_to_save.default.weight" in names
    assert not any("score" in name and "lora" in name for name in names)
    assert sum("lora_A" in name for name in names) == 2 * 7
    assert model.peft_config["default"].task_type == "SEQ_CLS"


@pytest.mark.parametrize("targets", [("q_proj", "score"), ".*(q_proj|score)"], ids=["names", "pattern"])
def test_lora_puts_no_adapter_on_the_head(targets: Any) -> None:
    with pytest.raises(ModelError, match="puts an adapter on score, where the value head trains as a whole"):
        build_method(LoraSpec(targets=targets)).apply(reward_model())


@pytest.mark.parametrize("spec", [FullSpec(), LoraSpec(rank=2)], ids=["full", "lora"])
def test_the_head_is_written_as_ppo_trainers_read_it(spec: FullSpec | LoraSpec, tmp_path: Path) -> None:
    method = build_method(spec)
    model = method.apply(reward_model())
    with torch.no_grad():
        parameter = dict(model.named_parameters())[next(n for n in trained_names(model) if "score" in n)]
        parameter.add_(1.0)
    method.save(model, tmp_path)
    written = load_file(tmp_path / "value_head.safetensors")
    assert set(written) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(written["v_head.summary.weight"], parameter)
    assert torch.equal(written["v_head.summary.bias"], torch.zeros(1))
    with torch.no_grad():
        expected = parameter.clone()
        parameter.zero_()
    method.load(model, tmp_path)
    assert torch.equal(parameter, expected)
    # A copy of the state, as checkpoints hold it, wins over the model.
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_value_head(tmp_path, state)
    assert torch.equal(load_file(tmp_path / "value_head.safetensors")["v_head.summary.weight"], expected + 1)


def changed(model: nn.Module) -> nn.Module:
    """The same model with all that trains moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def scores_of(model: nn.Module) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    install_score_forward(inner)
    with torch.no_grad():
        return ModelPolicy(model.eval()).scores(scored_batch())


def test_reward_adapters_are_continued_and_merged(tmp_path: Path) -> None:
    method = build_method(LoraSpec(rank=2))
    model = changed(method.apply(reward_model()))
    expected = scores_of(model)
    method.save(model, tmp_path / "first")
    fresh = reward_model()
    nn.init.normal_(fresh.score.weight)
    continued = build_method(LoraSpec(rank=2, adapters=(str(tmp_path / "first"),))).apply(
        copy.deepcopy(fresh)
    )
    torch.testing.assert_close(scores_of(continued), expected, atol=1e-5, rtol=1e-5)
    assert "base_model.model.score.modules_to_save.default.weight" in trained_names(continued)
    # Saved again it names its head no more often than the first time.
    build_method(LoraSpec(rank=2)).save(continued, tmp_path / "second")
    names = continued.peft_config["default"].modules_to_save
    assert sorted(names) == ["classifier", "score"]
    stacked_spec = LoraSpec(rank=2, adapters=(str(tmp_path / "first"),), create_new_adapter=True)
    stacked = build_method(stacked_spec).apply(copy.deepcopy(fresh))
    torch.testing.assert_close(scores_of(stacked), expected, atol=1e-5, rtol=1e-5)


def test_adapters_of_the_other_kind(tmp_path: Path) -> None:
    """A language adapter is merged below a reward model, and cannot become one; a reward adapter scores, not speaks."""
    language = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    method = build_method(LoraSpec(rank=2))
    method.save(changed(method.apply(language)), tmp_path / "language")
    folder = (str(tmp_path / "language"),)
    with pytest.raises(ModelError, match=r"no value head; set method\.create_new_adapter"):
        build_method(LoraSpec(adapters=folder)).apply(reward_model())
    before, spec = reward_model(), LoraSpec(rank=2, adapters=folder, create_new_adapter=True)
    scores = scores_of(build_method(spec).apply(reward_model()))
    assert float((scores - scores_of(before)).abs().max()) > 1e-3
    reward = build_method(LoraSpec(rank=2))
    reward.save(reward.apply(reward_model()), tmp_path / "reward")
    with pytest.raises(ModelError, match="adapter of a reward model"):
        Lora(LoraSpec(adapters=(str(tmp_path / "reward"),)), reward.vocabulary).apply(
            AutoModelForCausalLM.from_config(FAMILIES["llama"]())
        )


@pytest.mark.parametrize(
    "spec", [FullSpec(), FreezeSpec(layers=1), LoraSpec(rank=2)], ids=lambda spec: spec.type
)
def test_new_tokens_get_rows_in_a_reward_model_too(spec: Any, tmp_path: Path) -> None:
    model, tokenizer = load(chat_model(tmp_path / "base")), chat_tokenizer()
    change = extend_tokenizer(tokenizer, VocabularySpec(add=tuple(f"<new{i}>" for i in range(70))), seed=0)
    resized = resize_embeddings(model, change)
    rows = model.get_input_embeddings().weight
    assert len(rows) == resized.rows == 384 and resized.new_ids[-1] == len(tokenizer) - 1
    assert (
        np.isfinite(rows.detach().numpy()).all() and float(rows[resized.new_ids[0]].detach().abs().max()) > 0
    )
    method = build_method(spec, resized)
    trained = method.apply(model)
    install_score_forward(trained.get_base_model() if isinstance(trained, PeftModel) else trained)
    ids = np.array([5, resized.new_ids[0], 9], np.int32)
    sample = replace(random_samples([3])[0], input_ids=ids)
    batch = replace(flat_batch([sample]), rows=torch.tensor([0]))
    ModelPolicy(trained).scores(batch).sum().backward()
    moved = [
        name
        for name, p in trained.named_parameters()
        if p.grad is not None and "embed" in name and p.grad.any()
    ]
    assert moved, "no gradient reaches the rows of new tokens"
