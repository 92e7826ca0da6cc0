"""What `open_model` loads answers as plain transformers and PEFT do with the same parts, token for token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import luthier
from luthier.answering import Answerer, open_model
from luthier.recipe.schema import EMBEDDED_MODEL, GenerationSpec
from luthier.types import Conversation, DataError, GenerationError, Message, ModelError, RecipeError
from tests.reward import reward_recipe
from tests.tiny import chat_model, write_alpaca

LENGTH = 16
ASKED = ("Count to 7.", "Count to 3.", "Hello", "a <calc> b")
LORA: dict[str, Any] = {"type": "lora", "rank": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
    "lora": LORA,
    "rslora": {**LORA, "rslora": True},
    "dora": {**LORA, "dora": True},
    "pissa": {**LORA, "init": "pissa"},
    "head": {**LORA, "modules_to_save": ["lm_head"]},
    "tokens": {**LORA, "trainable_tokens": [5, 6, 40]},
    "oft": {"type": "oft", "block_size": 8},
    "ia3": {"type": "ia3"},
    "loha": {"type": "peft", "config": {"peft_type": "LOHA", "r": 4}},
}
Answers = list[list[int]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole blocks of 64 weights, for the quantized ones, and weights large enough to have opinions."""
    torch.set_num_threads(1)
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return chat_model(tmp_path_factory.mktemp("base"), initializer_range=0.1, **shape)


def recipe_in(folder: Path, base: Path, method: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    write_alpaca(folder / "rows.json", 16)
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": {"train": ["rows.json"], "directory": str(folder), "cache": str(folder / "c")},
        "method": dict(method),
        "optim": {"lr": 0.2 if method["type"] == "ia3" else 0.02},
        "train": {"rows_per_device": 4, "epochs": 2, "plots": False, "output": str(folder / "run")},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    return recipe


def trained(folder: Path, base: Path, method: Mapping[str, Any] = LORA, **sections: Any) -> Path:
    return luthier.train(recipe_in(folder, base, method, **sections), quiet=True).output


def plain(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)


def with_adapter(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, str(folder))


def expected(model: Any, tokens: Path, asked: Sequence[str] = ASKED) -> Answers:
    """Greedy answers by transformers alone, the template and the end token those that were saved in `tokens`."""
    tokenizer, found = AutoTokenizer.from_pretrained(tokens), []
    for text in asked:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        with torch.no_grad():
            row = model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=LENGTH,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = row[0, ids.shape[1] :].tolist()
        end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else len(answer)
        found.append(answer[:end])
    return found


def answers(answerer: Answerer, asked: Sequence[str] = ASKED, adapter: str | None = None) -> Answers:
    requests = [
        answerer.request(
            Conversation((Message("user", text),)), adapter=adapter, max_new_tokens=LENGTH, temperature=0.0
        )
        for text in asked
    ]
    found = dict(answerer.engine.answers(requests))
    return [found[number].ids for number in range(len(requests))]


# --------------------------------------------------------------------------------------------------
# One target, one model


@pytest.mark.parametrize("name", METHODS)
def test_a_run_answers_as_its_parts_do(name: str, base: Path, tmp_path: Path) -> None:
    """The folder of a run, that of a checkpoint of it, the recipe that trained it, and what it is exported to."""
    sections = {"train": {"save_every": 4}}
    tree = recipe_in(tmp_path, base, METHODS[name], **sections)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(tree))
    run = luthier.train(file, quiet=True).output
    whole = METHODS[name]["type"] in ("full", "freeze")
    model = plain(run) if whole else with_adapter(plain(base), run)
    wanted = expected(model, run)
    assert answers(open_model(run)) == wanted
    assert answers(open_model(file)) == wanted
    assert wanted != expected(plain(base), base), "the training changed nothing"
    early = run / "checkpoint-4"
    model = plain(early) if whole else with_adapter(plain(base), early)
    assert answers(open_model(early)) == expected(model, early)
    if not whole:
        away = tmp_path / "elsewhere" / "adapter"
        shutil.copytree(run, away, ignore=shutil.ignore_patterns("checkpoint-*", "recipe.yaml", "run.json"))
        opened = open_model(away)
        assert opened.trained.recipe is None and answers(opened) == wanted
    if name in ("full", "lora"):
        luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True)
        assert answers(open_model(tmp_path / "merged")) == wanted


