"""New tokens: where their rows start, that exactly they train, and that they come back wherever they were recorded."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from luthier.data.collate import flat_batch
from luthier.data.template import load_template
from luthier.methods import build_method
from luthier.methods.groups import count_parameters
from luthier.methods.lora import Lora, load_adapter
from luthier.methods.token_rows import fuse_token_rows
from luthier.model.logprobs import ModelPolicy, install_target_forward
from luthier.model.vocabulary import (
    VocabularyChange,
    extend_tokenizer,
    is_tied,
    read_record,
    recorded_change,
    replay_tokenizer,
    resize_embeddings,
    token_modules,
)
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec, FreezeSpec, FullSpec, LoraSpec, VocabularySpec
from luthier.types import (
    IGNORE_INDEX,
    CheckpointError,
    Conversation,
    Message,
    ModelError,
    RecipeError,
    Sample,
)
from tests.tiny import CHATML, FAMILIES, VOCAB, random_samples, tiny_model
from tests.tiny_tokenizers import byte_level, metaspace, unigram

HIDDEN = 32
TWO = VocabularyChange(
    added=("<a>",), added_special=("<b>",), ids=(97, 98), num_before=VOCAB, num_tokens=99, seed=7
)
"""Two tokens that the tiny models have no row for."""
IDS = torch.randint(3, 99, (2, 17), generator=torch.Generator().manual_seed(0))
BIASED = "phi"
"""Its output head has a bias."""


def extended(
    family: str, change: VocabularyChange = TWO, **keys: Any
) -> tuple[PreTrainedModel, VocabularyChange]:
    model = tiny_model(family, **keys)
    return model, resize_embeddings(model, change)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def shake(model: nn.Module, seed: int = 1) -> None:
    """Stands for training: everything that trains moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---- the tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace, unigram])
def test_tokens_are_added_at_the_end_and_survive_saving(make: Any, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = make()
    size = len(tokenizer)
    words = tuple(tokenizer("a tool", add_special_tokens=False)["input_ids"])
    change = extend_tokenizer(
        tokenizer,
        VocabularySpec(
            add=("<calc>",), add_special=("<|tool|>",), descriptions={"<calc>": "a tool"}, noise=0.5
        ),
        seed=3,
    )
    assert change == VocabularyChange(
        ("<calc>",), ("<|tool|>",), (size, size + 1), size, size + 2, None, (("<calc>", words),), 0.5, 3
    )
    assert change.notes == ()
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one("two<calc> of<|tool|>them", add_special_tokens=False)["input_ids"]
        assert [index for index in ids if index >= size] == [size, size + 1]
        plain = one.decode(ids, skip_special_tokens=True)
        assert "<calc>" in plain and "<|tool|>" not in plain


def test_pad_token() -> None:
    new, old, unnamed = byte_level(), byte_level(), byte_level()
    change = extend_tokenizer(new, VocabularySpec(add=("<x>",), pad_token="<pad>"), seed=0)
    assert change.added_special == ("<pad>",) and change.pad_token == "<pad>"
    assert new.pad_token_id == change.ids[1] == len(new) - 1
    change = extend_tokenizer(old, VocabularySpec(pad_token="<unk>"), seed=0)
    assert change.ids == () and not change.is_needed and old.pad_token == "<unk>"
    assert extend_tokenizer(unnamed, VocabularySpec(), seed=0).pad_token is None
    template = load_template(unnamed, DataSpec(train=("x",), template="default"))
    assert unnamed.pad_token == template.tokenizer.eos_token


def test_tokens_that_exist_are_left_alone_and_named() -> None:
    tokenizer = byte_level(["<|tool|>"])
    tokenizer.add_tokens(["<plain>"])
    before = tokenizer.backend_tokenizer.to_str()
    piece = min(
        token for token in tokenizer.get_vocab() if token.isalpha() and token.isascii() and len(token) > 2
    )
    change = extend_tokenizer(
        tokenizer, VocabularySpec(add=(piece,), add_special=("<|tool|>", "<plain>")), seed=0
    )
    assert change.ids == () and not change.is_needed
    assert tokenizer.backend_tokenizer.to_str() == before
    word, tool, plain = (tokenizer.get_vocab()[token] for token in (piece, "<|tool|>", "<plain>"))
    assert change.notes == (
        f"model.vocabulary: {piece!r} is in the vocabulary already (id {word}); it stays as it is",
        f"model.vocabulary: '<|tool|>' is in the vocabulary already (id {tool}); it stays as it is",
        f"model.vocabulary: '<plain>' is in the vocabulary already, as an ordinary token (id {plain}); it stays as it is",
    )


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"add": ["<a>", ""]}, "a token cannot be empty"),
        ({"pad_token": ""}, "a token cannot be empty"),
        ({"add": ["<a>", "<b>", "<a>"]}, "the token '<a>' is named twice"),
        ({"add": ["<a>"], "add_special": ["<a>"]}, "the token '<a>' is named twice"),
        ({"add": ["<p>"], "pad_token": "<p>"}, "the padding token '<p>' is special"),
        ({"add": ["<a>"], "descriptions": {"<b>": "x"}}, "descriptions: '<b>' is not a new token"),
        ({"add": ["<a>"], "descriptions": {"<a>": " "}}, "descriptions: that of '<a>' is empty"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_recipe_errors(vocabulary: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe({"model": {"path": "x", "vocabulary": vocabulary}, "data": {"train": ["x"]}})
    assert "model.vocabulary" in str(caught.value)


def test_new_special_tokens_in_user_text_stay_text() -> None:
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], CHATML)
    tokenizer.eos_token = "<|im_end|>"
    change = extend_tokenizer(tokenizer, VocabularySpec(add=("<x>",), add_special=("<|call|>",)), seed=0)
    ordinary, special = change.ids
    talk = Conversation((Message("user", "Say <|call|><x>"), Message("assistant", "Yes.")))
    ids = {}
    for parse in (False, True):
        spec = DataSpec(train=("x",), parse_special_tokens=parse)
        template = load_template(tokenizer, spec)
        ids[parse] = template.encode(talk).input_ids
        assert template.decode(ids[parse]) == template.rendering(talk)
    assert special not in ids[False] and ids[False].count(ordinary) == 1
    assert ids[True].count(special) == 1 and ids[True].count(ordinary) == 1


