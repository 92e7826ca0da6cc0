"""What every contender trains on: the model's own chat template, loss on the answer alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

IGNORE = -100


def conversation(row: dict[str, str]) -> list[dict[str, str]]:
    """An alpaca row as messages: instruction and input joined by a newline, then the answer."""
    asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one conversation; supervised are the answer and its end token.

    Raises ValueError where the prompt is not a true prefix of the whole rendering or no end token follows.
    """
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    if whole[: len(prompt)] != prompt or tokenizer.eos_token_id not in whole[len(prompt) :]:
        raise ValueError(
            f"the chat template does not render the prompt as a prefix: {messages[0]['content'][:80]!r}"
        )
    end = len(prompt) + whole[len(prompt) :].index(tokenizer.eos_token_id) + 1
    labels = [IGNORE] * len(prompt) + whole[len(prompt) : end] + [IGNORE] * (len(whole) - end)
    return {"input_ids": whole, "labels": labels}


def load(model: Path, data: Path, dataset: str, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of an alpaca data set that `dataset_info.json` in `data` describes, encoded."""
    described = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))[dataset]
    rows = json.loads((data / described["file_name"]).read_text(encoding="utf-8"))
    if len(rows) < count:
        raise ValueError(f"{dataset} has {len(rows)} rows, {count} are needed")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [encode(tokenizer, conversation(row)) for row in rows[:count]]


def supervised(row: dict[str, list[int]]) -> int:
    """How many of the row's tokens are targets."""
    return sum(label != IGNORE for label in row["labels"])