def test_a_quantized_base_answers_as_bitsandbytes_does(base: Path, tmp_path: Path) -> None:
    quantization = {"type": "bitsandbytes", "bits": 4}
    model = {"path": str(base), "quantization": quantization}
    run = trained(tmp_path, base, model=model)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    live = with_adapter(AutoModelForCausalLM.from_pretrained(base, quantization_config=config), run)
    opened = open_model(run)
    assert isinstance(opened.engine.model, PeftModel), "merging into rounded weights rounds them anew"
    assert answers(opened) == expected(live, run)
    away = tmp_path / "elsewhere"
    shutil.copytree(run, away, ignore=shutil.ignore_patterns("checkpoint-*", "recipe.yaml", "run.json"))
    assert answers(open_model(away)) == expected(live, run)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_new_tokens_are_asked_and_answered(method: str, quantized: bool, base: Path, tmp_path: Path) -> None:
    if quantized and method == "full":
        return
    vocabulary = {"add": ["<calc>"], "add_special": ["<|note|>"]}
    model: dict[str, Any] = {"path": str(base), "vocabulary": vocabulary}
    if quantized:
        model["quantization"] = {"type": "bitsandbytes", "bits": 4}
    tree = recipe_in(tmp_path, base, METHODS[method], model=model)
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(
        json.dumps([{**row, "output": "<calc> " + row["output"]} for row in rows])
    )
    run = luthier.train(tree, quiet=True).output
    luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True)
    opened = open_model(run)
    assert answers(opened) == expected(plain(tmp_path / "merged"), tmp_path / "merged")
    new = AutoTokenizer.from_pretrained(run).convert_tokens_to_ids("<calc>")
    prompt = opened.request(Conversation((Message("user", ASKED[3]),))).prompt
    assert new in prompt


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("pissa", "dora"), ("oft", "lora")])
def test_adapters_below_the_last_one(first: str, second: str, base: Path, tmp_path: Path) -> None:
    below = trained(tmp_path / "a", base, METHODS[first])
    method = {**METHODS[second], "adapters": [str(below)], "create_new_adapter": True}
    run = trained(tmp_path / "b", base, method)
    merged = with_adapter(plain(base), below).merge_and_unload()
    wanted = expected(with_adapter(merged, run), run)
    assert answers(open_model(run)) == wanted
    assert wanted != expected(with_adapter(plain(base), run), run), "the one below says nothing"


def test_a_bare_model_is_itself(base: Path) -> None:
    assert answers(open_model(base)) == expected(plain(base), base)
    assert open_model(base).adapters == ()


def test_a_merged_adapter_cannot_be_taken_off(base: Path, tmp_path: Path) -> None:
    opened = open_model(trained(tmp_path, base))
    with pytest.raises(GenerationError, match="there is no 'base'; this model is one whole"):
        answers(opened, adapter="base")


def test_a_recipe_that_names_a_model_and_adapters(base: Path, tmp_path: Path) -> None:
    """Of a file that trains nothing, and of a value: that model with those adapters, and its own settings."""
    run = trained(tmp_path / "a", base)
    file = tmp_path / "chat.yaml"
    file.write_text(
        f"model: {{path: {base}}}\nmethod: {{adapters: [{run}]}}\ngeneration: {{max_new_tokens: 3, temperature: 0}}\n"
    )
    opened = open_model(file)
    assert answers(opened) == expected(with_adapter(plain(base), run), run)
    assert opened.settings().max_new_tokens == 3 and opened.settings(max_new_tokens=5).max_new_tokens == 5
    file.write_text(f"model: {{path: {base}}}\ngeneration: {{top_k: 3}}\n")
    assert answers(open_model(file)) == expected(plain(base), base)
    with pytest.raises(RecipeError, match="--base: a recipe names its own model"):
        open_model(file, base=str(base))
    with pytest.raises(RecipeError, match="only answers; run `luthier chat` with it"):
        luthier.train(file, quiet=True)


def test_a_recipe_that_only_answers_comes_before_the_run_that_it_names(base: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "a", base, generation={"top_k": 5, "top_p": 0.5})
    file = tmp_path / "chat.yaml"
    file.write_text(f"model: {{path: {base}}}\nmethod: {{adapters: [{run}]}}\ngeneration: {{top_k: 7}}\n")
    assert (open_model(file).spec.top_k, open_model(file).spec.top_p) == (7, 0.5)


