"""Data that cannot be used: descriptions, files, rows, templates, and rows that a template cannot show."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bad_inputs import BadInput
from tiny import CHATML, chat_tokenizer

MODEL: dict[str, str] = {
    "model/config.json": json.dumps({"model_type": "llama"}),
    "model/tokenizer.json": chat_tokenizer().backend_tokenizer.to_str(),
}
"""A model as far as its tokenizer: nothing of these commands comes to loading weights."""

CACHE = str(Path(tempfile.gettempdir()) / "luthier-bad-inputs")
"""Rows that are lost were tokenized before they are refused: neither the folder nor the user's cache gets them."""

ROW = {"instruction": "How?", "output": "So."}
ROWS = json.dumps([ROW])
TURNS = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
GZIP = b"\x1f\x8b\x08\x00" + bytes(range(200))


def prepared(
    name: str,
    files: Mapping[str, str | bytes],
    message: str,
    *train: Any,
    own: str = CHATML,
    verb: str = "prepare",
    stage: str = "sft",
    **data: Any,
) -> BadInput:
    """`luthier prepare` of a recipe that names these data sets; `own` is the tokenizer's chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": own or None,
    }
    recipe = {
        "model": {"path": "model"},
        "stage": {"type": stage},
        "data": {"train": train, "cache": CACHE, **data},
    }
    given = {
        **MODEL,
        "model/tokenizer_config.json": json.dumps(config),
        "recipe.yaml": json.dumps(recipe),
        **files,
    }
    return BadInput(name, given, [verb, "recipe.yaml"], said(message))


def described(name: str, entry: Any, message: str) -> BadInput:
    """A data set as dataset_info.json describes it."""
    info = {"demo": entry, "other": {"file_name": "rows.json"}}
    files = {"data/rows.json": ROWS, "data/dataset_info.json": json.dumps(info)}
    return prepared(name, files, message, "demo")


def file(name: str, path: str, content: str | bytes, message: str) -> BadInput:
    """`luthier train` with a data file that is named by its path."""
    return prepared(name, {f"data/{path}": content}, message, path, verb="train")


def rows(name: str, content: Any, message: str, *, columns: Any = None, **data: Any) -> BadInput:
    """Rows in alpaca's columns."""
    dataset = {"file_name": "x.json", "columns": columns or {}}
    return prepared(name, {"data/x.json": json.dumps(content)}, message, dataset, **data)


def talks(name: str, content: Any, message: str, *, columns: Any = None, **data: Any) -> BadInput:
    """Rows in sharegpt's columns."""
    dataset = {"file_name": "x.json", "formatting": "sharegpt", "columns": columns or {}}
    return prepared(name, {"data/x.json": json.dumps(content)}, message, dataset, **data)


def lost(reason: str, rows: str = "0", *, of: int = 1, count: int | None = None, share: str = "1.00%") -> str:
    """What is said of rows that are dropped, where others are left."""
    dropped = len(rows.split(", ")) if count is None else count
    return (
        f"x: {dropped} of {of} rows lost: {dropped} dropped ({reason}; row {rows}). That is more than "
        f"data.max_lost allows ({share}). Mend the data, raise data.max_length, choose data.overflow, or set "
        "data.max_lost: null to accept it"
    )


def nothing_left(reason: str) -> str:
    """What is said where the only row is dropped."""
    return f"nothing to train on: x: 1 of 1 rows lost: 1 dropped ({reason}; row 0)"


def said(message: str) -> str:
    return f"error:\n{message}\n" if "\n" in message else f"error: {message}\n"


PROMPT_IS_NO_PREFIX = CHATML.replace(
    "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif"
)
NO_TOOLS = [{"type": "function", "function": {"name": "add"}}]

