"""A flat batch laid out as padded rows."""

from __future__ import annotations

import pytest
import torch

from luthier.data.collate import flat_batch
from luthier.model.rows import FLAT, Rows, SelfTest, padded_rows
from luthier.types import IGNORE_INDEX, Batch
from tests.tiny import random_samples

LENGTHS = (3, 1, 5)


def batch() -> Batch:
    return flat_batch(random_samples(LENGTHS))


def test_right_and_left_by_hand() -> None:
    flat = Batch(
        input_ids=torch.tensor([[11, 12, 13, 21, 31, 32]]),
        position_ids=torch.tensor([[0, 1, 2, 0, 0, 1]]),
        cu_seqlens=torch.tensor([0, 3, 4, 6], dtype=torch.int32),
        targets=torch.tensor([12, -100, -100, -100, 32, -100]),
        target_weights=torch.zeros(6),
        parent=torch.full((3,), -1),
        max_length=3,
    )
    right = padded_rows(flat.input_ids, flat.position_ids, flat.cu_seqlens, flat.targets, "right")
    assert right.input_ids.tolist() == [[11, 12, 13], [21, 0, 0], [31, 32, 0]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert right.position_ids.tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 0]]
    assert right.targets.tolist() == [[12, -100, -100], [-100, -100, -100], [32, -100, -100]]
    left = padded_rows(flat.input_ids, flat.position_ids, flat.cu_seqlens, flat.targets, "left")
    assert left.input_ids.tolist() == [[11, 12, 13], [0, 0, 21], [0, 31, 32]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]
    assert left.targets.tolist() == [[12, -100, -100], [-100, -100, -100], [-100, 32, -100]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_order_and_number_stay(side: str) -> None:
    flat = batch()
    rows = padded_rows(flat.input_ids, flat.position_ids, flat.cu_seqlens, flat.targets, side)  # type: ignore[arg-type]
    real = rows.attention_mask.flatten().bool()
    assert int(real.sum()) == flat.num_tokens
    assert rows.input_ids.flatten()[real].tolist() == flat.input_ids[0].tolist()
    assert rows.position_ids.flatten()[real].tolist() == flat.position_ids[0].tolist()
    assert rows.targets.flatten()[real].tolist() == flat.targets.tolist()
    assert (rows.targets.flatten()[~real] == IGNORE_INDEX).all()


def test_record() -> None:
    assert FLAT.record() == {"layout": "flat", "self_test": {}}
    rows = Rows(
        padded=True, side="left", reason="it leaks", tests={"padded": SelfTest(0, 1e-6, 0.0, 0.0, 0.0)}
    )
    assert rows.record() == {
        "layout": "padded",
        "padding_side": "left",
        "reason": "it leaks",
        "self_test": {
            "padded": {"attention_calls": 0, "difference": 1e-6, "leak": 0.0, "reach": 0.0, "lookahead": 0.0}
        },
    }
