"""The tokenized cache is rebuilt when data, template, tokenizer or settings change, and only then.

Every case prepares a recipe, changes one thing, prepares again, and looks at both the key and whether anything was
written to the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from luthier.data.cache import TokenCache
from luthier.material import read_material
from luthier.recipe.load import load_recipe
from luthier.recipe.resolve import Hardware, resolve
from luthier.types import DataError
from tiny_tokenizers import byte_level

CPU = Hardware("cpu", "a processor", 2**33, True, 2)
TOKENS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>")
OWN = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ': ') }}{% endfor %}"
ROWS = [
    {
        "instruction": f"Question {i}?",
        "input": "More of it." * (i % 2),
        "output": f"Answer {i}. <|im_end|>",
        "history": [["Before?", "Yes."]] * (i % 3),
        "other": f"Another answer {i}.",
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": f"b{i}"}],
    }
    for i in range(6)
]


@dataclass
class Bench:
    """A recipe with its files; `write` puts it back to the state in which every case starts."""

    folder: Path
    tokenizer: Callable[[], PreTrainedTokenizerFast] = field(default=lambda: byte_level(TOKENS, OWN))
    tree: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file.write_text(json.dumps(ROWS))
        (self.folder / "own.jinja").write_text(OWN)
        self.tree = {
            "model": {"path": "tiny"},
            "data": {
                "train": [{"file_name": "rows.json", "columns": {"history": "history"}}],
                "directory": str(self.folder),
                "cache": str(self.folder / "cache"),
                "template": "chatml",
            },
            "train": {"output": str(self.folder / "run")},
        }

    @property
    def file(self) -> Path:
        return self.folder / "rows.json"

    @property
    def dataset(self) -> dict[str, Any]:
        return self.tree["data"]["train"][0]

    def prepare(self) -> str:
        """The key of the training set."""
        recipe = resolve(load_recipe(self.tree, self.words), CPU).recipe
        data = read_material(recipe, self.tokenizer(), lambda text: None).data
        return next(iter(data.fingerprints.values()))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path)
    store = TokenCache.store

    def noting(self: TokenCache, key: str, *rest: Any) -> Any:
        made.written.append(key)
        return store(self, key, *rest)

    monkeypatch.setattr(TokenCache, "store", noting)
    return made


def words(*given: str) -> Callable[[Bench], None]:
    """The same recipe with values from the command line."""
    return lambda bench: bench.words.extend(given)


def dataset(**changes: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.dataset.update(changes)


def tokenizer(make: Callable[[], PreTrainedTokenizerFast]) -> Callable[[Bench], None]:
    return lambda bench: setattr(bench, "tokenizer", make)


def one_byte(bench: Bench) -> None:
    content = bytearray(bench.file.read_bytes())
    content[content.index(b"Question 3")] = ord("q")
    bench.file.write_bytes(bytes(content))


def another_token() -> PreTrainedTokenizerFast:
    made = byte_level(TOKENS, OWN)
    made.add_tokens([AddedToken("Question", special=False)])
    return made


def another_special_token() -> PreTrainedTokenizerFast:
    made = byte_level(TOKENS, OWN)
    made.eos_token = "<|eot_id|>"
    return made


OTHER: dict[str, Callable[[Bench], Any]] = {
    "one byte of the data": one_byte,
    "a row more": lambda bench: bench.file.write_text(json.dumps([*ROWS, ROWS[0]])),
    "another column": dataset(columns={"history": "history", "response": "other"}),
    "a column less": dataset(columns={}),
    "another format": dataset(formatting="sharegpt"),
    "template name": words("data.template=default"),
    "template file": lambda bench: bench.tree["data"].update(template=str(bench.folder / "own.jinja")),
    "four strings": lambda bench: bench.tree["data"].update(template={"prompt": "{query}: "}),
    "the tokenizer's own template": lambda bench: bench.tree["data"].pop("template"),
    "an added token": tokenizer(another_token),
    "another end token": lambda bench: (
        tokenizer(another_special_token)(bench),
        words("data.template=default")(bench),
    ),
    "a normalizer": tokenizer(lambda: byte_level(TOKENS, OWN, nfc=True)),
    "max_length": words("data.max_length=64"),
    "overflow": words("data.overflow=truncate"),
    "train_on_prompt": words("data.train_on_prompt=true"),
    "mask_history": words("data.mask_history=true"),
    "train_after_stop": words("data.train_after_stop=true"),
    "parse_special_tokens": words("data.parse_special_tokens=true"),
    "default_system": words("data.default_system=Be brief."),
    "an empty default_system": lambda bench: bench.tree["data"].update(default_system=""),
    "max_samples": words("data.max_samples=3"),
    "num_samples": dataset(num_samples=4),
    "stage": words("stage.type=pt"),
}
"""Whatever decides the tokens."""


def copied(bench: Bench) -> None:
    (bench.folder / "elsewhere").mkdir()
    (bench.folder / "elsewhere" / "copy.json").write_bytes(bench.file.read_bytes())
    bench.dataset.update(file_name="elsewhere/copy.json", name="another name")


def in_a_folder(bench: Bench) -> None:
    (bench.folder / "parts").mkdir()
    bench.file.rename(bench.folder / "parts" / "only.json")
    bench.dataset.update(file_name="parts")


def touched(bench: Bench) -> None:
    content = bench.file.read_bytes()
    bench.file.unlink()
    bench.file.write_bytes(content)


def with_its_checksum(bench: Bench) -> None:
    bench.dataset.update(dataset_sha1=hashlib.sha1(bench.file.read_bytes()).hexdigest())


def with_evaluation(bench: Bench) -> None:
    bench.tree["data"]["eval"] = [{"name": "again", **bench.dataset}]


SAME: dict[str, Callable[[Bench], Any]] = {
    "nothing": lambda bench: None,
    "the file written again": touched,
    "another name and place": copied,
    "a folder of that one file": in_a_folder,
    "its checksum": with_its_checksum,
    "the same rows for evaluation": with_evaluation,
    "learning rate": words("optim.lr=0.5"),
    "optimizer": words("optim.weight_decay=0.1"),
    "method": words("method.type=full"),
    "model": words("model.path=another"),
    "output": words("train.output=runs/elsewhere"),
    "epochs": words("train.epochs=7"),
    "tokens per batch": words("train.tokens_per_batch=17"),
    "rows per device": words("train.rows_per_device=3", "train.accumulation=2"),
    "tokens per pass": words("train.tokens_per_pass=33"),
    "seed": words("train.seed=7"),
    "data_seed": words("train.data_seed=7"),
    "precision": words("train.precision=bf16"),
    "neftune": words("train.neftune_alpha=5"),
    "workers": words("data.workers=2"),
    "shuffle": words("data.shuffle=false"),
    "packing": words("data.packing=true", "train.rows_per_device=1"),
    "dev_split": words("data.dev_split=0.5"),
    "max_lost": words("data.max_lost=null"),
    "the default written out": words("data.overflow=drop", "data.max_length=2048", "data.rules=luthier"),
}
"""Whatever does not."""


@pytest.mark.parametrize("change", OTHER)
def test_what_decides_the_tokens_makes_another_entry(change: str, bench: Bench) -> None:
    before = bench.prepare()
    assert bench.written == [before]
    OTHER[change](bench)
    after = bench.prepare()
    assert after != before and bench.written == [before, after]


@pytest.mark.parametrize("change", SAME)
def test_whatever_else_uses_the_entry_that_is_there(change: str, bench: Bench) -> None:
    before = bench.prepare()
    SAME[change](bench)
    assert bench.prepare() == before
    assert bench.written == [before]


def test_the_text_of_a_template_file_counts_and_not_its_name(bench: Bench) -> None:
    own, copy = bench.folder / "own.jinja", bench.folder / "copy.jinja"
    copy.write_text(OWN)
    bench.tree["data"]["template"] = str(own)
    before = bench.prepare()
    bench.tree["data"]["template"] = str(copy)
    assert bench.prepare() == before
    copy.write_text(OWN.replace("': '", "':  '"))
    assert bench.prepare() != before and len(bench.written) == 2


def test_other_role_names_make_another_entry(bench: Bench) -> None:
    bench.dataset["formatting"] = "sharegpt"
    before = bench.prepare()
    bench.dataset["tags"] = {"system_tag": "sys"}
    assert bench.prepare() != before


def test_a_drawn_sample_follows_the_seed(bench: Bench) -> None:
    bench.dataset["num_samples"] = 4
    keys = []
    for seed in (1, 2, 1):
        bench.words = [f"train.seed={seed}"]
        keys.append(bench.prepare())
    assert keys[0] == keys[2] != keys[1] and len(bench.written) == 2


def test_a_new_version_of_the_code_makes_another_entry(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bench.prepare()
    monkeypatch.setattr("luthier.data.prepare.__version__", "0.0.0")
    assert bench.prepare() != before


def test_a_wrong_checksum_is_seen_although_the_entry_is_there(bench: Bench) -> None:
    bench.prepare()
    bench.dataset["dataset_sha1"] = "0" * 40
    with pytest.raises(DataError, match=f"but {'0' * 40} was promised"):
        bench.prepare()
