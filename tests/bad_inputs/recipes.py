"""Recipes that cannot be run: native and LLaMA-Factory files, and words on the command line."""

from __future__ import annotations

from bad_inputs import BadInput

NATIVE = "model: {path: embedded}\ndata: {train: [a]}\n"
FLAT = "model_name_or_path: m\ndo_train: true\ndataset: a\n"


def native(name: str, text: str, message: str, *words: str) -> BadInput:
    """A native recipe with more lines, or with words on the command line."""
    return BadInput(name, {"r.yaml": NATIVE + text}, ["train", "r.yaml", *words], said(message))


def flat(name: str, text: str, message: str, *words: str) -> BadInput:
    """A LLaMA-Factory file with more lines, or with words on the command line."""
    return BadInput(name, {"lf.yaml": FLAT + text}, ["train", "lf.yaml", *words], said(message))


def file(name: str, path: str, content: str | bytes, message: str) -> BadInput:
    """Something that is given as a recipe."""
    return BadInput(name, {path: content}, ["train", path], said(message))


def said(message: str) -> str:
    return f"error:\n{message}\n" if "\n" in message else f"error: {message}\n"


CASES: list[BadInput] = [
    # --- files that are no recipe at all
    BadInput("missing file", {}, ["train", "absent.yaml"], said("absent.yaml: no such file")),
    BadInput("a folder", {"x/": ""}, ["train", "x"], said("x: is a folder; give the recipe file in it")),
    file(
        "empty file",
        "r.yaml",
        "",
        "r.yaml: the file is empty; a recipe names at least model.path and data.train",
    ),
    file(
        "only comments",
        "r.yaml",
        "# model:\n\n# data:\n",
        "r.yaml: the file is empty; a recipe names at least model.path and data.train",
    ),
    file(
        "a list",
        "r.yaml",
        "- model\n- data\n",
        "r.yaml: a recipe is a mapping of keys (`model:`, `data:`, ...)",
    ),
    file("one word", "r.yaml", "train\n", "r.yaml: a recipe is a mapping of keys (`model:`, `data:`, ...)"),
    file("not UTF-8", "r.yaml", "model: café".encode("latin-1"), "r.yaml: not UTF-8 text (byte 10)"),
    file("UTF-16", "r.yaml", NATIVE.encode("utf-16"), "r.yaml: not UTF-8 text (byte 0)"),
    file(
        "zeros", "r.yaml", b"model: \x00\x00\n", "r.yaml: not valid YAML: special characters are not allowed"
    ),
    file(
        "brackets without end",
        "r.yaml",
        "model: " + "[" * 3000,
        "r.yaml: brackets nested too deeply; a recipe is a mapping of keys (`model:`, `data:`, ...)",
    ),
    file(
        "two documents",
        "r.yaml",
        NATIVE + "---\n" + NATIVE,
        "r.yaml:3: not valid YAML, column 1: expected a single document in the stream, "
        "but found another document",
    ),
    file(
        "YAML in a JSON file",
        "r.json",
        NATIVE,
        "r.json:1: not valid JSON, column 1: Expecting value",
    ),
    file(
        "a colon forgotten in JSON",
        "r.json",
        '{"model": {"path": "m"},\n "data" {"train": ["a"]}}\n',
        "r.json:2: not valid JSON, column 9: Expecting ':' delimiter",
    ),
    file(
        "a key twice in JSON",
        "r.json",
        '{"model": {"path": "m"},\n "data": {"train": ["a"],\n  "train": ["b"]}}\n',
        "r.json:3: data.train: given twice, first in line 2; keep one",
    ),
    file(
        "a file of data sets",
        "dataset_info.json",
        '{"a": {"file_name": "a.json"}, "b": {"hf_hub_url": "o/b"}}\n',
        "dataset_info.json: describes data sets, it is no recipe; name its folder in data.directory",
    ),
    file(
        "an accelerate configuration",
        "fsdp.yaml",
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_processes: 2\n",
        "fsdp.yaml: configures accelerate, it is no recipe; give the file that names model and data",
    ),
    file(
        "nothing known",
        "r.yaml",
        "engine: m\nfuel: a\n",
        "r.yaml: is no recipe: it has neither model (a native recipe) "
        "nor model_name_or_path (a LLaMA-Factory file)",
    ),
    # --- YAML
    native(
        "a bracket left open",
        "optim: {lr: 1e-4\ntrain: {}\n",
        "r.yaml:4: not valid YAML, column 6: while parsing a flow mapping, expected ',' or '}', but got ':'",
    ),
    native(
        "a tab",
        "train:\n\tseed: 1\n",
        "r.yaml:4: not valid YAML, column 1: while scanning for the next token, a tab; YAML indents with spaces",
    ),
    native(
        "a key twice",
        "train:\n  seed: 1\n  seed: 2\n",
        "r.yaml:5: train.seed: given twice, first in line 4; keep one",
    ),
    native(
        "a variable",
        "train: {output: ${HOME}/run}\n",
        "r.yaml:3: not valid YAML, column 18: while parsing a flow mapping, expected ',' or '}', but got '{'",
    ),
    native(
        "a variable in quotes",
        'train: {epochs: "${EPOCHS}"}\n',
        "r.yaml:3: train.epochs: expected a number, found the text '${EPOCHS}'; variables are not replaced here",
    ),
    native(
        "an unknown alias", "train: *t\n", "r.yaml:3: not valid YAML, column 8: found undefined alias 't'"
    ),
    native(
        "an alias in itself",
        "train: &t {extra: *t}\n",
        "r.yaml:3: train.extra: an alias (*) that contains itself",
    ),
    native(
        "a merge of a number", "train: {<<: 3}\n", "r.yaml:3: train: << takes a mapping or a list of mappings"
    ),
    native(
        "a tag that runs code",
        "train: !!python/name:os.system ls\n",
        "r.yaml:3: train: YAML tag tag:yaml.org,2002:python/name:os.system is not allowed here",
    ),
    native(
        "a tag that lies", "train: {seed: !!int one}\n", "r.yaml:3: train.seed: 'one' cannot be read as int"
    ),
    # --- keys and values
    native(
        "an unknown key",
        "train: {epoch: 2}\n",
        "r.yaml:3: train.epoch: unknown key; did you mean train.epochs?",
    ),
    native(
        "a key of another section",
        "train: {lr: 1e-4}\n",
        "r.yaml:3: train.lr: unknown key; did you mean optim.lr?",
    ),
    native(
        "a key of LLaMA-Factory",
        "learning_rate: 1e-4\n",
        "r.yaml:3: learning_rate: unknown key; LLaMA-Factory's learning_rate is optim.lr in a native recipe",
    ),
    native(
        "a key that Luthier has no use for",
        "train: {tpu_num_cores: 8}\n",
        "r.yaml:3: train.tpu_num_cores: unknown key; TPUs and XLA are not part of Luthier; "
        "remove it to train on a GPU or a CPU",
    ),
    native(
        "a number in quotes",
        'optim: {lr: "1e-4"}\n',
        "r.yaml:3: optim.lr: expected a number, found the text '1e-4'",
    ),
    native(
        "not a number",
        "optim: {lr: .nan}\n",
        "r.yaml:3: optim.lr: should be a finite number, found the number nan",
    ),
    native(
        "out of range",
        "train: {epochs: 0}\n",
        "r.yaml:3: train.epochs: should be greater than 0, found the number 0",
    ),
    native(
        "half a step",
        "train: {max_steps: 1.5}\n",
        "r.yaml:3: train.max_steps: expected a whole number or null, found the number 1.5",
    ),
    native(
        "text for a list",
        "method: {modules_to_save: lm_head}\n",
        "r.yaml:3: method.modules_to_save: expected a list of texts, found the text 'lm_head'; write [lm_head]",
    ),
    native(
        "no such kind",
        "method: {type: lorra}\n",
        "r.yaml:3: method: type: lorra: no such kind; did you mean lora? Choose from full, freeze, llama_pro, lora, "
        "oft, vera, ia3, miss, peft",
    ),
    native(
        "a key of another kind",
        "method: {type: full, rank: 8}\n",
        "r.yaml:3: method.rank: does not go with type: full; it belongs to type: lora, vera or miss",
    ),
    native(
        "two batch rules",
        "train: {tokens_per_batch: 4096, rows_per_device: 2}\n",
        "r.yaml:3: train: give tokens_per_batch or rows_per_device, not both: two rules for one thing",
    ),
    native(
        "accumulation of tokens",
        "train: {accumulation: 4}\n",
        "r.yaml:3: train: accumulation goes with rows_per_device; tokens_per_batch counts the whole step",
    ),
    native(
        "evaluation of nothing",
        "train: {eval_every: 10}\n",
        "r.yaml: train.eval_every needs something to evaluate on: data.eval or data.dev_split",
    ),
    native(
        "the best of nothing",
        "train: {load_best: true}\n",
        "r.yaml: train.load_best needs train.eval_every: the best is chosen at evaluations",
    ),
    native(
        "stopping early without the best",
        "train: {early_stopping: {patience: 2}}\n",
        "r.yaml:3: train: early_stopping needs load_best: it watches the best metric and ends with it",
    ),
    file(
        "a data set from two places",
        "r.yaml",
        "model: {path: m}\ndata:\n  train:\n  - {file_name: a.json, hf_hub_url: o/a}\n",
        "r.yaml:4: data.train[0]: give exactly one of file_name, hf_hub_url, ms_hub_url and cloud_file_name",
    ),
    file(
        "a model that is only a name",
        "r.yaml",
        "model: embedded\ndata: {train: [a]}\n",
        "r.yaml:1: model: expected a mapping of keys, found the text 'embedded'; write {path: embedded}",
    ),
    file("no model", "r.yaml", "data: {train: [a]}\n", "r.yaml: model: is missing; give a mapping of keys"),
    file(
        "no data", "r.yaml", "model: {path: m}\n", "r.yaml: data.train is empty: name at least one data set"
    ),
    file(
        "three problems at once",
        "r.yaml",
        "trian: {}\nmodel: {pth: m}\ndata: {train: a}\n",
        "r.yaml:1: trian: unknown key; did you mean train?\n"
        "r.yaml:2: model.path: is missing; give text\n"
        "r.yaml:2: model.pth: unknown key; did you mean model.path?\n"
        "r.yaml:3: data.train: expected a list, found the text 'a'; write [a]",
    ),
    # --- words on the command line
    native(
        "a word without =",
        "",
        "command line: train.epochs: write KEY=VALUE, for example train.epochs=2",
        "train.epochs",
    ),
    native(
        "an unknown key as a word",
        "",
        "command line: train.epoch=2: unknown key; did you mean train.epochs?",
        "train.epoch=2",
    ),
    native(
        "a wrong type as a word",
        "",
        "command line: train.epochs=many: expected a number, found the text 'many'",
        "train.epochs=many",
    ),
    native(
        "a word into a list",
        "",
        "command line: data.train.0=b: data.train is no mapping of keys; give data.train as a whole",
        "data.train.0=b",
    ),
    native(
        "a word that is no YAML",
        "",
        "command line: data.train=[a: not a YAML value (expected ',' or ']', but got '<stream end>'); quote it",
        "data.train=[a",
    ),
    native(
        "another kind under the file's fields",
        "method: {type: lora, rank: 4}\n",
        "r.yaml:3: method.rank: does not go with type: full; it belongs to type: lora, vera or miss; "
        "remove it, or replace the section with method='{type: full}'",
        "method.type=full",
    ),
    # --- LLaMA-Factory files
    flat(
        "lf: an unknown key",
        "lora_rnk: 8\n",
        "lf.yaml:4: lora_rnk: LLaMA-Factory has no such key; did you mean lora_rank?",
    ),
    flat(
        "lf: a native section",
        "train: {epochs: 1}\n",
        "lf.yaml:4: train: a section of a native recipe cannot stand in a LLaMA-Factory file; "
        "`luthier migrate` writes one",
    ),
    flat(
        "lf: two precisions",
        "bf16: true\nfp16: true\n",
        "lf.yaml:5: fp16: bf16 and fp16 exclude each other; keep one",
    ),
    flat(
        "lf: two evaluation sets",
        "val_size: 0.1\neval_dataset: b\n",
        "lf.yaml:4: val_size: val_size and eval_dataset exclude each other; keep one",
    ),
    flat(
        "lf: an old and a new name",
        "dev_ratio: 0.1\nval_size: 0.1\n",
        "lf.yaml:4: dev_ratio: another name of val_size, which is given too; keep one",
    ),
    flat(
        "lf: later stages, later types",
        "stage: orpo\nfp8: true\nparallelism_config: {cp: 2}\n",
        "lf.yaml:4: stage: write stage: dpo and pref_loss: orpo\n"
        "lf.yaml:5: fp8: 8-bit floating point comes in a later version; remove it\n"
        "lf.yaml:6: parallelism_config: how processes divide a model is written in `parallel` of a native recipe; "
        "remove it",
    ),
    flat(
        "lf: SageMaker and TPUs",
        "mp_parameters: ddp\ntpu_num_cores: 8\n",
        "lf.yaml:4: mp_parameters: SageMaker's model parallelism is not part of Luthier; remove it\n"
        "lf.yaml:5: tpu_num_cores: TPUs and XLA are not part of Luthier; remove it to train on a GPU or a CPU",
    ),
    flat(
        "lf: a variable",
        "output_dir: ${oc.env:HOME}/run\n",
        "lf.yaml:4: output_dir: variables (${...}) are not replaced; write the value itself",
    ),
    flat(
        "lf: a wrong type as a word",
        "",
        "command line: bf16=1: expected true or false, found the number 1",
        "bf16=1",
    ),
    file(
        "lf: a file that merges",
        "lf.yaml",
        "model_name_or_path: m\nadapter_name_or_path: a\nexport_dir: out\n",
        "lf.yaml:3: export_dir: this file exports a model: run `luthier export` with it",
    ),
    file(
        "lf: a file to chat with",
        "lf.json",
        '{"model_name_or_path": "m",\n "infer_backend": "huggingface"}',
        "lf.json:2: infer_backend: this file names a model to talk to: run `luthier chat` or `luthier serve` with it; "
        "to train add do_train: true and dataset",
    ),
    file(
        "lf: a file that predicts",
        "lf.yaml",
        "model_name_or_path: m\neval_dataset: a\ndo_predict: true\n",
        "lf.yaml:3: do_predict: this file answers a data set: run `luthier predict` with it",
    ),
    file(
        "lf: no model",
        "lf.yaml",
        "model_name: m\ndo_train: true\ndataset: a\nlora_rank: 8\n",
        "lf.yaml: model_name_or_path: is missing; name the model\n"
        "lf.yaml:1: model_name: LLaMA-Factory has no such key; did you mean model_name_or_path?",
    ),
    BadInput(
        "migrating a native recipe",
        {"r.yaml": NATIVE},
        ["migrate", "r.yaml"],
        said("r.yaml: this is a native recipe already (no model_name_or_path in it)"),
    ),
    BadInput(
        "preparing what is no recipe",
        {"r.yaml": "model: {path: m}\n"},
        ["prepare", "r.yaml"],
        said("r.yaml: data.train is empty: name at least one data set"),
    ),
]
