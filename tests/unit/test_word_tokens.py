"""Tokens of a text from those of its words: those of the tokenizer, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from luthier.data import word_batches
from luthier.data.word_batches import WordTable
from luthier.data.word_tokens import Request, WordTokens

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox doesn't jump over 1234 lazy dogs.\n\nIt's 2 o'clock; e.g. f(x) = {a: 1}.",
    "北京是中国的首都。 Größe, naïveté 🙂 and so on...   then\tmore\n - a list\n - of things\n",
] * 3


def tokenizer(*steps: pre_tokenizers.PreTokenizer, **changes: object) -> Tokenizer:
    """Byte-level BPE that was trained on the texts above, with ChatML's tokens."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    built.decoder = decoders.ByteLevel()
    if changes.get("nfc"):
        built.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(TEXTS, trainer)
    built.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<think>"])
    return built


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama3": lambda: tokenizer(split(LLAMA3), BYTES),
    "qwen2": lambda: tokenizer(split(LLAMA3.replace("{1,3}", "")), BYTES, nfc=True),
    "digits": lambda: tokenizer(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
}
TABLES: dict[str, WordTable] = {}
MADE: dict[str, tuple[Tokenizer, WordTokens]] = {}


def made(kind: str) -> tuple[Tokenizer, WordTokens]:
    if kind not in MADE:
        backend = KINDS[kind]()
        words = WordTokens.of(backend.to_str())
        assert words is not None
        MADE[kind] = backend, words
    return MADE[kind]


WORDS = st.sampled_from(
    [
        *(
            "a",
            "Z",
            "7",
            ".",
            ",",
            "'",
            "-",
            "(",
            "\n",
            "\t",
            " ",
            "  ",
            " \n",
            "\n\n",
            "\r\n",
            "\u3000",
            "\xa0",
        ),
        *("the", "doesn't", "1234", "é", "e\u0301", "北京", "🙂", "\u200d", "İ", "ǆ"),
        *("<|im_start|>", "<|im_end|>", "<think>", "<|im", "_end|>"),
    ]
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(words=st.lists(WORDS | st.text(max_size=6), max_size=24))
def test_ids_are_the_tokenizers(kind: str, words: list[str]) -> None:
    backend, remembered = made(kind)
    for text in ("".join(words), " ".join(words)):
        found = remembered.ids(text)
        if found is None:
            assert kind == "qwen2"
        else:
            assert found == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.lists(WORDS | st.text(max_size=6), max_size=12), min_size=1, max_size=5),
    data=st.data(),
)
def test_many_texts_are_each_of_them(kind: str, texts: list[list[str]], data: st.DataObject) -> None:
    """Cut anywhere, with words that the table has and has not."""
    words = made(kind)[1]
    table = TABLES.setdefault(kind, WordTable(words))
    requests = []
    for text in (join.join(parts) for parts in texts for join in ("", " ")):
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=3)) if text else []
        places = data.draw(st.lists(st.integers(0, len(text)), max_size=2)) if text else []
        requests.append(Request.of(text, cuts, places))
    found = [one and (one[0].tolist(), one[1]) for one in table.pieces(requests)]
    assert found == [words.pieces(request) for request in requests]


def test_a_full_table_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    words = made("llama3")[1]
    monkeypatch.setattr(word_batches, "_MOST", 40)
    table = WordTable(words)
    for turn in range(6):
        request = Request.of(" ".join(f"w{turn}{k}\n x  y" for k in range(9)), (), ())
        ((ids, at),) = table.pieces([request])  # type: ignore[misc]
        assert (ids.tolist(), at) == words.pieces(request)
    assert len(table._spellings) < 80


@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_told_apart(kind: str) -> None:
    """What no space divides is cut at the ends of lines, so that few texts are new."""
    words = made(kind)[1]
    assert words.lines
    words.ids("one\nTwo\n Three")
    assert {"one\n", "Two\n"} <= {*words.heads}


def test_text_that_is_to_be_normalized_is_left_to_the_tokenizer() -> None:
    words = made("qwen2")[1]
    assert words.ids("e\u0301") is None and words.ids("\u00e9") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_places(kind: str) -> None:
    backend, words = made(kind)
    text = "<|im_start|>user\nHi  there<|im_end|>\n<|im_start|>assistant\nThe fox.<|im_end|>\n"
    cut, stop = text.index("The"), text.rindex("\n")
    found = words.pieces(Request.of(text, (cut,), {cut, stop, len(text)}))
    assert found is not None
    ids, at = found
    parts = [text[:cut], text[cut:stop], text[stop:]]
    each = [backend.encode(part, add_special_tokens=False).ids for part in parts]
    assert ids == [*each[0], *each[1], *each[2]]
    assert at == {0: 0, cut: len(each[0]), stop: len(each[0] + each[1]), len(text): len(ids)}
    assert words.pieces(Request.of(text, (cut,), {cut + 2})) is None, (
        "in the middle of a word the tokenizer decides"
    )
    before = text.index("<|im_start|>", 1)
    assert words.pieces(Request.of(text, (cut,), {before})) is not None, "an added token begins there"


def with_token(**flags: bool) -> Tokenizer:
    backend = KINDS["gpt2"]()
    backend.add_tokens([AddedToken("<x>", **flags)])
    return backend


def overlapping() -> Tokenizer:
    backend = KINDS["gpt2"]()
    backend.add_tokens(["<x>", "x>y"])
    return backend


def inside() -> Tokenizer:
    backend = KINDS["gpt2"]()
    backend.add_tokens(["<x>", "x"])
    return backend


def metaspace() -> Tokenizer:
    backend = KINDS["gpt2"]()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def lowered() -> Tokenizer:
    backend = KINDS["gpt2"]()
    backend.normalizer = normalizers.Lowercase()
    return backend


@pytest.mark.parametrize(
    "other",
    [
        lambda: with_token(lstrip=True),
        lambda: with_token(rstrip=True),
        lambda: with_token(single_word=True),
        overlapping,
        inside,
        metaspace,
        lowered,
        lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: tokenizer(split(r"\p{L}+ \p{L}+|\s+|\S+"), BYTES),
        lambda: tokenizer(split(r"[a-z]+\s?|\s+|[^a-z\s]+"), BYTES),
    ],
    ids=[
        *(
            "strips left",
            "strips right",
            "single word",
            "overlapping",
            "inside another",
            "metaspace",
            "lowercase",
        ),
        *("prefix space", "two words in one", "a word and its space"),
    ],
)
def test_other_kinds_are_left_to_themselves(other: Callable[[], Tokenizer]) -> None:
    assert WordTokens.of(other().to_str()) is None
