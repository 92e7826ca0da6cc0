"""Reasoning templates under data.rules: llamafactory give that tool's tokens and targets (data/llamafactory_reasoning)."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.pairs import pair_sample
from luthier.data.template import load_template
from luthier.recipe.load import load_recipe
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, Message, Row

FOLDER = Path(__file__).parent / "data" / "llamafactory_reasoning"
ROWS = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))
CASES = json.loads((FOLDER / "qwen3.json").read_text(encoding="utf-8"))
TRL = (
    Path((find_spec("trl") or pytest.fail("trl is a test dependency")).origin or "").parent / "chat_templates"
)


def sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]


def translated(case: str, tmp_path: Path) -> DataSpec:
    """The data part of the recipe that such a file becomes, with the vendor's template in place of the name."""
    template, stage, *said = case.split()
    keys = [word.replace("=", ": ") for word in said]
    file = tmp_path / "theirs.yaml"
    lines = ["model_name_or_path: embedded", f"stage: {stage}", "do_train: true", "finetuning_type: lora"]
    lines += ["dataset: rows", f"template: {template}", "output_dir: out", *keys]
    file.write_text("\n".join(lines) + "\n")
    data = load_recipe(file).recipe.data
    assert data.rules == "llamafactory" and data.template == template
    return data.model_copy(update={"template": str(TRL / "qwen3.jinja")})


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_targets(case: str, smollm2: Path, tmp_path: Path) -> None:
    data, stage = translated(case, tmp_path), case.split()[1]
    template = load_template(AutoTokenizer.from_pretrained(smollm2), data, pieces=True)
    options = EncodeOptions.of(data, stage, llamafactory=True)
    for number, (row, expected) in enumerate(zip(ROWS, CASES[case], strict=True)):
        said = [Message(m["role"], m["content"]) for m in row["messages"]]
        chosen = Conversation(tuple(said))
        rejected = Conversation((*said[:-1], Message("assistant", row["rejected"])))
        if stage == "sft":
            *_, sample = sft_sample(Row("demo", number, chosen), template, options).samples
            ids = sample.input_ids.tolist()
            found = [ids, [t if w else -100 for t, w in zip(ids, sample.weights.tolist(), strict=True)]]
            assert len(ids) == expected["tokens"], template.decode(ids)
        else:
            found = []
            for conversation in (chosen, rejected):
                # that tool lets the two prompts differ; here such a pair is left out and counted
                one = Row("demo", number, conversation, rejected=conversation)
                (sample,) = pair_sample(one, template, options).samples
                first, second = sample.branches
                ids = sample.input_ids[:second].tolist()
                found += [ids, [-100] * first + ids[first:]]
        assert sha(found) == expected["sha256"], (number, template.decode(found[0]))
