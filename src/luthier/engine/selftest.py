"""Whether rows that share a batch say what they say alone: asked of every model before it answers two at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engine.choosing import Chooser
from luthier.engine.key_values import rows_cache
from luthier.engine.lane import Lane, Row
from luthier.generation import Event, GenerationSettings, Request, TokenChoice

_LENGTHS = (5, 9, 3)
_AGAIN = 1
"""The prompt that is there a second time, and gets the keys and values of the first."""
_STEPS = 3
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest logit: what arithmetic of another order may change."""


@torch.inference_mode()
def answers_together(model: nn.Module) -> bool:
    """Whether prompts of several lengths, one of them joining late beside a copy of another, get the logits that each
    gets alone.

    False for models with a state that is no key or value of a token, and for those that do not look at the mask.
    """
    config: Any = model.config
    if rows_cache(config) is None:
        return False
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()) for length in _LENGTHS
    ]
    together = _logits(model, [*prompts, prompts[_AGAIN]], late=2)
    alone = [_logits(model, [prompt], late=0)[0] for prompt in prompts]
    dtype = next(model.parameters()).dtype
    for mine_KV, theirs_KV in zip(together, [*alone, alone[_AGAIN]], strict=True):
        bound = _TOLERANCE.get(dtype, 1e-3) * float(theirs_KV.abs().max())
        if float((mine_KV - theirs_KV[: len(mine_KV)]).abs().max()) > bound:
            return False
    return True


class _Recorded(Lane):
    """A lane that keeps its logits, and answers the same token throughout."""

    def __init__(self, model: nn.Module, *, together: bool) -> None:
        super().__init__(model, None, together=together)
        self.logits: dict[int, list[Tensor]] = {}

    def _chosen(self, rows: Sequence[Row], logits_RV: Tensor) -> list[Event]:
        for row, logits_V in zip(rows, logits_RV.float(), strict=True):
            self.logits.setdefault(row.ticket, []).append(logits_V)
        return [row.take(TokenChoice(1), None) for row in rows]


def _logits(model: nn.Module, prompts: list[tuple[int, ...]], *, late: int) -> list[Tensor]:
    """For each prompt (K, V): the logits of the next token after 0 to K - 1 tokens of its answer. The last `late` of
    them join one step after the others; with none, a prompt is alone."""
    lane = _Recorded(model, together=late > 0)
    settings = GenerationSettings()
    rows = [
        Row(number, Request(prompt, settings), _STEPS + 2, Chooser(settings, prompt))
        for number, prompt in enumerate(prompts)
    ]
    lane.admit(rows[: len(rows) - late])
    for step in range(_STEPS):
        lane.step()
        if step == 0 and late:
            lane.admit(rows[-late:])
    return [torch.stack(lane.logits[row.ticket]) for row in rows]