CASES: list[BadInput] = [
    # --- names and descriptions
    described(
        "a misspelt key of a description",
        {"file_name": "rows.json", "colums": {}},
        "data/dataset_info.json: demo: unknown key 'colums'; did you mean 'columns'?",
    ),
    described(
        "a misspelt column of a description",
        {"file_name": "rows.json", "columns": {"promt": "instruction"}},
        "data/dataset_info.json: demo.columns: unknown key 'promt'; did you mean 'prompt'?",
    ),
    described(
        "a data set script",
        {"script_url": "load_demo.py"},
        "data/dataset_info.json: demo: script_url names a data set script, which the library `datasets` no longer "
        "runs; save its rows as a file and name that in file_name",
    ),
    described(
        "another hub",
        {"ms_hub_url": "org/demo"},
        "data set 'demo': org/demo on ModelScope is not on this machine, and HF_HUB_OFFLINE is set; download it and "
        "give its path in file_name, or allow the network",
    ),
    described(
        "a file in a cloud",
        {"cloud_file_name": "s3://bucket/demo.json"},
        "data set 'demo': s3://bucket/demo.json is not on this machine, and HF_HUB_OFFLINE is set; download it and "
        "give its path in file_name, or allow the network",
    ),
    described(
        "no place of the data",
        {"formatting": "alpaca"},
        "data/dataset_info.json: demo: says nowhere where the data is; give file_name or hf_hub_url",
    ),
    described(
        "a split of a file",
        {"file_name": "rows.json", "split": "test"},
        "data set 'demo': split is for data sets on the hub, and data/rows.json is a file; leave it out, or name "
        "the file that holds those rows",
    ),
    described(
        "a file that is gone",
        {"file_name": "gone.json"},
        "data set 'demo': data/gone.json does not exist",
    ),
    described(
        "a wrong checksum",
        {"file_name": "rows.json", "dataset_sha1": "0" * 40},
        f"data set 'demo': data/rows.json has SHA-1 {hashlib.sha1(ROWS.encode()).hexdigest()}, but {'0' * 40} was "
        "promised: the file is not the one that was described",
    ),
    described(
        "a column that no row has",
        {
            "file_name": "rows.json",
            "columns": {"prompt": "instruction", "response": "output", "system": "sys"},
        },
        "data set 'demo': columns.system names 'sys', which no row of data/rows.json has; its columns are "
        "instruction, output",
    ),
    described(
        "preference pairs for sft",
        {"file_name": "rows.json", "ranking": True},
        "data set 'demo' holds preference pairs (ranking: true), which stage 'sft' does not learn from",
    ),
    prepared(
        "a misspelt name",
        {"data/dataset_info.json": '{"alpaca_en_demo": {"file_name": "rows.json"}}'},
        "data set 'alpaca_en' is neither in data/dataset_info.json nor a file; did you mean alpaca_en_demo?",
        "alpaca_en",
    ),
    prepared(
        "a name and no descriptions",
        {},
        "data set 'demo' is neither in data/dataset_info.json (which does not exist) nor a file",
        "demo",
    ),
    prepared(
        "broken descriptions",
        {"data/dataset_info.json": '{"demo"\n {}}'},
        "data/dataset_info.json, line 2, column 2: not JSON: Expecting ':' delimiter",
        "demo",
    ),
    prepared(
        "two data sets of one name",
        {"data/x.json": ROWS},
        "data.train: two data sets are called 'x'; give one of them another name",
        "x.json",
        "data/x.json",
    ),
    # --- files
    file("an empty file", "x.json", "", "data set 'x': data/x.json has no rows"),
    file("a list of nothing", "x.json", "[]", "data set 'x': data/x.json has no rows"),
    file(
        "broken JSON",
        "x.json",
        '[{"instruction": "a",\n  "output" "b"}]',
        "data/x.json, line 2, column 12: not JSON: Expecting ':' delimiter",
    ),
    file(
        "a broken line",
        "x.jsonl",
        f'{json.dumps(ROW)}\n{{"instruction": "a", "output": }}\n',
        "data/x.jsonl, line 2, column 32: not JSON: Expecting value",
    ),
    file(
        "JSON without end",
        "x.jsonl",
        "[" * 200_000,
        "data/x.jsonl, line 1: this JSON cannot be read: nested too deeply",
    ),
    file(
        "one object for a list",
        "x.json",
        json.dumps({"data": [ROW]}, indent=1),
        "data/x.json: expected a list of rows, or one row on each line; found one object with the keys 'data'",
    ),
    file(
        "a text for a row",
        "x.json",
        json.dumps([ROW, "text"]),
        "data/x.json, row 1: expected an object with columns, found str",
    ),
    file(
        "Latin-1",
        "x.jsonl",
        '{"instruction": "a", "output": "b"}\n{"instruction": "café"}\n'.encode("latin-1"),
        "data/x.jsonl, line 2: not UTF-8 at byte 56 (0xe9); convert the file to UTF-8",
    ),
    file(
        "UTF-16",
        "x.json",
        ROWS.encode("utf-16"),
        "data/x.json: this is UTF-16 text, not JSON in UTF-8",
    ),
    file("an archive for JSON", "x.json", GZIP, "data/x.json: this is a gzip archive, not JSON in UTF-8"),
    file(
        "a picture for CSV",
        "x.csv",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "data/x.csv: this is a PNG image, not CSV in UTF-8",
    ),
    file(
        "weights for JSON",
        "x.json",
        (50).to_bytes(8, "little") + b'{"w": {"dtype": "F32"}}' + b"\xff" * 50,
        "data/x.json: this is a safetensors file, not JSON in UTF-8",
    ),
    file(
        "a file that was not downloaded",
        "x.json",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "data/x.json: this is a Git LFS pointer to a file that was not downloaded (git lfs pull), not JSON",
    ),
    file(
        "more cells than columns",
        "x.csv",
        "instruction,output\na,b\nc,d,e\n",
        "data/x.csv, line 3: more cells than the 2 columns of its head",
    ),
    file(
        "an open quote",
        "x.csv",
        'instruction,output\na,b\nc,"d\ne,f\n',
        "data/x.csv, line 3: not CSV: unexpected end of data",
    ),
    file(
        "a kind of file that is not read",
        "x.xlsx",
        b"PK\x03\x04",
        "data set 'x': cannot read '.xlsx' (data/x.xlsx); readable are .arrow, .csv, .json, .jsonl, .parquet, .txt",
    ),
    prepared(
        "a folder of nothing",
        {"data/parts/": ""},
        "data set 'parts': folder data/parts has no files",
        "parts",
    ),
    prepared(
        "a folder of two kinds",
        {"data/parts/a.csv": "instruction,output\n", "data/parts/b.json": ROWS},
        "data set 'parts': folder data/parts mixes .csv, .json; one type, please",
        "parts",
    ),
    # --- rows
    rows(
        "no prompt column",
        [{"question": "How?", "output": "So."}],
        "data/x.json, row 0: no column 'instruction'; its columns are question, output. Name the right one in "
        "columns.prompt, or set formatting",
    ),
    rows(
        "no answer column",
        [{"instruction": "How?", "answer": "So."}],
        nothing_left("no column 'output' with the answer"),
    ),
    rows(
        "mixed types in a column",
        [ROW, {**ROW, "output": 42}, ROW, {**ROW, "output": ["So."]}],
        lost("answer is not text", "1, 3", of=4),
    ),
    rows(
        "half a character",
        [ROW, {**ROW, "output": "\ud83d"}],
        lost("text holds half of a surrogate pair", "1", of=2),
    ),
    rows(
        "a history that is a text",
        [{**ROW, "past": "before"}],
        "data/x.json, row 0: 'past' should be a list of [question, answer], not str",
        columns={"history": "past"},
    ),
    talks(
        "no messages column",
        [{"messages": TURNS}],
        "data/x.json, row 0: no column 'conversations' with the messages; its columns are messages. Name it in "
        "columns.messages",
    ),
    talks(
        "a text for messages",
        [{"conversations": "How? So."}],
        "data/x.json, row 0: 'conversations' should be a list of messages, not str",
    ),
    talks(
        "messages of another format",
        [{"conversations": [{"role": "user", "content": "How?"}]}],
        "data/x.json, row 0, message 0: no 'from' in it (it has role, content); set tags.role_tag and "
        "tags.content_tag",
    ),
    talks(
        "an unknown role",
        [{"conversations": TURNS}, {"conversations": [{"from": "narrator", "value": "Once."}, *TURNS]}],
        lost("unknown role 'narrator'", "1", of=2),
    ),
    talks(
        "two weights of a message that do not agree",
        [{"conversations": [TURNS[0], {**TURNS[1], "weight": 1, "train": False}]}],
        "data/x.json, row 0, message 1: weight: 1 and train: False do not agree; keep one of them",
    ),
    talks(
        "a span outside its text",
        [{"conversations": [TURNS[0], {**TURNS[1], "spans": [[0, 1000, 0.5]]}]}],
        "data/x.json, row 0, message 1: the span 0 to 1000 is not in a content of 3 characters",
    ),
    talks(
        "a negative weight",
        [{"conversations": [TURNS[0], {**TURNS[1], "weight": -1}]}],
        "data/x.json, row 0, message 1: weight should be a number of 0 or more, not -1",
    ),
    talks(
        "a role that the template cannot render",
        [
            {"conversations": TURNS},
            {"conversations": [TURNS[0], {"from": "observation", "value": "1"}, TURNS[1]]},
        ],
        lost("the chat template refuses it (this template has no role tool)", "1", of=2),
        template="alpaca",
    ),
    talks(
        "a template's own words with brackets",
        [
            {"conversations": TURNS},
            {"conversations": [TURNS[0], {"from": "observation", "value": "1"}, TURNS[1]]},
        ],
        lost("the chat template refuses it (no tool after [/inst], [/])", "1", of=2),
        own="{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tool after [/inst], [/]') }}"
        "{% endfor %}" + CHATML,
    ),
    talks(
        "tools that the template has no place for",
        [{"conversations": TURNS, "tools": NO_TOOLS}],
        nothing_left("template 'tokenizer' has no place for tools"),
        columns={"tools": "tools"},
    ),
    rows(
        "several turns for a template of one",
        [{**ROW, "past": [["Why?", "Because."]]}],
        nothing_left(
            "the chat template refuses it (this template shows one turn only: use_history is false)"
        ),
        columns={"history": "past"},
        template={"prompt": "Q: {query} A:", "use_history": False},
    ),
    rows(
        "a row that is too long",
        [ROW, {**ROW, "output": "So. " * 100}],
        "x, row 1: 425 tokens, more than data.max_length (100); raise it, or choose data.overflow: drop, truncate "
        "or split",
        max_length=100,
        overflow="error",
    ),
    rows(
        "rows that are all too long",
        [ROW],
        nothing_left("longer than max_length"),
        max_length=10,
    ),
    rows(
        "all rows held out",
        [ROW, ROW],
        "data.dev_split: 2 holds out 2 of 2 rows; both parts need rows",
        dev_split=2,
    ),
    # --- templates
    rows(
        "a misspelt template",
        [ROW],
        "data.template: no template 'lama3'; did you mean llama3, mllama, llama4? A path that ends in .jinja is read as a "
        "file; without data.template the tokenizer's own chat template is used",
        template="lama3",
    ),
    rows(
        "a template file that is gone",
        [ROW],
        "data.template: file own.jinja does not exist",
        template="own.jinja",
    ),
    rows(
        "a template of another vocabulary",
        [ROW],
        "template 'llama3' ends answers with '<|eot_id|>', which the tokenizer's vocabulary lacks; choose a "
        "template that uses the tokenizer's own end token, such as default or alpaca",
        template="llama3",
    ),
    rows(
        "a prompt without its place",
        [ROW],
        "recipe.yaml:1: data.template.prompt: should contain {query} exactly once, in single braces",
        template={"prompt": "Q: A:"},
    ),
    prepared(
        "no template at all",
        {"data/x.json": ROWS},
        "the tokenizer has no chat template; name one with data.template, such as chatml, alpaca or default; "
        "`luthier templates` lists them all",
        "x.json",
        own="",
    ),
    rows(
        "a template that is no Jinja",
        [ROW],
        "the chat template is not valid Jinja: line 1: Unexpected end of template. Jinja was looking for "
        "the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'.",
        own="{% for m in messages %}",
    ),
    rows(
        "a template whose prompt is no prefix",
        [ROW],
        "data set 'x', row 0: the prompt is not a prefix of the training text: generation would see "
        "'im_start|>assistant\\n<think>' where training sees 'im_start|>assistant\\nSo.<|im_end|>\\n'. "
        "Use a template made for training, or a named one (data.template)",
        own=PROMPT_IS_NO_PREFIX,
    ),
    rows(
        "a template without an end",
        [ROW],
        "data set 'x', row 0: the stop token is not supervised: the template shows message 1 as 'So.\\n', which "
        "does not end with '<|im_end|>'",
        own=CHATML.replace("<|im_end|>", ""),
    ),
]
