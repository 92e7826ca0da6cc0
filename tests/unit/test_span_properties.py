"""Weights of spans inside of messages, on random conversations: what each token's weight is, found without the code
under test: a byte-level token is as many bytes long as it has characters, and the rule is the documented one."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.formats import to_row
from luthier.data.read import RawRow
from luthier.data.registry import DEFAULT_COLUMNS, DEFAULT_TAGS, DatasetAttr
from luthier.data.template import load_template
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError
from tests.tiny import chat_tokenizer
from tests.tiny_tokenizers import byte_level

OPENAI = DatasetAttr(
    "demo", "file", "", formatting="openai", columns=DEFAULT_COLUMNS["openai"], tags=DEFAULT_TAGS["openai"]
)
CHATML = chat_tokenizer().chat_template
TEMPLATE = load_template(byte_level(("<|im_start|>", "<|im_end|>"), CHATML), DataSpec())
FRAGMENTS = (
    *("a", "it is a test", " of the tokenizer", ". ", "\n", "  ", "42", "<|im_", "user\n", "answer"),
    *("é", "e\u0301", "ß", "中文", "שלום", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\U000f0000", "\u200d"),
)
words = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=6).map("".join).filter(str.strip)
weights = st.sampled_from([0, 0.25, 1, 3])


@st.composite
def turns(draw: Any) -> list[dict[str, Any]]:
    """Questions and answers in turn; spans between bounds that are drawn, adjacent ones among them."""
    found = []
    for k in range(2 * draw(st.integers(1, 2))):
        text = draw(words)
        turn: dict[str, Any] = {"role": ("user", "assistant")[k % 2], "content": text}
        if draw(st.booleans()):
            turn["weight"] = draw(st.sampled_from([0, 0.5, 2])) if k % 2 else 0
        bounds = sorted(draw(st.sets(st.integers(0, len(text)), max_size=5)))
        pairs = list(pairwise(bounds))
        kept = [[start, stop, draw(weights)] for start, stop in pairs if draw(st.booleans())]
        if kept:
            turn["spans"] = draw(st.permutations(kept))
        found.append(turn)
    return found


def expected(turns: list[dict[str, Any]], text: str, tokens: list[str]) -> list[float]:
    """A token has the weight of the character that its last byte is of: a span's, else its answer's, up to and with the
    end token."""
    characters, at = [0.0] * len(text), 0
    for turn in turns:
        header = f"<|im_start|>{turn['role']}\n"
        assert text.startswith(header + turn["content"] + "<|im_end|>", at)
        start = at + len(header)
        stop = start + len(turn["content"])
        end = stop + len("<|im_end|>")
        if turn["role"] == "assistant":
            characters[start:end] = [float(turn.get("weight", 1))] * (end - start)
        for first, last, weight in turn.get("spans", ()):
            characters[start + first : start + last] = [float(weight)] * (last - first)
        at = end + 1
    of_bytes = [weight for one, weight in zip(text, characters, strict=True) for _ in one.encode()]
    ends = list(accumulate(map(len, tokens)))
    assert ends[-1] == len(of_bytes)
    return [of_bytes[end - 1] for end in ends]


@settings(max_examples=100, deadline=None)
@given(said=turns())
def test_a_token_weighs_what_its_last_character_does(said: list[dict[str, Any]]) -> None:
    row = to_row(RawRow(0, "demo, row 0", {"messages": said}), OPENAI, "conversation")
    encoded = sft_sample(row, TEMPLATE, EncodeOptions(max_length=10_000, overflow="error"))
    conversation = row.conversation or Conversation(())
    ids = TEMPLATE.encode(conversation).input_ids
    wanted = expected(said, TEMPLATE.rendering(conversation), TEMPLATE.tokenizer.convert_ids_to_tokens(ids))
    if any(wanted):
        (sample,) = encoded.samples
        assert sample.input_ids.tolist() == ids and sample.weights.tolist() == wanted
    else:
        assert encoded.samples == () and encoded.lost.dropped == "no answer to learn"


@settings(max_examples=100, deadline=None)
@given(
    text=words, spans=st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12)), min_size=1, max_size=3)
)
def test_spans_are_refused_exactly_where_they_are_empty_outside_or_shared(
    text: str, spans: list[Any]
) -> None:
    """Adjacent ones share nothing; the characters are those of Python, whatever bytes they have."""
    fits = all(0 <= start < stop <= len(text) for start, stop in spans)
    taken = [k for start, stop in spans for k in range(start, stop)]
    raw = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
    raw["messages"][1]["spans"] = [[start, stop, 1] for start, stop in spans]  # type: ignore[index,assignment]

    def read() -> Any:
        return to_row(RawRow(0, "demo, row 0", raw), OPENAI, "conversation").conversation

    if fits and len(taken) == len(set(taken)):
        assert [span[:2] for span in read().messages[1].spans] == sorted(spans)
    else:
        with pytest.raises(DataError, match="demo, row 0, message 1"):
            read()
