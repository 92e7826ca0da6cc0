"""Prompts -> what a model's forward reads: tokens padded on the left, positions, and the numbers of their media.

Media are opened here, by what opens them in training, so that the model is shown the same numbers.

Shapes: P prompts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from luthier.generation import Request
from luthier.model.multimodal import makes_positions
from luthier.model.rows import is_token_types, padded_media
from luthier.types import ModelError


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """Prompts as a model reads them.

    ids_PL, mask_PL: int64, the mask 1 where a token is real. positions: (P, L), or (3, P, L) of a model that counts
    time, height and width of media apart. shifts: of each prompt, the position of the token that comes next less the
    number of tokens before it: an image takes fewer positions than tokens there. media: by the names of the forward.
    """

    ids_PL: Tensor
    mask_PL: Tensor
    positions: Tensor
    shifts: list[int]
    media: Mapping[str, Tensor] = field(default_factory=dict)


def prompt_inputs(model: nn.Module, requests: Sequence[Request]) -> PromptInputs:
    """The prompts of some requests, on the model's device. Raises DataError for a file that cannot be opened any more,
    and ModelError for a model whose positions of media are not known."""
    prompts = [request.prompt for request in requests]
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids_PL = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask_PL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions_PL = (mask_PL.cumsum(-1) - 1).clamp(min=0)
    opened = opened_media(prompts, requests)
    if not opened:
        return PromptInputs(ids_PL, mask_PL, positions_PL, [0] * len(prompts))
    bounds = torch.tensor([0, *accumulate(map(len, prompts))])
    media = {name: one.to(device) for name, one in padded_media(opened, bounds, "left").items()}
    backbone: Any = model.base_model
    if not makes_positions(backbone):
        return PromptInputs(ids_PL, mask_PL, positions_PL, [0] * len(prompts), media)
    positions_3PL, shifts_P1 = _made_positions(backbone, ids_PL, mask_PL, media)
    return PromptInputs(ids_PL, mask_PL, positions_3PL, shifts_P1[:, 0].tolist(), media)


def opened_media(sequences: Sequence[Sequence[int]], shown: Sequence[Request]) -> dict[str, Tensor]:
    """What the forward takes of the media of some token sequences, which stand one after the other, as the collator of
    training has it; nothing where none has media. `shown` has the media of each, in the order of their tokens."""
    opener = next((one.opener for one in shown if one.media), None)
    if opener is None:
        return {}
    flat_1T = torch.tensor([[token for ids in sequences for token in ids]])
    return opener([medium for one in shown for medium in one.media], flat_1T)


def _made_positions(
    backbone: Any, ids_PL: Tensor, mask_PL: Tensor, media: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The model's own positions (3, P, L), and (P, 1) how far answers are from the number of tokens before them.

    The model would remember the second of them for itself; here rows come and go, and each keeps its own.
    """
    names = signature(backbone.get_rope_index).parameters
    if not any(is_token_types(name) for name in names):
        raise ModelError(
            f"{type(backbone).__name__} makes positions of media in a way of its own, so it cannot answer to them "
            "here; text it can"
        )
    given = {name: value for name, value in media.items() if name in names}
    positions_3PL, shifts_P1 = backbone.get_rope_index(input_ids=ids_PL, attention_mask=mask_PL, **given)
    return positions_3PL, shifts_P1