def test_a_template_for_a_model_without_one(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        open_model(bare)
    assert open_model(bare, template="chatml").template.name == "chatml"
    run = trained(tmp_path / "a", base)
    with pytest.raises(RecipeError, match="answers with the template that it was trained with"):
        open_model(run, template="chatml")


def test_a_llamafactory_file_to_chat_with(base: Path, tmp_path: Path) -> None:
    """Its model, adapter and template, drawn as that tool draws where the file says nothing."""
    run = trained(tmp_path / "a", base)
    file = tmp_path / "chat.yaml"
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": str(run), "infer_backend": "huggingface"}
    file.write_text(json.dumps(keys))
    opened = open_model(file)
    assert answers(opened) == expected(with_adapter(plain(base), run), run)
    settings = opened.settings()
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.95, 0.7, 50)
    assert settings.max_new_tokens == 1024 and open_model(run).settings().max_new_tokens == 512
    file.write_text(json.dumps({**keys, "do_sample": False, "max_new_tokens": 6}))
    settings = open_model(file).settings()
    assert (settings.temperature, settings.max_new_tokens) == (0.0, 6)
    # Of a bare model, with a template by its name.
    file.write_text(json.dumps({"model_name_or_path": str(base), "template": "qwen"}))
    opened = open_model(file)
    assert opened.template.name == "qwen" and opened.template.pieces
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.decode(opened.request(Conversation((Message("user", "Hi"),))).prompt)
    assert text.startswith("<|im_start|>system\nYou are Qwen") and text.endswith("<|im_start|>assistant\n")
    wrong = tmp_path / "wrong"
    file.write_text(json.dumps({**keys, "adapter_name_or_path": str(wrong)}))
    with pytest.raises(ModelError, match="no such folder"):
        open_model(file)


def test_generation_of_the_recipe_is_the_default_of_calls(base: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, base, generation={"temperature": 0.6, "stop": ["7"], "max_new_tokens": 9})
    opened = open_model(run)
    settings = opened.settings()
    assert (settings.temperature, settings.stop, settings.max_new_tokens) == (0.6, ("7",), 9)
    other = open_model(run, generation=GenerationSpec(top_k=4, do_sample=True))
    assert (other.settings().top_k, other.settings().stop) == (4, ())
    conversation = Conversation((Message("user", "Count to 9."),))
    plainly = open_model(run, generation=GenerationSpec())
    [(_, free)] = plainly.engine.answers([plainly.request(conversation, temperature=0.0)])
    text = plainly.text(free)
    assert len(text) > 4
    [(_, cut)] = plainly.engine.answers([plainly.request(conversation, temperature=0.0, stop=(text[3],))])
    assert plainly.text(cut) == text[: text.index(text[3])]


@pytest.mark.slow
def test_the_embedded_model_by_its_name(smollm2: Path) -> None:
    asked = ("What is the capital of France?",)
    opened = open_model(EMBEDDED_MODEL)
    found = answers(opened, asked)
    assert found == expected(plain(smollm2).float(), smollm2, asked)
    assert "Paris" in opened.text(found[0])


# --------------------------------------------------------------------------------------------------
# What does not fit together


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    run = trained(tmp_path / "a", own)
    shutil.copytree(base, tmp_path / "moved")
    assert answers(open_model(run, base=str(tmp_path / "moved"))) == answers(open_model(run))
    other = chat_model(tmp_path / "other", hidden_size=64, intermediate_size=128, head_dim=16)
    with pytest.raises(ModelError, match=r"is not the base that .* was trained on"):
        open_model(run, base=str(other))
    shutil.rmtree(own)
    shutil.copytree(other, own)
    with pytest.raises(ModelError, match=r"is not the base that .* was trained on"):
        open_model(run)
    shutil.rmtree(own)
    with pytest.raises(ModelError, match="no such folder"):
        open_model(run)
    with pytest.raises(RecipeError, match="a whole model, which has no model below it"):
        open_model(base, base=str(base))


def test_what_is_no_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        open_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        open_model(tmp_path / "empty")


def test_a_reward_model_says_what_it_is(tmp_path: Path) -> None:
    run = luthier.train(reward_recipe(tmp_path, LORA), quiet=True).output
    assert open_model(run).kind == "reward"


