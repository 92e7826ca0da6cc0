"""Recipes from files, mappings and the command line: values, provenance and the exact error messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from luthier.recipe.schema import AdamwSpec, FreezeSpec, FullSpec, LoraSpec, PtSpec, SgdSpec
from luthier.types import RecipeError

MINIMAL = "model: {path: embedded}\ndata: {train: [a]}\n"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Messages name files as they were given, so every test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, name: str = "r.yaml") -> LoadedRecipe:
    Path(name).write_text(text)
    return load_recipe(name, overrides)


def problems(text: str, *overrides: str, name: str = "r.yaml") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, name=name)
    return str(caught.value).split("\n")


# --------------------------------------------------------------------------------------------------
# Values


def test_minimal_recipe_has_the_schema_defaults_and_its_own_run_directory() -> None:
    loaded = load(MINIMAL, name="first try.yaml")
    assert loaded.recipe.model.path == "embedded"
    assert loaded.recipe.data.train == ("a",)
    assert loaded.recipe.train.output == "runs/first try"
    assert loaded.recipe.method == LoraSpec()
    assert loaded.recipe.optim == AdamwSpec()
    assert (loaded.path, loaded.notes, loaded.llamafactory) == (Path("first try.yaml"), (), False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("5e-05", 5e-5),
        (".5", 0.5),
        ("1", 1.0),
        ("1_0.5", 10.5),
        ("+1e+1", 10.0),
    ],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert load(MINIMAL + f"optim: {{lr: {text}}}").recipe.optim.lr == value
    assert load(MINIMAL, f"optim.lr={text}").recipe.optim.lr == value


def test_integers_are_decimal_unless_they_say_so() -> None:
    assert load(MINIMAL + "train: {seed: 010}").recipe.train.seed == 10
    assert load(MINIMAL + "train: {seed: 0x10}").recipe.train.seed == 16
    assert load(MINIMAL + "train: {seed: 1_000}").recipe.train.seed == 1000


def test_truth_values_dates_and_clock_times() -> None:
    assert load(MINIMAL + "train: {plots: no}").recipe.train.plots is False
    assert load(MINIMAL + "train: {output: 2026-01-01}").recipe.train.output == "2026-01-01"
    assert load(MINIMAL + "train: {output: 1:30}").recipe.train.output == "1:30"


def test_json_file_equals_yaml_file() -> None:
    tree = {"model": {"path": "a/b"}, "data": {"train": ["x\t", "y"]}, "optim": {"lr": 1e-4}}
    from_json = load(json.dumps(tree, indent="\t"), name="r.json")
    assert from_json.recipe == load_recipe(tree).recipe.model_copy(update={"train": from_json.recipe.train})
    assert from_json.origins["optim.lr"] == "r.json:12"


def test_anchors_and_merge_keys() -> None:
    text = "model: {path: embedded}\ndata: &d {train: [a], max_length: 8}\n"
    assert load(text + "stage: &s {type: pt}\n").recipe.data.max_length == 8
    merged = load("x: &x {a: 1}\n".replace("x:", "train:").replace("{a: 1}", "{seed: 1}") + MINIMAL)
    assert merged.recipe.train.seed == 1
    merged = load(MINIMAL + "optim: {schedule_options: &o {min_lr: 1}}\ntrain: {extra: {<<: *o, b: 2}}\n")
    assert merged.recipe.train.extra == {"min_lr": 1, "b": 2}


def test_section_without_content_is_absent_and_a_kind_without_type_is_the_default_kind() -> None:
    loaded = load(MINIMAL + "train:\nmethod: {rank: 16}\n")
    assert loaded.recipe.method == LoraSpec(rank=16)
    assert loaded.recipe.train.output == "runs/r"


def test_every_kind_of_every_union_loads() -> None:
    assert load(MINIMAL + "stage: {type: pt}").recipe.stage == PtSpec()
    assert load(MINIMAL + "method: {type: full}").recipe.method == FullSpec()
    assert load(MINIMAL + "method: {type: freeze, layers: -1}").recipe.method == FreezeSpec(layers=-1)
    assert load(MINIMAL + "optim: {type: sgd, momentum: 0.9}").recipe.optim == SgdSpec(momentum=0.9)


# --------------------------------------------------------------------------------------------------
# Provenance


def test_origins_name_file_line_command_line_and_default() -> None:
    origins = load(MINIMAL + "train:\n  epochs: 2\n", "optim.lr=1e-3").origins
    assert origins["model.path"] == "r.yaml:1"
    assert origins["train.epochs"] == "r.yaml:4"
    assert origins["optim.lr"] == "command line"
    assert origins["train.seed"] == "default"
    assert load_recipe({"model": {"path": "m"}, "data": {"train": ["a"]}}).origins["model.path"] == "given"


def test_dump_loads_again_to_the_equal_recipe() -> None:
    loaded = load(
        MINIMAL.replace("[a]", "[a, {file_name: x.json, columns: {prompt: q}, tags: {user_tag: 'on'}}]")
        + "optim: {lr: 1e-5, schedule_options: {num_cycles: 1e-3}}\n"
        + 'train: {extra: {a: [1, b], c: "1e-4", d: "no", e: null, f: "010"}, output: "x: # y"}\n'
    )
    for everything in (True, False):
        text = dump_recipe(loaded, everything=everything)
        assert load(text, name="again.yaml").recipe == loaded.recipe
    assert "  lr: 1.0e-05  # r.yaml:3\n" in text
    assert "  seed: 42  # default\n" in dump_recipe(loaded)
    assert "seed" not in text


def test_dump_never_writes_a_token() -> None:
    loaded = load("model: {path: m, token: hf_secret}\ndata: {train: [a]}\n")
    assert loaded.recipe.model.token == "hf_secret"
    assert "hf_secret" not in dump_recipe(loaded)
    assert "# token is not written down; set HF_TOKEN instead" in dump_recipe(loaded)


def test_data_directory_beside_the_recipe(in_tmp: Path) -> None:
    (in_tmp / "sub" / "data").mkdir(parents=True)
    loaded = load(MINIMAL, name="sub/r.yaml")
    assert loaded.recipe.data.directory == "sub/data"
    assert loaded.notes == ("data.directory: no folder data here; using sub/data, beside the recipe",)
    (in_tmp / "data").mkdir()
    here = load_recipe("sub/r.yaml")
    assert (here.recipe.data.directory, here.notes) == ("data", ())


# --------------------------------------------------------------------------------------------------
# Overrides


def test_overrides_are_typed_by_the_schema() -> None:
    loaded = load(
        MINIMAL,
        "data.train=[b, c]",
        "train.epochs=2",
        "stage.type=pt",
        "model.revision=007",
        "data.template=",
        "train.extra.tf32=true",
        "method={type: full}",
        "--train.seed=3",
        "data.default_system=a=b",
    )
    recipe = loaded.recipe
    assert recipe.data.train == ("b", "c")
    assert (recipe.train.epochs, recipe.train.seed) == (2.0, 3)
    assert recipe.stage == PtSpec()
    assert recipe.method == FullSpec()
    assert recipe.model.revision == "007"
    assert recipe.data.template is None
    assert recipe.data.default_system == "a=b"
    assert recipe.train.extra == {"tf32": True}
    assert loaded.origins["method.type"] == "command line"


def test_later_override_wins() -> None:
    assert load(MINIMAL, "train.seed=1", "train.seed=2").recipe.train.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "command line: train.epoch=2: unknown key; did you mean train.epochs?"),
        ("train.epochs=x", "command line: train.epochs=x: expected a number, found the text 'x'"),
        ("train.epochs=0", "command line: train.epochs=0: should be greater than 0, found the number 0"),
        ("epochs=2", "command line: epochs=2: unknown key; did you mean train.epochs?"),
        (
            "learning_rate=1",
            "command line: learning_rate=1: unknown key; LLaMA-Factory's learning_rate is optim.lr "
            "in a native "
            "recipe",
        ),
        ("train", "command line: train: write KEY=VALUE, for example train.epochs=2"),
        ("train..epochs=2", "command line: train..epochs=2: write KEY=VALUE, for example train.epochs=2"),
        ("data.train=a", "command line: data.train=a: expected a list, found the text 'a'; write [a]"),
        (
            "data.train.0=a",
            "command line: data.train.0=a: data.train is no mapping of keys; give data.train as a whole",
        ),
        (
            "data.train=[a",
            "command line: data.train=[a: not a YAML value (expected ',' or ']', but got '<stream "
            "end>'); quote it",
        ),
        (
            "method={type: lora, rnk: 3}",
            "command line: method={type: lora, rnk: 3}: method.rnk: unknown key; did you mean method.rank?",
        ),
    ],
)
def test_errors_name_the_override(override: str, message: str) -> None:
    assert problems(MINIMAL, override) == [message]


def test_another_kind_on_the_command_line_does_not_swallow_the_files_fields() -> None:
    text = MINIMAL + "method:\n  type: lora\n  rank: 4\n"
    assert problems(text, "method.type=full") == [
        "r.yaml:5: method.rank: does not go with type: full; it belongs to type: lora, "
        "vera or miss; "
        "remove it, or replace the section with method='{type: full}'"
    ]
    assert load(text, "method={type: full}").recipe.method == FullSpec()


# --------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {epoch: 2}", "r.yaml:3: train.epoch: unknown key; did you mean train.epochs?"),
        ("train: {lr: 1}", "r.yaml:3: train.lr: unknown key; did you mean optim.lr?"),
        ("trian: {}", "r.yaml:3: trian: unknown key; did you mean train?"),
        (
            "zzz: 1",
            "r.yaml:3: zzz: unknown key; a recipe has model, data, stage, method, optim, train, parallel, generation, export",
        ),
        ("optim: {lr: fast}", "r.yaml:3: optim.lr: expected a number, found the text 'fast'"),
        ('optim: {lr: "1e-4"}', "r.yaml:3: optim.lr: expected a number, found the text '1e-4'"),
        ("optim: {lr: -1}", "r.yaml:3: optim.lr: should be greater than or equal to 0, found the number -1"),
        ("optim: {lr: .nan}", "r.yaml:3: optim.lr: should be a finite number, found the number nan"),
        ("optim: {betas: [0.9]}", "r.yaml:3: optim.betas[1]: is missing; give a number"),
        (
            "optim: {betas: [1, 2, 3]}",
            "r.yaml:3: optim.betas: expected a list of 2 numbers, found 3",
        ),
        ("train: {seed: 1.5}", "r.yaml:3: train.seed: expected a whole number, found the number 1.5"),
        ("train: {seed: true}", "r.yaml:3: train.seed: expected a whole number, found true"),
        ("train: {plots: 1}", "r.yaml:3: train.plots: expected true or false, found the number 1"),
        ("train: 3", "r.yaml:3: train: expected a mapping of keys, found the number 3"),
        (
            "train: {output: 3}",
            "r.yaml:3: train.output: expected text, found the number 3; put it in quotes",
        ),
        (
            "train: {output: null}",
            "r.yaml:3: train.output: expected text, found nothing (null)",
        ),
        (
            "train: {precision: bf17}",
            "r.yaml:3: train.precision: 'bf17' is none of its values; did you mean bf16? "
            "Choose from auto, fp32, bf16, fp16",
        ),
        (
            "train: {save_every: sometimes}",
            "r.yaml:3: train.save_every: expected a whole number, epoch or null, found the text 'sometimes'",
        ),
        (
            "train: {save_every: 0}",
            "r.yaml:3: train.save_every: should be a positive number of steps, 'epoch' or null",
        ),
        (
            "train: {epochs: ${EPOCHS}}",
            "r.yaml:3: not valid YAML, column 18: while parsing a flow mapping, "
            "expected ',' or '}', but got '{'",
        ),
        ('train: {epochs: "${E}"}', "r.yaml:3: train.epochs: expected a number, found the text '${E}'; "
         "variables are not replaced here"),
        ("method: {targets: [q_proj, 3]}", "r.yaml:3: method.targets[1]: expected text, found the number 3; "
         "put it in quotes"),
        ("method: {type: lor}", "r.yaml:3: method: type: lor: no such kind; did you mean lora? "
         "Choose from full, freeze, llama_pro, lora, oft, vera, ia3, miss, peft"),
        ("stage: {type: dpoo}", "r.yaml:3: stage: type: dpoo: no such kind; did you mean dpo? "
         "Choose from pt, sft, rm, dpo, kto, ppo, grpo"),
        (
            "method: {type: full, rank: 8}",
            "r.yaml:3: method.rank: does not go with type: full; it belongs to type: lora, vera or miss",
        ),
        (
            "train: {tokens_per_batch: 9, rows_per_device: 1}",
            "r.yaml:3: train: give tokens_per_batch or rows_per_device, not both: two rules for one thing",
        ),
        ("model: {path: b}", "r.yaml:3: model: given twice, first in line 1; keep one"),
        ("train: {seed: 1, seed: 2}", "r.yaml:3: train.seed: given twice, first in line 3; keep one"),
        ("train: !!python/name:os.system x", "r.yaml:3: train: YAML tag "
         "tag:yaml.org,2002:python/name:os.system "
         "is not allowed here"),
        ("train: &a {extra: *a}", "r.yaml:3: train.extra: an alias (*) that contains itself"),
        ("\ttrain: 1", "r.yaml:3: not valid YAML, column 1: while scanning for the next token, "
         "a tab; YAML indents with spaces"),
    ],
)  # fmt: skip
def test_errors_name_file_line_and_key(text: str, message: str) -> None:
    assert problems(MINIMAL + text) == [message]


def test_errors_inside_data_sets() -> None:
    assert problems("model: {path: m}\ndata: {train: [{subset: x}]}\n") == [
        "r.yaml:2: data.train[0]: give exactly one of file_name, hf_hub_url, ms_hub_url and cloud_file_name"
    ]
    assert problems("model: {path: m}\ndata:\n  train:\n  - a\n  - {file_nam: x}\n  - 3\n") == [
        "r.yaml:5: data.train[1].file_nam: unknown key; did you mean data.train[1].file_name?",
        "r.yaml:6: data.train[2]: expected text or a mapping of keys, found the number 3; put it in quotes",
    ]


def test_all_problems_are_reported_in_the_order_of_the_file() -> None:
    text = "train: {epoch: 1}\nmodel: {pth: m}\noptim:\n  lr: a\n  schedule: cosin\ndata: {train: [a]}\n"
    lines = problems(text)
    assert [line.split(":")[1] for line in lines] == ["1", "2", "2", "4", "5"]
    assert "r.yaml:2: model.path: is missing; give text" in lines
    assert "r.yaml:2: model.pth: unknown key; did you mean model.path?" in lines


def test_missing_model_and_missing_data() -> None:
    assert problems("data: {train: [a]}") == ["r.yaml: model: is missing; give a mapping of keys"]
    assert problems("model: {path: m}") == ["r.yaml: data.train is empty: name at least one data set"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the file is empty; a recipe names at least model.path and data.train"),
        ("# only a comment\n", "r.yaml: the file is empty; a recipe names at least model.path and "
         "data.train"),
        ("- a", "r.yaml: a recipe is a mapping of keys (`model:`, `data:`, ...)"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: not valid YAML, column 1: expected a single document in the stream, "
         "but found another document"),
        ("[1, 2]: 3", "r.yaml:1: a key should be a plain word"),
    ],
)  # fmt: skip
def test_files_that_are_no_recipe(text: str, message: str) -> None:
    assert problems(text) == [message]


def test_unreadable_files(in_tmp: Path) -> None:
    for name, content, message in [
        ("absent.yaml", None, "absent.yaml: no such file"),
        ("latin.yaml", b"a: \xe9", "latin.yaml: not UTF-8 text (byte 3)"),
        ("bad.json", b'{"a": 1,\n "b" 2}', "bad.json:2: not valid JSON, column 6: Expecting ':' delimiter"),
        (
            "twice.json",
            b'{"model": {"path": "m"},\n "model": {"path": "n"}}',
            "twice.json:2: model: given twice, first in line 1; keep one",
        ),
    ]:
        if content is not None:
            Path(name).write_bytes(content)
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == message
    (in_tmp / "folder").mkdir()
    with pytest.raises(RecipeError, match=r"^folder: is a folder; give the recipe file in it$"):
        load_recipe("folder")


def test_json_lines_are_exact() -> None:
    text = '{\n "model": {"path": "m"},\n "data": {"train": ["a",\n  {"file_name": "f", "splt": "x"}]}\n}'
    assert problems(text, name="r.json") == [
        "r.json:4: data.train[1].splt: unknown key; did you mean data.train[1].split?"
    ]


def test_mapping_problems_name_the_key_alone() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"path": "m"}, "data": {"train": ["a"], "max_lenght": 3}})
    assert str(caught.value) == "data.max_lenght: unknown key; did you mean data.max_length?"
    with pytest.raises(RecipeError, match="no set"):
        load_recipe({"model": {"path": "m"}, "data": {"train": {"a"}}})


def test_file_with_byte_order_mark() -> None:
    Path("bom.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe("bom.yaml").recipe.model.path == "embedded"


@pytest.mark.parametrize(
    ("stage", "does"),
    [("pt", "learns every token"), *((name, "compares whole answers") for name in ("rm", "dpo", "kto"))],
)
@pytest.mark.parametrize("said", ["mask_history: true", "train_on_prompt: true", "train_roles: [user]"])
def test_what_is_learnt_of_a_conversation_is_said_for_sft_alone(stage: str, does: str, said: str) -> None:
    data, key = f"model: {{path: m}}\ndata: {{train: [a], {said}}}\n", said.partition(":")[0]
    (problem,) = problems(f"{data}stage: {{type: {stage}}}\n")
    why = f"data.{key} does not go with stage: {stage}, which {does}; leave it out, or give stage: sft"
    assert problem.endswith(why)


def test_the_last_answer_alone_and_everything_exclude_each_other() -> None:
    (problem,) = problems("model: {path: m}\ndata: {train: [a], mask_history: true, train_on_prompt: true}\n")
    assert "data.mask_history learns the last answer alone, and data.train_on_prompt everything" in problem