# ---- where the rows start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_new_rows_start_at_the_noisy_mean(family: str) -> None:
    """LLaMA-Factory's start in closed form: mean of the old rows plus N(0, 1/D), up to a multiple of 64 rows."""
    before = tiny_model(family)
    model, change = extended(family)
    assert (change.rows_before, change.rows, change.new_ids) == (VOCAB, 128, (97, 98))
    assert model.config.get_text_config().vocab_size == 128
    assert is_tied(model) == is_tied(before)
    generator = torch.Generator().manual_seed(TWO.seed)
    old, new = token_modules(before), token_modules(model)
    for index in range(1 if is_tied(model) else 2):
        noise = torch.randn(31, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
        weight = old[index].weight
        assert torch.equal(new[index].weight[:VOCAB], weight)
        mean = weight.double().mean(0).float()
        torch.testing.assert_close(new[index].weight[VOCAB:], mean + noise, rtol=1e-6, atol=1e-7)
    assert (new[1].bias is None) == (old[1].bias is None)
    if old[1].bias is not None:
        assert torch.equal(new[1].bias[:VOCAB], old[1].bias)
        torch.testing.assert_close(new[1].bias[VOCAB:], old[1].bias.mean().expand(31))
    old_ids = IDS % VOCAB
    torch.testing.assert_close(
        logits(model, old_ids)[..., :VOCAB], logits(before, old_ids), rtol=1e-5, atol=1e-5
    )


def test_a_tied_head_with_a_bias_grows_whole() -> None:
    config = FAMILIES[BIASED]()
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-1, 2, VOCAB))
    resize_embeddings(model, TWO)
    assert is_tied(model)
    torch.testing.assert_close(model.lm_head.bias[VOCAB:], torch.full((31,), 0.5))
    assert torch.equal(model.lm_head.bias[:VOCAB], torch.linspace(-1, 2, VOCAB))
    assert logits(model).shape[-1] == 128


def test_rows_depend_on_the_seed_alone() -> None:
    first = extended("llama")[0]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = tiny_model("llama")
    torch.set_rng_state(state)
    resize_embeddings(second, TWO)
    assert torch.equal(torch.get_rng_state(), state), "nothing else is drawn"
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    other = tiny_model("llama")
    resize_embeddings(other, VocabularyChange(("<a>",), ("<b>",), (97, 98), VOCAB, 99, seed=8))
    assert not torch.equal(first.lm_head.weight[97:], other.lm_head.weight[97:])


