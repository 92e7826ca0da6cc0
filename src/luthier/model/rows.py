"""How the segments of a flat batch go through the model: as one row, or as padded rows beside each other.

A stage always sees a flat batch. Where a model cannot keep the segments of a row apart (recurrent, convolutional and
linear-attention layers, attention that cannot be chosen), each segment becomes a row of its own, padded to the
longest. The supervised positions keep their order, so nothing that a stage computes can tell the difference.

Shapes: S segments, T tokens of the flat row, L length of the longest segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.types import IGNORE_INDEX

Side = Literal["right", "left"]


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was measured; differences in nats."""

    attention_calls: int
    difference: float
    """Between the segments together, by the kernel, and each alone, by the model's ordinary forward."""
    leak: float
    """What a change in one segment moved of the other."""
    reach: float
    """Largest gradient of one segment's log-probabilities at the other's embeddings, as a part of that at its own.
    Nothing, however small the weights are, where segments are apart; where they leak, it is no matter of rounding."""
    lookahead: float
    """The same at the embeddings of tokens that come after."""


@dataclass(frozen=True, slots=True)
class SharingTest:
    """What was measured of prompts that are computed once; differences from rows with a prompt of their own."""

    difference: float
    """Of log-probabilities, in nats, or of scores."""
    gradient: float
    """Of gradients at the embeddings of prompts, as a part of the largest there."""
    reach: float
    """Largest gradient of a branch where none should go (the other branches, other prompts, later tokens), as a part
    of that at its own prompt and itself."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The layout that was chosen for a model, why, and what the self-test measured of it."""

    padded: bool = False
    side: Side = "right"
    reason: str = ""
    """Why rows are padded; empty where they are flat."""
    tests: Mapping[str, SelfTest | SharingTest] = field(default_factory=dict)
    """`flat`, `padded` and `shared`, as far as each could be measured."""
    shares_prompts: bool = False
    """Whether several answers may continue one prompt in a flat row, computed once."""
    unshared_reason: str = ""
    """Why not, where it was tried."""

    def record(self) -> dict[str, Any]:
        """For the run's manifest."""
        return {
            "layout": "padded" if self.padded else "flat",
            **({"padding_side": self.side, "reason": self.reason} if self.padded else {}),
            **(
                {"shares_prompts": self.shares_prompts} if self.shares_prompts or self.unshared_reason else {}
            ),
            **({"unshared_reason": self.unshared_reason} if self.unshared_reason else {}),
            "self_test": {name: asdict(test) for name, test in self.tests.items()},
        }


FLAT = Rows()


@dataclass(frozen=True, slots=True)
class PaddedRows:
    """input_ids, attention_mask (1 where a token is real), position_ids and targets, each (S, L) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Tensor


def padded_rows(
    input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, targets: Tensor, side: Side
) -> PaddedRows:
    """Each segment of a flat row (1, T) as a row of its own; row-major order is the flat order.

    Padding has token 0, position 0 and no target.
    """
    spread = _spreader(cu_seqlens, side)
    return PaddedRows(
        input_ids=spread(input_ids[0], 0),
        attention_mask=spread(torch.ones_like(input_ids[0]), 0),
        position_ids=spread(position_ids[0], 0),
        targets=spread(targets, IGNORE_INDEX),
    )


def is_token_types(name: str) -> bool:
    """Whether a forward argument says of each token what it stands for."""
    return name.endswith("token_type_ids")


def padded_media(media: Mapping[str, Tensor], cu_seqlens: Tensor, side: Side) -> dict[str, Tensor]:
    """Forward arguments of media for padded rows: what says of each token (1, T) whether it stands for media becomes
    (S, L), with 0 for padding, as text has it; the media themselves stay in the order of the rows."""
    spread = _spreader(cu_seqlens, side)
    return {name: spread(values[0], 0) if is_token_types(name) else values for name, values in media.items()}


def _spreader(cu_seqlens: Tensor, side: Side) -> Callable[[Tensor, int], Tensor]:
    """Lays values of the tokens of a flat row (T,) out as padded rows (S, L)."""
    starts_S, lengths_S = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    num_rows, width, device = len(lengths_S), int(lengths_S.max()), cu_seqlens.device
    rows_T = torch.repeat_interleave(torch.arange(num_rows, device=device), lengths_S)
    columns_T = torch.arange(len(rows_T), device=device) - starts_S[rows_T]
    if side == "left":
        columns_T = columns_T + (width - lengths_S)[rows_T]

    def spread(values_T: Tensor, padding: int) -> Tensor:
        table = torch.full((num_rows, width), padding, dtype=values_T.dtype, device=device)
        table[rows_T, columns_T] = values_T
        return table

    return spread
