"""`luthier export`: the written model is the trained one, read back by plain transformers; and where it is not, it is
marked, and what differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import luthier
from luthier.cli import app
from luthier.export_verb import export
from luthier.exporting import merge
from luthier.methods.lora import load_adapter
from luthier.model.load import fingerprint, locate
from luthier.model.value_head import VALUE_HEAD_NAME
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import ModelSpec
from luthier.score import score_file
from luthier.trained import load
from luthier.types import CheckpointError, ExportError, LuthierError, ModelError, RecipeError
from tests.compared import recipe_for
from tests.reward import reward_recipe
from tests.tiny import chat_model, chat_tokenizer, write_alpaca

LORA: dict[str, Any] = {"type": "lora", "rank": 4}
VOCABULARY = {"add": ["<calc>"], "add_special": ["<|user|>", "<|bot|>"], "descriptions": {"<calc>": "count"}}
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
TEXT = "<|im_start|>user\nCount to 7.<|im_end|>\n<|im_start|>assistant\n1 2 3 4 5 6 7<|im_end|>\n"


def recipe_in(folder: Path, base: Path, method: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a few steps over 16 rows, a quarter of them held out; its output is `folder`/run."""
    if not (folder / "rows.json").is_file():
        write_alpaca(folder / "rows.json", 16)
    data = {"train": ["rows.json"], "dev_split": 4, "directory": str(folder), "cache": str(folder / "cache")}
    train = {"rows_per_device": 4, "epochs": 2, "plots": False, "output": str(folder / "run")}
    recipe: dict[str, Any] = {
        "model": {"path": str(base)},
        "data": data,
        "method": method,
        "optim": {"lr": 0.02},
        "train": train,
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    return recipe


def with_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    """Sections of a run that adds three tokens and uses them in its template."""
    (folder / "template.jinja").write_text(TEMPLATE)
    return {"model": {"vocabulary": VOCABULARY}, "data": {"template": str(folder / "template.jinja")}}


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float()


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def live(base: Path, *adapters: Path) -> Any:
    """The trained model, put together by hand: all adapters but the last merged, the last attached."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for folder in adapters[:-1]:
        model = load_adapter(model, folder).merge_and_unload()
    return load_adapter(model, adapters[-1])


def checks(result: Any) -> dict[str, bool]:
    return {check["name"]: check["passed"] for check in result.report["checks"]}


def weights(folder: Path) -> dict[str, Tensor]:
    files = [file for file in folder.glob("*.safetensors") if file.name != VALUE_HEAD_NAME]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return chat_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run with one checkpoint before its end."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = recipe_in(folder, base, LORA, train={"save_every": 3}, export={"output": str(folder / "merged")})
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return luthier.train(folder / "recipe.yaml", quiet=True).output


@pytest.fixture(scope="module")
def second(base: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a new adapter on top of the first one."""
    folder = tmp_path_factory.mktemp("stacked")
    method = {**LORA, "adapters": [str(run)], "create_new_adapter": True}
    return luthier.train(recipe_in(folder, base, method), quiet=True).output


# --------------------------------------------------------------------------------------------------
# The written model is the trained one


METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora with a head": {**LORA, "modules_to_save": ["lm_head"]},
    "full": {"type": "full"},
    "freeze": {"type": "freeze", "layers": 1},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_model_is_the_trained_one(name: str, base: Path, tmp_path: Path) -> None:
    run = luthier.train(recipe_in(tmp_path, base, METHODS[name]), quiet=True).output
    output = tmp_path / "merged"
    result = luthier.export(run, output=output, shard_size="20KB", quiet=True)
    assert result.passed and all(checks(result).values())
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    trained = live(base, run) if "lora" in name else plain(run)
    found = logits(plain(output), ids)
    torch.testing.assert_close(found, logits(trained, ids), atol=1e-5, rtol=0)
    assert float((found - logits(plain(base), ids)).abs().max()) > 0.05, "the training changed nothing"
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == chat_tokenizer().chat_template
    assert plain(output).generation_config.eos_token_id == tokenizer.eos_token_id
    assert result.report["deviation"]["logit_max"] < 1e-5
    assert result.report["probes"] == {
        "origin": "data.dev_split",
        "count": 4,
        "tokens": result.report["probes"]["tokens"],
    }
    assert json.loads((output / "export_report.json").read_text()) == result.report
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card and str(tmp_path) not in card
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_new_tokens_are_in_the_exported_model(tied: bool, tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base", tie_word_embeddings=tied)
    recipe = recipe_in(tmp_path, base, LORA, **with_tokens(tmp_path))
    run, output = luthier.train(recipe, quiet=True).output, tmp_path / "merged"
    (tmp_path / "template.jinja").unlink()  # the run has it
    assert luthier.export(run, output=output, quiet=True).passed
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "<calc> 3"}], tokenize=False)
    ids = tokenizer(text)["input_ids"]
    new = tokenizer.convert_tokens_to_ids(["<calc>", "<|user|>"])
    assert set(new) < set(ids) and min(new) >= len(chat_tokenizer())
    torch.testing.assert_close(logits(plain(output), ids), logits(live(base, run), ids), atol=1e-5, rtol=0)