def test_descriptions_and_no_noise() -> None:
    """Each matrix takes the mean of its own rows; ids that have no row yet are no words."""
    change = VocabularyChange(
        ("<a>",), ("<b>",), (97, 98), VOCAB, 99, None, (("<b>", (5, 9, 9)), ("<a>", (120,))), noise=0.0
    )
    model, _ = extended("llama", change)
    for module in token_modules(model):
        weight = module.weight.detach()
        torch.testing.assert_close(weight[97], weight[:VOCAB].mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weight[98], (weight[5] + 2 * weight[9]) / 3)
        torch.testing.assert_close(weight[100], weight[127])


def test_bfloat16_rows_are_rounded_once() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    weight = model.lm_head.weight.detach().clone()
    resize_embeddings(model, VocabularyChange(("<a>",), (), (97,), VOCAB, 98, noise=0.0))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight[97], weight.double().mean(0).float().bfloat16())


def test_spare_rows_are_used_and_started() -> None:
    """A model with more rows than tokens does not grow; the tokenizer had 90 tokens, so rows 90 and 91 are new."""
    before = tiny_model("llama").lm_head.weight
    change = VocabularyChange(("<a>", "<c>"), (), (90, 91), 90, 92, noise=0.0)
    model, resized = extended("llama", change)
    assert resized.rows == resized.rows_before == VOCAB and resized.new_ids == (90, 91)
    weight = model.lm_head.weight
    torch.testing.assert_close(weight[90:92], before[:90].mean(0).expand(2, -1), rtol=1e-6, atol=1e-6)
    assert torch.equal(weight[:90], before[:90]) and torch.equal(weight[92:], before[92:])


def test_resize_without_new_tokens() -> None:
    wide = VocabularyChange(num_before=99, num_tokens=99)
    model, change = extended("llama", wide)
    assert (change.rows, change.new_ids, change.is_needed) == (VOCAB, (), False)
    model, change = extended("llama", VocabularyChange(num_before=99, num_tokens=99, resize=True))
    assert (change.rows, change.new_ids) == (128, (97, 98))
    assert len(model.lm_head.weight) == 128


# ---- what trains ----------------------------------------------------------------------------------------------


def samples_with_the_new() -> list[Sample]:
    """Random samples in each of which both new tokens are read and learnt."""
    samples = random_samples([19, 7, 12], vocab_size=VOCAB)
    for sample in samples:
        sample.input_ids[[2, 4]] = 97, 98
        sample.weights[[2, 3, 4, 5]] = 1.0
    return samples


def dense_gradients(family: str, change: VocabularyChange, samples: Any) -> list[Tensor]:
    """Gradients of the token matrices by the model's own forward, one sample after another, no adapter."""
    model = tiny_model(family, "eager")
    resize_embeddings(model, change)
    model.eval()
    loss = torch.zeros(())
    for sample in samples:
        ids = torch.tensor(sample.input_ids, dtype=torch.long)[None]
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].log_softmax(-1)
        targets = ids[0, 1:].masked_fill(torch.tensor(sample.weights[1:]) <= 0, IGNORE_INDEX)
        loss = loss + nn.functional.nll_loss(out, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    return [module.weight.grad for module in token_modules(model)[: 1 if is_tied(model) else 2]]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != BIASED])
