"""Reasoning templates under data.rules: llamafactory give that tool's tokens and targets (data/llamafactory_reasoning)."""

from __future__ import annotations

import hashlib
import json
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
CASES: dict[str, Any] = {}
for file in sorted(FOLDER.glob("*.json")):
    if file.name != "rows.json":
        CASES |= json.loads(file.read_text(encoding="utf-8"))


OPENED = ("deepseekr1", "qwen3_5", "qwen3_6")
"""Templates whose prompt opens the reasoning, as their vendors have it; that tool learns the opening, too."""
MARKS = ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>")
"""Tokens of these models' tokenizers, which are added to the one of the test."""


def sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]


def translated(case: str, tmp_path: Path) -> DataSpec:
    """The data part of the recipe that such a file becomes."""
    template, stage, *said = case.split()
    keys = [word.replace("=", ": ") for word in said]
    file = tmp_path / "theirs.yaml"
    lines = ["model_name_or_path: embedded", f"stage: {stage}", "do_train: true", "finetuning_type: lora"]
    lines += ["dataset: rows", f"template: {template}", "output_dir: out", *keys]
    file.write_text("\n".join(lines) + "\n")
    data = load_recipe(file).recipe.data
    assert data.rules == "llamafactory" and data.template == template
    return data


def as_there(ids: list[int], targets: list[int], opening: list[int], joined: int) -> list[list[int]]:
    """Tokens and targets with what that tool does otherwise where the prompt opens the reasoning: the opening of a
    thought is a target, too, and an empty thought is tokenized in one piece, its newlines in pairs (`joined`)."""
    ids, targets = list(ids), list(targets)
    think, newline = opening
    for at in range(len(ids) - 1, 1, -1):
        if ids[at - 2 : at] == opening and targets[at] != -100 and targets[at - 1] == -100:
            targets[at - 2 : at] = opening
            closing = ids[at + 1 : at + 4]
            if ids[at] == newline and closing[1:] == [newline, newline]:
                whole = [think, joined, closing[0], joined]
                ids[at - 2 : at + 4] = targets[at - 2 : at + 4] = whole
    return [ids, targets]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_targets(case: str, smollm2: Path, tmp_path: Path) -> None:
    data, stage = translated(case, tmp_path), case.split()[1]
    opens, tokenizer = case.split()[0] in OPENED, AutoTokenizer.from_pretrained(smollm2)
    if opens:
        tokenizer.add_tokens(list(MARKS), special_tokens=True)
    template = load_template(tokenizer, data, pieces=True)
    options = EncodeOptions.of(data, stage, llamafactory=True)
    opening = template.tokenizer.encode("<think>\n", add_special_tokens=False) if opens else []
    (joined,) = template.tokenizer.encode("\n\n", add_special_tokens=False)
    for number, (row, expected) in enumerate(zip(ROWS, CASES[case], strict=True)):
        said = [Message(m["role"], m["content"]) for m in row["messages"]]
        chosen = Conversation(tuple(said))
        rejected = Conversation((*said[:-1], Message("assistant", row["rejected"])))
        if stage == "sft":
            *_, sample = sft_sample(Row("demo", number, chosen), template, options).samples
            ids = sample.input_ids.tolist()
            found = [ids, [t if w else -100 for t, w in zip(ids, sample.weights.tolist(), strict=True)]]
        else:
            found = []
            for conversation in (chosen, rejected):
                # that tool lets the two prompts differ; here such a pair is left out and counted
                one = Row("demo", number, conversation, rejected=conversation)
                (sample,) = pair_sample(one, template, options).samples
                first, second = sample.branches
                ids = sample.input_ids[:second].tolist()
                found += [ids, [-100] * first + ids[first:]]
        if opening:
            changed = [as_there(*found[k : k + 2], opening, joined) for k in range(0, len(found), 2)]
            there = [part for both in changed for part in both]
            assert data.thinking.empty != "learn" or there != found, "nothing is done otherwise"
            found = there
        lengths = [len(ids) for ids in found[::2]]
        assert expected["tokens"] in (lengths, *lengths), (number, template.decode(found[0]))
        assert sha(found) == expected["sha256"], (number, template.decode(found[0]))