def test_several_adapters_are_merged_in_their_order(
    base: Path, run: Path, second: Path, tmp_path: Path
) -> None:
    result = luthier.export(second, output=tmp_path / "merged", quiet=True)
    assert result.report["adapters"] == [str(run), str(second)]
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    expected = logits(live(base, run, second), ids)
    torch.testing.assert_close(logits(plain(tmp_path / "merged"), ids), expected, atol=1e-5, rtol=0)
    assert float((expected - logits(live(base, second), ids)).abs().max()) > 0.05
    # The same from the base, the adapters given one by one.
    words = [
        "export",
        str(base),
        "--adapters",
        str(run),
        "--adapters",
        str(second),
        "-o",
        str(tmp_path / "again"),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    ours, theirs = weights(tmp_path / "again"), weights(tmp_path / "merged")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_rounded_once(dtype: torch.dtype, base: Path, run: Path, tmp_path: Path) -> None:
    result = luthier.export(run, output=tmp_path / "merged", dtype=str(dtype)[6:], quiet=True)
    exact = load_adapter(plain(base), run).merge_and_unload().state_dict()
    found = weights(tmp_path / "merged")
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], exact[name].to(dtype)) for name in exact)
    assert plain(tmp_path / "merged").dtype == dtype
    rounding, deviation = result.report["rounding"], result.report["deviation"]
    assert (
        0 < deviation["kl_mean"] < 4 * rounding["kl_mean"] < result.report["training_moved"]["kl_mean"] / 100
    )


def test_an_adapter_on_a_16_bit_base_is_merged_in_float32(tmp_path: Path) -> None:
    base = chat_model(tmp_path / "base")
    plain(base).to(torch.bfloat16).save_pretrained(base)
    run = luthier.train(recipe_in(tmp_path, base, LORA, model={"dtype": "bfloat16"}), quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", quiet=True)
    assert result.report["dtype"] == "bfloat16"  # that of the base's files
    exact = load_adapter(plain(base).float(), run).merge_and_unload().state_dict()
    found = weights(tmp_path / "merged")
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)