def test_only_the_new_rows_train_with_the_gradients_of_a_dense_model(family: str) -> None:
    samples = samples_with_the_new()
    expected = dense_gradients(family, TWO, samples)
    model, change = extended(family)
    tied = is_tied(model)
    peft_model = build_method(LoraSpec(rank=2), change).apply(model)
    install_target_forward(peft_model.get_base_model())
    ModelPolicy(peft_model.eval()).logprobs(flat_batch(samples)).logprobs.sum().neg().backward()
    trained = [
        (name, p) for name, p in peft_model.named_parameters() if p.requires_grad and ".lora_" not in name
    ]
    assert len(trained) == len(expected) == (1 if tied else 2)
    for (name, parameter), gradient in zip(trained, expected, strict=True):
        assert parameter.shape == (2, HIDDEN), name
        assert all(gradient[97:99].abs().amax(1) > 0)
        torch.testing.assert_close(
            parameter.grad, gradient[97:99], rtol=1e-3, atol=1e-4 * float(gradient[97:99].abs().max())
        )


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_gradient_checkpointing_reaches_the_rows(family: str) -> None:
    """The same gradients, of rows and adapters, whether the layers are computed again or not."""
    batch = flat_batch(samples_with_the_new())
    results = []
    for checkpointing in (False, True):
        model, change = extended(family)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        peft_model = build_method(LoraSpec(rank=2), change).apply(model).train()
        shake(peft_model)
        install_target_forward(peft_model.get_base_model())
        ModelPolicy(peft_model).logprobs(batch).logprobs.sum().neg().backward()
        results.append({n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(results[1][name], gradient)


def test_a_head_with_a_bias_trains_whole() -> None:
    """PEFT's trained rows would leave the bias out of every logit."""
    samples = samples_with_the_new()
    expected = dense_gradients(BIASED, TWO, samples)
    model, change = extended(BIASED)
    peft_model = build_method(LoraSpec(rank=2), change).apply(model)
    install_target_forward(peft_model.get_base_model())
    ModelPolicy(peft_model.eval()).logprobs(flat_batch(samples)).logprobs.sum().neg().backward()
    trained = {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad and ".lora_" not in n}
    (rows,) = (grad for name, grad in trained.items() if "trainable_tokens_delta" in name)
    (head,) = (grad for name, grad in trained.items() if name.endswith("modules_to_save.default.weight"))
    torch.testing.assert_close(rows, expected[0][97:99], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head, expected[1], rtol=1e-3, atol=1e-4)
    assert len(trained) == 3


def test_a_tied_head_with_a_bias_trains_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def tied() -> Any:
        config = FAMILIES[BIASED]()
        config.tie_word_embeddings = True
        return config

    monkeypatch.setitem(FAMILIES, "tied-and-biased", tied)
    samples = samples_with_the_new()
    (expected,) = dense_gradients("tied-and-biased", TWO, samples)
    model, change = extended("tied-and-biased")
    peft_model = build_method(LoraSpec(rank=2), change).apply(model)
    install_target_forward(peft_model.get_base_model())
    ModelPolicy(peft_model.eval()).logprobs(flat_batch(samples)).logprobs.sum().neg().backward()
    (gradient,) = (p.grad for n, p in peft_model.named_parameters() if p.requires_grad and ".lora_" not in n)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3-window", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_light_rows_are_those_of_peft(family: str, dtype: torch.dtype) -> None:
    """Same logits and gradients as PEFT's own layer, which copies the whole matrix."""
    model, _ = extended(family)
    names = {module: name for name, module in model.named_modules()}
    rows = {names[module]: [97, 98] for module in token_modules(model)[: 1 if is_tied(model) else 2]}
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=rows)
    plain = get_peft_model(model.to(dtype), config)
    shake(plain)
    light = copy.deepcopy(plain)
    assert fuse_token_rows(light) == 2
    results = []
    for one in (plain.eval(), light.eval()):
        out = one(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        out.float().square().mean().backward()
        gradients = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
        results.append((out, gradients))
    (out, gradients), (other, others) = results
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    torch.testing.assert_close(other, out, **exact)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = float(gradient.float().abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=exact["rtol"], atol=exact["atol"] * scale)
    with plain.disable_adapter(), light.disable_adapter():
        assert torch.equal(logits(plain), logits(light))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_named_matrices_train_whole(family: str) -> None:
    """`modules_to_save` as LLaMA-Factory writes it; a tied matrix stays one matrix."""
    samples = samples_with_the_new()
    expected = dense_gradients(family, TWO, samples)
    model, change = extended(family)
    spec = LoraSpec(rank=2, modules_to_save=("embed_tokens", "lm_head"))
    peft_model = build_method(spec, change).apply(model)
    install_target_forward(peft_model.get_base_model())
    ModelPolicy(peft_model.eval()).logprobs(flat_batch(samples)).logprobs.sum().neg().backward()
    trained = [p.grad for n, p in peft_model.named_parameters() if p.requires_grad and ".lora_" not in n]
    assert len(trained) == len(expected)
    for gradient, reference in zip(trained, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max()))


def test_freeze_trains_the_embeddings_where_tokens_were_added() -> None:
    model, change = extended("llama")
    build_method(FreezeSpec(layers=1), change).apply(model)
    assert model.model.embed_tokens.weight.requires_grad and model.lm_head.weight.requires_grad
    plain = build_method(FreezeSpec(layers=1)).apply(tiny_model("llama"))
    assert count_parameters(model).trainable == count_parameters(plain).trainable + 2 * 128 * HIDDEN


# ---- saved, replayed, merged ----------------------------------------------------------------------------------


SPECS: dict[str, LoraSpec] = {
    "rows": LoraSpec(rank=2),
    "whole": LoraSpec(rank=2, modules_to_save=("embed_tokens", "lm_head")),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", BIASED])
def test_an_adapter_brings_its_rows_with_it(family: str, kind: str, tmp_path: Path) -> None:
    """Saved, then attached to the plain base by each of the ways: continued, merged, loaded, by PEFT alone."""
    model, change = extended(family)
    method = build_method(SPECS[kind], change)
    trained = method.apply(model)
    shake(trained)
    expected = logits(trained)
    method.save(trained, tmp_path / "one")
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    if kind == "rows" and family != BIASED:
        others = {name: tensor.shape for name, tensor in saved.items() if ".lora_" not in name}
        assert set(others.values()) == {(2, HIDDEN)} and len(others) == (
            1 if is_tied(tiny_model(family)) else 2
        )

    torch.testing.assert_close(logits(load_adapter(tiny_model(family), tmp_path / "one")), expected)

    record = recorded_change([str(tmp_path / "one")])
    assert record == change
    spec = SPECS[kind].model_copy(update={"adapters": (str(tmp_path / "one"),)})
    base = tiny_model(family)
    continued = build_method(spec, resize_embeddings(base, record)).apply(base)
    torch.testing.assert_close(logits(continued), expected)
    assert count_parameters(continued) == count_parameters(trained)

    base = tiny_model(family)
    resized = resize_embeddings(base, record)
    merged = Lora(LoraSpec(), resized).merged(base, str(tmp_path / "one"))
    close = {"rtol": 1e-4, "atol": 1e-4}  # a sum of two products is not the product of a sum, in float32
    torch.testing.assert_close(logits(merged), expected, **close)
    assert is_tied(merged) == is_tied(tiny_model(family))
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.vocab_size == 128
    torch.testing.assert_close(logits(plain), expected, **close)

    if kind == "rows":
        plain = tiny_model(family)
        plain.resize_token_embeddings(128)
        alone = PeftModel.from_pretrained(plain, str(tmp_path / "one"))
        torch.testing.assert_close(logits(alone)[..., :99], expected[..., :99], **close)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_stack_of_adapters(family: str, tmp_path: Path) -> None:
    """A second adapter on top of a first: its rows replace the first's, and both together give its function."""
    model, change = extended(family)
    first = build_method(LoraSpec(rank=2), change)
    one = first.apply(model)
    shake(one)
    first.save(one, tmp_path / "one")
    stack = (str(tmp_path / "one"),)

    base = tiny_model(family)
    record = recorded_change(stack)
    second = build_method(
        LoraSpec(rank=2, adapters=stack, create_new_adapter=True), resize_embeddings(base, record)
    )
    two = second.apply(base)
    torch.testing.assert_close(logits(two), logits(one), rtol=1e-4, atol=1e-4)
    shake(two, seed=2)
    second.save(two, tmp_path / "two")

    base = tiny_model(family)
    stack = (*stack, str(tmp_path / "two"))
    record = recorded_change(stack)
    both = build_method(LoraSpec(rank=2, adapters=stack), resize_embeddings(base, record)).apply(base)
    torch.testing.assert_close(logits(both), logits(two), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", BIASED])
def test_load_puts_the_rows_back_bit_by_bit(family: str, kind: str, tmp_path: Path) -> None:
    model, change = extended(family)
    method = build_method(SPECS[kind], change)
    trained = method.apply(model)
    shake(trained)
    method.save(trained, tmp_path)
    fresh_base, fresh_change = extended(family)
    again = build_method(SPECS[kind], fresh_change)
    resumed = again.apply(fresh_base)
    assert not torch.equal(logits(resumed), logits(trained))
    again.load(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(trained))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in saved if ".lora_" not in name)
    del saved[name]
    save_file(saved, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the adapter: missing"):
        again.load(resumed, tmp_path)


# ---- what does not fit ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the tiny Llama with two new tokens."""
    model, change = extended("llama")
    method = build_method(LoraSpec(rank=2), change)
    method.save(method.apply(model), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_record_is_of_another_base(adapter: Path) -> None:
    with pytest.raises(ModelError, match="recorded on a model of 97 embedding rows, and this one has 128"):
        load_adapter(extended("llama")[0], adapter)


def test_a_model_without_the_rows(adapter: Path) -> None:
    with pytest.raises(ModelError, match="was trained with new tokens that this model lacks"):
        build_method(LoraSpec(adapters=(str(adapter),))).apply(tiny_model("llama"))


def test_an_older_adapter_cannot_learn_new_rows(tmp_path: Path) -> None:
    older = build_method(LoraSpec(rank=2))
    older.save(older.apply(tiny_model("llama")), tmp_path)
    assert read_record(tmp_path) is None
    model, change = extended("llama")
    with pytest.raises(ModelError, match=r"has no rows for them; set method\.create_new_adapter: true"):
        build_method(LoraSpec(adapters=(str(tmp_path),)), change).apply(model)
    model, change = extended("llama")
    spec = LoraSpec(rank=2, adapters=(str(tmp_path),), create_new_adapter=True)
    torch.testing.assert_close(
        logits(build_method(spec, change).apply(model)), logits(extended("llama")[0]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), r".*(q_proj|embed_tokens)"])
def test_no_adapter_where_rows_train(targets: Any) -> None:
    model, change = extended("llama")
    with pytest.raises(ModelError, match=r"method\.targets=.* where the rows of the new tokens"):
        build_method(LoraSpec(targets=targets), change).apply(model)


def test_resume_with_another_vocabulary(adapter: Path, tmp_path: Path) -> None:
    for change in (VocabularyChange(), VocabularyChange(("<c>",), (), (97,), VOCAB, 98)):
        model, resized = extended("llama", change)
        method = build_method(LoraSpec(rank=2), resized)
        with pytest.raises(CheckpointError, match=r"was trained with another model\.vocabulary"):
            method.load(method.apply(model), adapter)
    full, (model, resized) = build_method(FullSpec()), extended("llama")
    full.save(model, tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"has the shape \(128, 32\) there and \(97, 32\) here"):
        full.load(tiny_model("llama"), tmp_path / "full")


def test_a_damaged_record(adapter: Path) -> None:
    file = adapter / "vocabulary.json"
    good = json.loads(file.read_text())
    for bad in (
        "{",
        "[]",
        json.dumps(good | {"stranger": 1}),
        json.dumps({k: good[k] for k in ("version",)}),
    ):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match=r"vocabulary\.json is damaged"):
            read_record(adapter)
    file.write_text(json.dumps(good | {"version": 2}))
    with pytest.raises(CheckpointError, match="has version 2"):
        read_record(adapter)


def recorded(folder: Path, change: VocabularyChange) -> str:
    from luthier.model.vocabulary import write_record

    folder.mkdir()
    write_record(folder, change)
    return str(folder)


def test_the_tokenizer_replays_a_record(tmp_path: Path) -> None:
    spec = VocabularySpec(add=("<a>",), add_special=("<b>",), pad_token="<pad>")
    first, second, third = byte_level(), byte_level(), byte_level()
    change = extend_tokenizer(first, spec, seed=5)
    record = recorded_change([recorded(tmp_path / "one", change)])
    assert record == change
    for tokenizer, also in ((second, None), (third, spec), (first, spec)):
        assert replay_tokenizer(tokenizer, record, also) == change
        assert tokenizer.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
        assert tokenizer.pad_token == "<pad>"


def test_records_and_recipes_that_disagree(tmp_path: Path) -> None:
    base = byte_level()
    one = extend_tokenizer(byte_level(), VocabularySpec(add=("<a>",), add_special=("<b>",)), seed=5)
    other = extend_tokenizer(byte_level(), VocabularySpec(add=("<a>", "<b>")), seed=5)
    folders = [recorded(tmp_path / name, change) for name, change in (("one", one), ("other", other))]
    (tmp_path / "plain").mkdir()
    assert recorded_change([str(tmp_path / "plain"), folders[0]]) == one
    with pytest.raises(
        ModelError, match=r"trained with different new tokens \('<a>', '<b>' \(special\); '<a>', '<b>'\)"
    ):
        recorded_change(folders)
    with pytest.raises(
        ModelError, match=r"names the new tokens '<a>', '<b>', but .* with '<a>', '<b>' \(special\)"
    ):
        replay_tokenizer(base, one, VocabularySpec(add=("<a>", "<b>")))
    with pytest.raises(ModelError, match="names the new tokens none"):
        replay_tokenizer(base, one, VocabularySpec())
    assert len(base) == len(byte_level())
    with pytest.raises(
        ModelError, match=r"trained with '<a>' as token \d+, and this tokenizer has it as \d+"
    ):
        replay_tokenizer(metaspace(), one, None)