# --------------------------------------------------------------------------------------------------
# Several adapters on one base


def test_adapters_by_name_answer_as_each_alone(base: Path, tmp_path: Path) -> None:
    runs = {
        "first": trained(tmp_path / "a", base),
        "second": trained(tmp_path / "b", base, METHODS["dora"], optim={"lr": 0.03}),
        "third": trained(tmp_path / "c", base, {**LORA, "rank": 2}, optim={"lr": 0.01}),
    }
    alone = {name: expected(with_adapter(plain(base), run), run) for name, run in runs.items()}
    alone["base"] = expected(plain(base), base)
    assert len({str(one) for one in alone.values()}) == 4
    further = {name: runs[name] for name in ("second", "third")}
    opened = open_model(runs["first"], adapters=further)
    assert opened.adapters == ("default", "second", "third")
    assert answers(opened) == answers(opened, adapter="default") == alone["first"]
    for name in ("second", "third", "base"):
        assert answers(opened, adapter=name) == alone[name]
    # On a bare model the first is the default; all of them in one batch.
    opened = open_model(base, adapters=runs)
    assert opened.adapters == tuple(runs) and answers(opened) == alone["first"]
    names = [*runs, "base"]
    requests = [
        opened.request(Conversation((Message("user", text),)), adapter=name, max_new_tokens=LENGTH)
        for name in names
        for text in ASKED
    ]
    found = dict(opened.engine.answers(requests))
    every = [found[number].ids for number in range(len(requests))]
    assert every == [ids for name in names for ids in alone[name]]
    with pytest.raises(GenerationError, match="there is no 'fourth'; choose from"):
        answers(opened, adapter="fourth")


def test_adapters_on_a_quantized_base(base: Path, tmp_path: Path) -> None:
    model = {"path": str(base), "quantization": {"type": "bitsandbytes", "bits": 4}}
    runs = [
        trained(tmp_path / name, base, model=model, optim={"lr": rate})
        for name, rate in (("a", 0.02), ("b", 0.05))
    ]
    opened = open_model(runs[0], adapters={"other": runs[1]})
    assert answers(opened) == answers(open_model(runs[0]))
    assert answers(opened, adapter="other") == answers(open_model(runs[1])) != answers(opened)


def test_adapters_that_cannot_share_a_base_are_refused(base: Path, tmp_path: Path) -> None:
    other = chat_model(tmp_path / "other", hidden_size=64, intermediate_size=128, head_dim=16)
    run, wrong = trained(tmp_path / "a", base), trained(tmp_path / "b", other)
    with pytest.raises(ModelError, match=r"the adapter x=.* was not trained on .*: its base is another"):
        open_model(run, adapters={"x": wrong})
    with pytest.raises(ModelError, match="its base is another"):
        open_model(base, adapters={"x": wrong})
    for name in ("default", "base", "a b", ""):
        with pytest.raises(ModelError, match="choose another name"):
            open_model(run, adapters={name: run})
    with pytest.raises(ModelError, match="holds no adapter"):
        open_model(run, adapters={"x": base})
    stacked = trained(tmp_path / "c", base, {**LORA, "adapters": [str(run)], "create_new_adapter": True})
    with pytest.raises(ModelError, match="needs other parts than its base"):
        open_model(run, adapters={"x": stacked})
    with pytest.raises(ModelError, match="changes its base itself"):
        open_model(stacked, adapters={"x": run})
    vocabulary = {"path": str(base), "vocabulary": {"add": ["<calc>"]}}
    new = trained(tmp_path / "d", base, model=vocabulary)
    with pytest.raises(ModelError, match="needs other parts than its base"):
        open_model(run, adapters={"x": new})
    with pytest.raises(ModelError, match="changes its base itself"):
        open_model(new, adapters={"x": run})
    oft = trained(tmp_path / "f", base, METHODS["oft"])
    with pytest.raises(ModelError, match=r"the adapter x=.* could not be loaded: .*(LORA|OFT)"):
        open_model(run, adapters={"x": oft})
    quantized = trained(
        tmp_path / "e", base, model={"path": str(base), "quantization": {"type": "bitsandbytes", "bits": 4}}
    )
    with pytest.raises(ModelError, match="base that is quantized in another way"):
        open_model(run, adapters={"x": quantized})