def test_stretched_positions_stay_stretched(base: Path, tmp_path: Path) -> None:
    stretched = {"model": {"rope_scaling": {"type": "linear", "factor": 2.0}}, "data": {"max_length": 256}}
    run = luthier.train(recipe_in(tmp_path, base, LORA, **stretched), quiet=True).output
    luthier.export(run, output=tmp_path / "merged", quiet=True)
    config = plain(tmp_path / "merged").config
    assert config.rope_parameters["rope_type"] == "linear" and config.max_position_embeddings == 512
    ids = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    found = logits(plain(tmp_path / "merged"), ids)
    torch.testing.assert_close(found, logits(live(base, run), ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [LORA, {"type": "full"}], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_keeps_its_scores(dtype: str, method: dict[str, Any], tmp_path: Path) -> None:
    run, output = luthier.train(reward_recipe(tmp_path, method), quiet=True).output, tmp_path / "merged"
    result = luthier.export(run, output=output, dtype=dtype, quiet=True)
    assert {"scores", "padding", "value head"} <= checks(result).keys()
    model = AutoModelForSequenceClassification.from_pretrained(output, dtype="auto")
    assert (
        model.num_labels == 1
        and model.config.pad_token_id == AutoTokenizer.from_pretrained(output).pad_token_id
    )
    head = load_file(output / VALUE_HEAD_NAME)["v_head.summary.weight"]
    assert head.dtype == torch.float32 and torch.equal(head.to(model.dtype), model.score.weight)
    ours, theirs = (score_file(folder, tmp_path / "pairs.json") for folder in (output, run))
    close = 1e-5 if dtype == "float32" else 0.02
    for one, other in zip(ours.rows, theirs.rows, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=close)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_runs_of_preference_stages_are_compared_on_their_answers(
    stage: str, base: Path, tmp_path: Path
) -> None:
    run = luthier.train(recipe_for(stage, tmp_path, base, train={"plots": False}), quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", quiet=True)
    assert result.report["probes"]["origin"] == "data.eval" and result.report["probes"]["count"] >= 6


def test_a_run_over_documents_is_compared_on_documents(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{n} and {n + 1} are numbers."} for n in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    texts = {"train": [{"file_name": "rows.json", "columns": {"prompt": "text"}}], "dev_split": 0}
    recipe = recipe_in(tmp_path, base, LORA, stage={"type": "pt"}, data=texts)
    result = luthier.export(luthier.train(recipe, quiet=True).output, output=tmp_path / "merged", quiet=True)
    assert result.report["probes"]["origin"] == "data.train" and result.report["probes"]["count"] == 8


# --------------------------------------------------------------------------------------------------
# What can be exported


def test_a_recipe_says_what_and_where(run: Path) -> None:
    """`luthier export recipe.yaml`, and again with --overwrite; a checkpoint is another model."""
    recipe, output = run.parent / "recipe.yaml", run.parent / "merged"
    assert CliRunner().invoke(app, ["export", str(recipe)]).exit_code == 0
    before = weights(output)
    again = CliRunner().invoke(app, ["export", str(recipe)])
    assert again.exit_code == 2 and "exists already; name another folder, or give --overwrite" in again.stderr
    done = CliRunner().invoke(
        app, ["export", str(run / "checkpoint-3"), "-o", str(output), "--overwrite", "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["passed"] and report["base"]["is_the_trained_one"]
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(output).items())


def test_a_llamafactory_file_exports_as_it_is(base: Path, run: Path, second: Path, tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    keys = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": f"{run},{second}",
        "trust_remote_code": True,
        "export_dir": str(tmp_path / "merged"),
        "export_size": 1,
        "export_device": "cpu",
        "export_legacy_format": False,
        "infer_dtype": "bfloat16",
    }
    file.write_text(json.dumps(keys))
    done = CliRunner().invoke(app, ["export", str(file)])
    assert done.exit_code == 0, done.output
    exact = load_adapter(load_adapter(plain(base), run).merge_and_unload(), second).merge_and_unload()
    expected = exact.state_dict()
    found = weights(tmp_path / "merged")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    file.write_text(json.dumps({**keys, "template": "llama3", "export_dir": str(tmp_path / "other")}))
    with pytest.raises(RecipeError, match=r"data.template: 'llama3' is not what .* was trained with"):
        export(file, quiet=True)
    assert not (tmp_path / "other").exists()


def test_an_adapter_of_another_tool_takes_the_template_that_is_named(
    base: Path, run: Path, tmp_path: Path
) -> None:
    """Adapter files alone: no run says anything, and the data are gone."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shutil.copy(run / name, tmp_path / "adapter" / name)
    keys = {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(tmp_path / "adapter"),
        "template": "alpaca",
        "export_dir": str(tmp_path / "merged"),
    }
    (tmp_path / "merge.yaml").write_text(json.dumps(keys))
    result = luthier.export(tmp_path / "merge.yaml", quiet=True)
    assert "### Instruction" in AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert result.report["probes"]["origin"] == "built-in texts (the source names no data)"
    assert result.report["notes"][0].startswith("no run says what the adapters were trained on")
    alone = luthier.export(tmp_path / "adapter", output=tmp_path / "alone", quiet=True)
    assert alone.passed
    ours, theirs = weights(tmp_path / "alone"), weights(tmp_path / "merged")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_default_system_prompt_is_written_once(base: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, base, LORA, data={"default_system": "Count well."})
    run = luthier.train(recipe, quiet=True).output
    luthier.export(run, output=tmp_path / "merged", quiet=True)
    for folder in (run, tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).count("well")
            == 1
        )
    assert (run / "chat_template.jinja").read_text() == (
        tmp_path / "merged" / "chat_template.jinja"
    ).read_text()


def test_a_template_that_changed_its_text_is_refused(base: Path, tmp_path: Path) -> None:
    run = luthier.train(recipe_in(tmp_path, base, LORA, data={"template": "alpaca"}), quiet=True).output
    assert luthier.export(run, output=tmp_path / "merged", quiet=True).passed
    text = (run / "chat_template.jinja").read_text()
    (run / "chat_template.jinja").write_text(text.replace("Instruction", "Question"))
    files = json.loads((run / "run.json").read_text())["files"]
    edit(run / "run.json", files={name: digest for name, digest in files.items() if "template" not in name})
    with pytest.raises(
        ModelError, match=r"its chat template is not the one that this Luthier has .* 'alpaca'"
    ):
        luthier.export(run, output=tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_without_its_data_a_run_is_compared_on_built_in_texts(base: Path, tmp_path: Path) -> None:
    run = luthier.train(recipe_in(tmp_path, base, LORA), quiet=True).output
    (tmp_path / "rows.json").unlink()
    result = luthier.export(run, output=tmp_path / "merged", quiet=True)
    assert result.report["probes"]["origin"].startswith("built-in texts (")
    assert "rows.json" in result.report["probes"]["origin"]


# --------------------------------------------------------------------------------------------------
# Faults in what was written are caught, and named


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    (file,) = folder.glob("model*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def one_weight(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6

    rewrite(folder, change)


def lost_rows(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][: len(chat_tokenizer())].clone()

    rewrite(folder, change)
    edit(folder / "config.json", vocab_size=len(chat_tokenizer()))


def missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))


def other_tokenizer(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


FAULTS: dict[str, tuple[Callable[[Path], Any], set[str], str]] = {
    "one weight": (one_weight, {"weights"}, "model.layers.1.mlp.up_proj.weight"),
    "a tensor lost": (missing_tensor, {"loads"}, "model.norm.weight"),
    "file cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:900]
        ),
        {"loads"},
        "cannot load it",
    ),
    "template dropped": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        {"chat template", "prompts"},
        "the saved chat template is missing",
    ),
    "template changed": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        {"chat template", "prompts"},
        "the saved chat template is another one",
    ),
    "tokenizer swapped": (
        other_tokenizer,
        {"tokenizer", "token ids"},
        "lost or under another id: ['1', '2']",
    ),
    "tokenizer of the base": (
        lambda folder: chat_tokenizer().save_pretrained(folder),
        {"tokenizer", "token ids", "chat template", "prompts"},
        "'<calc>'",
    ),
    "token rows lost": (lost_rows, {"weights", "embeddings"}, "259 embedding rows for 262 tokens"),
    "end token": (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="<|im_start|>"),
        {"tokenizer", "prompts"},
        "eos_token is '<|im_start|>' instead of '<|im_end|>'",
    ),
    "stop token lost": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=0),
        {"stop tokens"},
        "generation_config lacks ['<|im_end|>'] and adds ['<|pad|>']",
    ),
    "positions": (
        lambda folder: edit(
            folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0}
        ),
        {"mean KL", "largest KL", "logits"},
        "nats per token",
    ),
}


@pytest.fixture(scope="module")
def extended(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that added tokens."""
    folder = tmp_path_factory.mktemp("extended")
    return luthier.train(recipe_in(folder, base, LORA, **with_tokens(folder)), quiet=True).output


def sabotaged(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path], Any]) -> None:
    write = merge.write_model

    def written(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        write(model, tokenizer, folder, **options)
        fault(folder)

    monkeypatch.setattr(merge, "write_model", written)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_named(
    name: str, extended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, named, said = FAULTS[name]
    output = tmp_path / "merged"
    with monkeypatch.context() as patched:
        sabotaged(patched, fault)
        done = CliRunner().invoke(app, ["export", str(extended), "-o", str(output)])
    assert done.exit_code == 1, done.output
    report = json.loads((output / "export_report.json").read_text())
    failed = {check["name"] for check in report["checks"] if not check["passed"]}
    assert named <= failed and not report["passed"]
    if name not in ("positions",):  # numbers may or may not follow from what is named
        assert failed - named <= {"mean KL", "largest KL", "logits", "greedy answers"}
    assert said in (output / "EXPORT_FAILED").read_text() or said in done.stdout
    assert "FAILS" in done.stdout and "is marked so" in done.stderr
    # Nothing here takes it for a model.
    with pytest.raises(ModelError, match="failed its verification"):
        locate(ModelSpec(path=str(output)))
    # The same without the fault takes its place.
    assert luthier.export(extended, output=output, overwrite=True, quiet=True).passed
    assert not (output / "EXPORT_FAILED").exists()
    locate(ModelSpec(path=str(output)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["scale", "not merged", "other adapter"])
def test_a_wrong_merge_is_caught_by_its_numbers(
    fault: str, dtype: str, run: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the files hold is what was merged, and that is not what was trained."""
    right = load.merged

    def wrong(model: Any, trained: Any) -> Any:
        assert isinstance(model, PeftModel)
        if fault == "not merged":
            return model.unload()
        if fault == "scale":
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data *= 0.8
            return right(model, trained)
        other = load_file(second / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.copy_(other[name.replace(".default", "")])
        return right(model, trained)

    monkeypatch.setattr(load, "merged", wrong)
    with pytest.raises(ExportError, match="is not the model that was trained and is marked so:\nmean KL"):
        luthier.export(run, output=tmp_path / "merged", dtype=dtype, quiet=True)
    report = json.loads((tmp_path / "merged" / "export_report.json").read_text())
    passed = {check["name"]: check["passed"] for check in report["checks"]}
    assert passed["weights"] and not (passed["mean KL"] or passed["largest KL"] or passed["logits"])


@pytest.mark.parametrize(
    ("fault", "named", "said"),
    [
        (lambda folder: (folder / VALUE_HEAD_NAME).unlink(), "value head", "is missing"),
        (lambda folder: edit(folder / "config.json", pad_token_id=2), "padding", "the config pads with 2"),
    ],
    ids=["value head", "padding"],
)
def test_faults_of_a_reward_model_are_caught(
    fault: Callable[[Path], Any], named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = luthier.train(reward_recipe(tmp_path, LORA), quiet=True).output
    keep = merge.keep_value_head

    def kept(model: Any, trained: Any, folder: Path) -> None:
        keep(model, trained, folder)
        fault(folder)

    monkeypatch.setattr(merge, "keep_value_head", kept)
    result = export(run, output=tmp_path / "merged", quiet=True)
    failed = {check["name"]: check["text"] for check in result.report["checks"] if not check["passed"]}
    assert failed.keys() == {named} and said in failed[named]


# --------------------------------------------------------------------------------------------------
# Refused before anything is written


def refused(kind: type[LuthierError], message: str, source: Path, output: Path, **options: Any) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind, match=message):
        luthier.export(source, output=output, quiet=True, **options)
    assert sorted(output.parent.iterdir()) == before


def test_a_wrong_base_is_refused(base: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    rewrite(other, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert fingerprint(locate(ModelSpec(path=str(other)))) != fingerprint(locate(ModelSpec(path=str(base))))
    refused(ModelError, "is not the base that .* was trained on", run, tmp_path / "out", base=str(other))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert luthier.export(run, output=tmp_path / "out", base=str(moved), quiet=True).passed


def test_a_run_that_was_changed_or_is_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, "adapter_model.safetensors was changed after", copy, tmp_path / "out")
    (copy / "adapter_model.safetensors").unlink()
    refused(CheckpointError, "adapter_model.safetensors is missing", copy, tmp_path / "out")
    (copy / "run.json").unlink()
    refused(CheckpointError, "a run that is not finished", copy, tmp_path / "out")


def test_nothing_is_overwritten_that_is_not_an_export(base: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    refused(ExportError, "exists already", run, folder)
    refused(ExportError, "is no exported model", run, folder, overwrite=True)
    refused(ExportError, "is or contains", run, run, overwrite=True)
    refused(ExportError, "is or contains", run, base, overwrite=True)
    refused(ExportError, "is a file", run, folder / "notes.txt", overwrite=True)
    assert (folder / "notes.txt").read_text() == "keep me"


def test_without_room_nothing_is_left(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(ExportError, "and 0.00 GiB are free", run, tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    sabotaged(monkeypatch, full)
    with pytest.raises(ExportError, match=r"the disk is full .* nothing of it is left"):
        luthier.export(run, output=tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "where to? Give --output DIR"),
        (
            ["-o", "OUT", "--dtype", "int8"],
            "--dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        (["-o", "OUT", "--shard-size", "5"], "--shard-size: String should match pattern"),
        (["-o", "OUT", "--adapters", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_bad_words_are_explained(words: list[str], message: str, extended: Path, tmp_path: Path) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    done = CliRunner().invoke(app, ["export", str(extended), *words])
    assert done.exit_code == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_only_exports_does_not_train(base: Path, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "export.yaml"
    tree = {
        "model": {"path": str(base)},
        "method": {**LORA, "adapters": [str(run)]},
        "export": {"output": str(tmp_path / "merged")},
    }
    file.write_text(json.dumps(tree))
    with pytest.raises(RecipeError, match="this recipe only exports; run `luthier export` with it"):
        luthier.train(file, quiet=True)
    assert luthier.export(file, quiet=True).passed
    with pytest.raises(ModelError, match="no such file or folder"):
        luthier.export(tmp_path / "nowhere.yaml", output=tmp_path / "x", quiet=True)


def test_an_adapter_on_a_quantized_base_is_merged_into_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    """nf4: the deviation is that of the unmerged adapter on the dequantized base, and both are in the report."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    exact = chat_model(tmp_path / "exact", hidden_size=64, intermediate_size=64, head_dim=16)
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    quantized = AutoModelForCausalLM.from_pretrained(exact, quantization_config=four, dtype=torch.float32)
    quantized.save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    run = luthier.train(recipe_in(tmp_path, tmp_path / "base", LORA), quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", dtype="float32", quiet=True)
    report = result.report
    assert report["quantized_base"] and any("quantized" in note for note in report["notes"])
    assert 0 < report["deviation"]["logit_max"] < 4 * report["rounding"]["logit_max"] + 2e-4
    assert report["deviation"]["kl_mean"] < report["training_moved"]["kl_mean"] / 1000
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)["input_ids"]
    found = logits(plain(tmp_path / "merged"), ids)
    torch.testing.assert_close(found, logits(live(tmp_path / "base", run), ids), atol=5e-3, rtol=0)


@pytest.mark.slow
def test_a_lora_of_smollm2_is_exported(smollm2: Path, tmp_path: Path) -> None:
    recipe = recipe_in(
        tmp_path, smollm2, LORA, train={"max_steps": 2, "rows_per_device": 2}, export={"probes": 1}
    )
    recipe["optim"]["lr"] = 2e-3
    run = luthier.train(recipe, quiet=True).output
    result = luthier.export(run, output=tmp_path / "merged", dtype="bfloat16", shard_size="100MB", quiet=True)
    assert result.passed and len(list((tmp_path / "merged").glob("model-*"))) >= 3
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)["input_ids"]
    trained = logits(live(smollm2, run), ids).log_softmax(-1)
    apart = [
        (trained.exp() * (trained - logits(model, ids).log_softmax(-1))).sum(-1).mean()
        for model in (plain(tmp_path / "merged"), plain(smollm2))
    ]
    assert float(apart[0]) < 0.01 < float(apart[1]) / 5


def test_the_example_of_a_merge_is_an_export() -> None:
    file = Path(__file__).parents[2] / "examples" / "export" / "llamafactory_merge.yaml"
    recipe = load_recipe(file, to_export=True).recipe
    assert (recipe.export.output, recipe.export.dtype) == ("saves/qwen3_sft_merged", "bfloat16")
    assert recipe.data.template == "qwen3_nothink"
