"""Rows -> samples: weights, what is too long, what is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from luthier.data.encode import EncodeOptions, blocks, pt_samples, sft_sample, share_room, windows
from luthier.recipe.schema import DataSpec
from luthier.types import (
    Conversation,
    DataError,
    Encoded,
    Lost,
    Message,
    Row,
    Sample,
)
from tests.words import BOS, END, EOS, NEWLINE, Words


def options(**changes: Any) -> EncodeOptions:
    return EncodeOptions(**({"max_length": 1000, "overflow": "drop"} | changes))


def row(*messages: tuple[str, str] | Message) -> Row:
    made = (m if isinstance(m, Message) else Message(*m) for m in messages)
    return Row("demo", 5, Conversation(tuple(made)))


TWO_TURNS = (("user", "a bb"), ("assistant", "ccc dddd"), ("user", "eeeee"), ("assistant", "ffffff"))


def weights(encoded: Encoded) -> list[dict[int, float]]:
    """For each sample, its supervised tokens in order as {token: weight}."""
    return [
        {int(t): float(w) for t, w in zip(s.input_ids, s.weights, strict=True) if w} for s in encoded.samples
    ]


# --------------------------------------------------------------------------------------------------
# Weights


def test_answers_and_their_stop_tokens_are_targets() -> None:
    (sample,) = sft_sample(row(*TWO_TURNS), Words(), options()).samples
    assert sample.input_ids.tolist() == [
        101,
        1,
        2,
        900,
        901,
        102,
        3,
        4,
        900,
        901,
        101,
        5,
        900,
        901,
        102,
        6,
        900,
        901,
    ]
    assert sample.weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert (sample.source, sample.index) == ("demo", 5)
    assert sample.input_ids.dtype == np.int32 and sample.weights.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mask_history": True}, {6: 1.0, END: 1.0}),
        ({"train_after_stop": True}, {3: 1.0, 4: 1.0, 6: 1.0, END: 1.0, NEWLINE: 1.0}),
        ({"train_on_prompt": True, "mask_history": True}, None),
    ],
)
def test_options_of_weights(changes: dict[str, Any], expected: dict[int, float] | None) -> None:
    encoded = sft_sample(row(*TWO_TURNS), Words(), options(**changes))
    if expected is not None:
        assert weights(encoded) == [expected]
    else:
        assert encoded.samples[0].weights.tolist() == [1] * 6 + [0, 0, 0] + [1] * 9


def test_train_on_prompt_learns_everything() -> None:
    (sample,) = sft_sample(row(*TWO_TURNS), Words(), options(train_on_prompt=True)).samples
    assert sample.weights.tolist() == [1] * 18


def test_messages_have_weights_of_their_own() -> None:
    turns = (
        ("user", "a"),
        Message("assistant", "bb", weight=0.25),
        ("user", "ccc"),
        Message("assistant", "dddd", weight=0),
    )
    (sample,) = sft_sample(row(*turns), Words(), options()).samples
    assert sample.weights.tolist() == [0, 0, 0, 0, 0, 0.25, 0.25, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_empty_answers_are_not_learnt() -> None:
    encoded = sft_sample(
        row(("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "cc")), Words(), options()
    )
    assert weights(encoded) == [{2: 1.0, END: 1.0}]
    only = row(("user", "a"), ("assistant", ""))
    assert sft_sample(only, Words(), options()) == Encoded(lost=Lost("no answer to learn"))
    (kept,) = sft_sample(only, Words(), options(llamafactory=True)).samples
    assert kept.weights.tolist() == [0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((("user", "a"),), "no answer to learn"),
        ((("narrator", "a"), ("assistant", "b")), "unknown role"),
        ((("user", "a"), Message("assistant", "b", weight=0)), "no answer to learn"),
    ],
)
def test_rows_without_anything_to_learn_are_dropped(messages: Sequence[Any], reason: str) -> None:
    assert sft_sample(row(*messages), Words(), options()) == Encoded(lost=Lost(reason))


def test_roles_need_not_alternate_unless_llamafactory_is_followed() -> None:
    rows = [
        row(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")),
        row(("assistant", "a"), ("user", "b")),
        row(("user", "a"), ("assistant", "b"), ("user", "c")),
        row(("user", "a"), ("system", "s"), ("assistant", "b")),
    ]
    assert [len(sft_sample(r, Words(), options()).samples) for r in rows] == [1, 1, 1, 1]
    reasons = [sft_sample(r, Words(), options(llamafactory=True)).lost.dropped for r in rows]
    assert reasons == ["roles do not alternate"] * 3 + ["system message inside the conversation"]
    good = row(("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"))
    assert len(sft_sample(good, Words(), options(llamafactory=True)).samples) == 1


def test_rewritten_answers_become_samples_of_their_own() -> None:
    encoded = sft_sample(row(*TWO_TURNS), Words(forgets=True), options())
    assert [s.input_ids.tolist() for s in encoded.samples] == [
        [101, 1, 2, 900, 901, 102, 3, 4, 900, 901],
        [101, 1, 2, 900, 901, 102, 3, 900, 901, 101, 5, 900, 901, 102, 6, 900, 901],
    ]
    assert weights(encoded) == [{3: 1.0, 4: 1.0, END: 1.0}, {6: 1.0, END: 1.0}]
    masked = sft_sample(row(*TWO_TURNS), Words(forgets=True), options(mask_history=True))
    assert weights(masked) == [{6: 1.0, END: 1.0}]


# --------------------------------------------------------------------------------------------------
# Too long


def test_overflow_policies() -> None:
    long = row(*TWO_TURNS)
    fits = sft_sample(long, Words(), options(max_length=18, overflow="error"))
    assert len(fits.samples[0]) == 18 and fits.lost == Lost()
    assert sft_sample(long, Words(), options(max_length=17)) == Encoded(lost=Lost("longer than max_length"))
    with pytest.raises(DataError, match=r"demo, row 5: 18 tokens, more than data\.max_length \(17\)"):
        sft_sample(long, Words(), options(max_length=17, overflow="error"))


def test_split_trains_every_target_once() -> None:
    encoded = sft_sample(row(*TWO_TURNS), Words(), options(max_length=8, overflow="split"))
    assert encoded.lost == Lost()
    assert [s.input_ids.tolist() for s in encoded.samples] == [
        [101, 1, 2, 900, 901, 102, 3, 4],
        [4, 900, 901, 101, 5, 900, 901, 102],
        [102, 6, 900, 901],
    ]
    assert [s.weights.tolist() for s in encoded.samples] == [
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0],
    ]


@pytest.mark.parametrize(
    ("source", "target", "room", "kept"),
    [
        (10, 4, 9, (5, 4)),  # a short answer stays whole
        (3, 20, 9, (3, 6)),  # a short prompt stays whole
        (10, 10, 9, (5, 4)),  # both shrink in proportion: int(9 * 0.5) = 4
        (30, 10, 9, (7, 2)),  # int(9 * 0.25) = 2
        (6, 30, 9, (2, 7)),
        (5, 5, 20, (5, 5)),
    ],
)
def test_share_room(source: int, target: int, room: int, kept: tuple[int, int]) -> None:
    assert share_room(source, target, room) == kept


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_share_room_never_exceeds_the_room_and_keeps_what_fits(source: int, target: int, room: int) -> None:
    s, t = share_room(source, target, room)
    assert 0 <= s <= source and 0 <= t <= target and s + t <= room
    if source + target <= room:
        assert (s, t) == (source, target)


def test_truncate_shares_the_room_turn_by_turn() -> None:
    # turns are 6 + 4 and 5 + 3 tokens, the answers' share including what follows the stop token
    encoded = sft_sample(row(*TWO_TURNS), Words(), options(max_length=14, overflow="truncate"))
    (sample,) = encoded.samples
    # first turn: 2 x 4 < 14, so whole; room 4 for the second: neither is short, int(4 x 3 / 8) = 1 of the answer
    assert sample.input_ids.tolist() == [101, 1, 2, 900, 901, 102, 3, 4, 900, 901, 101, 5, 900, 6]
    assert sample.weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert encoded.lost == Lost(tokens=4)


def test_truncate_counts_answers_that_are_gone() -> None:
    encoded = sft_sample(row(*TWO_TURNS), Words(), options(max_length=10, overflow="truncate"))
    assert encoded.samples[0].input_ids.tolist() == [101, 1, 2, 900, 901, 102, 3, 4, 900, 901]
    assert encoded.lost == Lost(tokens=8, answers=1)


def test_truncate_with_masked_history_keeps_the_last_turn() -> None:
    encoded = sft_sample(
        row(*TWO_TURNS), Words(), options(max_length=11, overflow="truncate", mask_history=True)
    )
    (sample,) = encoded.samples
    # the last turn (5 + 3) first, then 3 tokens of room: int(3 x 4 / 10) = 1 of the first answer, 2 of its prompt
    assert sample.input_ids.tolist() == [101, 1, 3, 101, 5, 900, 901, 102, 6, 900, 901]
    assert sample.weights.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert encoded.lost == Lost(tokens=7)


def test_truncate_drops_what_has_no_target_left() -> None:
    late = row(("user", "a " * 30), Message("assistant", "b", weight=0), ("user", "c"), ("assistant", "d"))
    native = sft_sample(late, Words(), options(max_length=10, overflow="truncate"))
    assert native == Encoded(lost=Lost("nothing left to learn in max_length", 35, 1))
    (kept,) = sft_sample(
        late, Words(), options(max_length=10, overflow="truncate", llamafactory=True)
    ).samples
    assert len(kept) == 10 and not kept.weights.any()


@given(st.data())
def test_truncation_equals_the_rule_written_plainly(data: st.DataObject) -> None:
    turns = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4))
    limit = data.draw(st.integers(2, 80))
    messages = [m for a, b in turns for m in (("user", "x " * a), ("assistant", "yy " * b))]
    encoded = sft_sample(
        row(*messages), Words(), options(max_length=limit, overflow="truncate", llamafactory=True)
    )
    ids: list[int] = []
    for a, b in turns:
        if len(ids) >= limit:
            break
        prompt, answer = [101, *[1] * a, END, NEWLINE, 102], [*[2] * b, END, NEWLINE]
        s, t = share_room(len(prompt), len(answer), limit - len(ids))
        ids += prompt[:s] + answer[:t]
    assert encoded.samples[0].input_ids.tolist() == ids


# --------------------------------------------------------------------------------------------------
# Documents


def text(content: str) -> Row:
    return Row("wiki", 2, text=content)


def test_documents_are_all_targets_with_their_end() -> None:
    (sample,) = pt_samples(text("a bb ccc"), Words(), options(overflow="split")).samples
    assert sample.input_ids.tolist() == [BOS, 1, 2, 3, EOS] and sample.weights.tolist() == [1] * 5
    assert pt_samples(text(" \n"), Words(), options()) == Encoded(lost=Lost("empty text"))
    assert len(pt_samples(text(""), Words(), options(llamafactory=True)).samples) == 1


def test_long_documents() -> None:
    long = text("a bb ccc dddd eeeee")
    split = pt_samples(long, Words(), options(max_length=3, overflow="split"))
    assert [s.input_ids.tolist() for s in split.samples] == [[BOS, 1, 2], [2, 3, 4], [4, 5, EOS]]
    assert [s.weights.tolist() for s in split.samples] == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    cut = pt_samples(long, Words(), options(max_length=3, overflow="truncate"))
    assert cut.samples[0].input_ids.tolist() == [BOS, 1, 2] and cut.lost == Lost(tokens=4)
    assert pt_samples(long, Words(), options(max_length=3)) == Encoded(lost=Lost("longer than max_length"))
    whole = pt_samples(long, Words(), options(max_length=3, whole_documents=True, ignore_id=EOS))
    assert whole.samples[0].input_ids.tolist() == [1, 2, 3, 4, 5, EOS]
    assert whole.samples[0].weights.tolist() == [1, 1, 1, 1, 1, 0]


@given(st.integers(1, 60), st.integers(2, 20))
def test_windows_train_each_target_once(length: int, limit: int) -> None:
    sample = Sample(np.arange(length, dtype=np.int32), np.ones(length, np.float32), "s", 1)
    pieces = list(windows(sample, limit))
    assert all(1 <= len(piece) <= limit for piece in pieces)
    targets = [
        int(t) for piece in pieces for t, w in zip(piece.input_ids[1:], piece.weights[1:], strict=True) if w
    ]
    assert targets == list(range(1, length))
    # each target is predicted from the token before it, whatever the window
    for piece in pieces:
        assert np.array_equal(np.diff(piece.input_ids), np.ones(len(piece) - 1))


def test_blocks_concatenate_and_leave_out_the_rest() -> None:
    samples = [
        Sample(np.array(ids, np.int32), np.array(w, np.float32), "s", i)
        for i, (ids, w) in enumerate([([1, 2, 0], [1, 1, 0]), ([3, 0], [1, 0]), ([4, 5, 6, 0], [1, 1, 1, 0])])
    ]
    made = blocks(samples, 4)
    assert [b.input_ids.tolist() for b in made] == [[1, 2, 0, 3], [0, 4, 5, 6]]
    assert [b.weights.tolist() for b in made] == [[1, 1, 0, 1], [0, 1, 1, 1]]
    assert [b.index for b in made] == [0, 1]
    assert [b.input_ids.tolist() for b in blocks(samples, 4, first_id=9)] == [[9, 2, 0, 3], [9, 4, 5, 6]]
    assert samples[0].input_ids.tolist() == [1, 2, 0] and blocks([], 4) == []


def test_options_of_a_recipe() -> None:
    spec = DataSpec(max_length=64, packing=True, train_after_stop=True)
    sft, pt = EncodeOptions.of(spec, "sft"), EncodeOptions.of(spec, "pt", pad_id=3)
    assert (sft.overflow, pt.overflow, pt.ignore_id, pt.whole_documents) == ("drop", "split", None, False)
    assert sft.train_after_stop and sft.max_length == 64
    foreign = EncodeOptions.of(spec, "pt", llamafactory=True, pad_id=3)
    assert foreign.ignore_id == 3 and foreign.whole_documents
    assert EncodeOptions.of(spec, "sft", llamafactory=True, pad_id=3).ignore_id is None
