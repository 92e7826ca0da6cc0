"""Rows that are answered together: all that are under way with one adapter, one token each at a time.

A row joins as soon as there is room and leaves with its last token (continuous batching). Nobody waits for the longest
answer of a batch, and no forward pass is spent on rows that are finished.

Shapes: R rows, L tokens from the start of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from luthier.engine.choosing import Chooser, choose_rows
from luthier.engine.key_values import RowsLayer, rows_cache
from luthier.engine.protocol import Decode
from luthier.engine.row import GrowingAnswer
from luthier.generation import Event, Generation


@dataclass(slots=True)
class Row(GrowingAnswer):
    """A request under way, and what chooses its tokens."""

    chooser: Chooser

    @property
    def bad_scores(self) -> int:
        return self.chooser.bad_scores


class Lane:
    """Live rows and their keys and values. With `together` false there is one row at a time, in whatever cache the
    model has."""

    def __init__(self, model: nn.Module, decode: Decode | None, *, together: bool) -> None:
        self._model, self._decode, self._together = model, decode, together
        self._accepted = signature(model.forward).parameters
        self._rows: list[Row] = []
        self._cache: Cache | None = None
        self._mask_RL = torch.empty(0)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Sequence[Row]:
        return self._rows

    @property
    def longest(self) -> int:
        """Tokens that every row has in the cache once all have reached their limits."""
        return max((len(row.request.prompt) + row.limit for row in self._rows), default=0)

    def admit(self, rows: Sequence[Row]) -> list[Event]:
        """Read the prompts of new rows and choose their first tokens."""
        prompts = [row.request.prompt for row in rows]
        width = max(map(len, prompts))
        device = next(self._model.parameters()).device
        ids_RL = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
        mask_RL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        positions_RL = (mask_RL.cumsum(-1) - 1).clamp(min=0)
        config: Any = self._model.config
        cache = rows_cache(config) if self._together else DynamicCache(config=config)
        assert cache is not None
        logits_RV = self._forward(ids_RL, mask_RL, positions_RL, cache)
        events = self._chosen(rows, logits_RV)
        if not self._rows:
            self._cache, self._mask_RL = cache, mask_RL
        else:
            self._join(cache, mask_RL)
        self._rows.extend(rows)
        return self._leave(events)

    def step(self) -> list[Event]:
        """The next token of every row."""
        assert self._cache is not None
        last_R1 = torch.tensor([[row.choices[-1].token] for row in self._rows], device=self._mask_RL.device)
        self._mask_RL = F.pad(self._mask_RL, (0, 1), value=1)
        positions_R1 = self._mask_RL.sum(-1, keepdim=True) - 1
        logits_RV = self._forward(last_R1, self._mask_RL, positions_R1, self._cache)
        return self._leave(self._chosen(self._rows, logits_RV))

    def cancel(self, ticket: int) -> Generation | None:
        """Take a row out; what it has so far, or None where it is not here."""
        row = next((row for row in self._rows if row.ticket == ticket), None)
        if row is None:
            return None
        self._keep([number for number, other in enumerate(self._rows) if other is not row])
        return row.ended("cancelled")

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """(R, V) logits of the next tokens."""
        held = (
            "cache_params" if "cache_params" in self._accepted else "past_key_values"
        )  # Mamba's name for it
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, held: cache, "use_cache": True}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        logits_RV: Tensor = self._model(**inputs).logits[:, -1]
        return logits_RV

    def _chosen(self, rows: Sequence[Row], logits_RV: Tensor) -> list[Event]:
        choices = choose_rows([row.chooser for row in rows], logits_RV)
        return [row.take(choice, self._decode) for row, choice in zip(rows, choices, strict=True)]

    def _join(self, cache: Cache, mask_RL: Tensor) -> None:
        assert self._cache is not None
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            assert isinstance(mine, RowsLayer) and isinstance(theirs, RowsLayer)
            mine.join(theirs)
        longest = max(self._mask_RL.shape[1], mask_RL.shape[1])
        masks = [F.pad(mask, (longest - mask.shape[1], 0)) for mask in (self._mask_RL, mask_RL)]
        self._mask_RL = torch.cat(masks)

    def _leave(self, events: Sequence[Event]) -> list[Event]:
        """Take the rows out whose last event this was."""
        gone = {event.ticket for event in events if event.end is not None}
        if gone:
            self._keep([number for number, row in enumerate(self._rows) if row.ticket not in gone])
        return list(events)

    def _keep(self, numbers: Sequence[int]) -> None:
        self._rows = [self._rows[number] for number in numbers]
        if not self._rows:
            self._cache = None
            return
        chosen = torch.tensor(numbers, device=self._mask_RL.device)
        mask_RL = self._mask_RL[chosen]
        cut = int(mask_RL.argmax(-1).min())  # the first real token of the longest row
        self._mask_RL = mask_RL[:, cut:]
        assert self._cache is not None
        for layer in self._cache.layers:
            assert isinstance(layer, RowsLayer)
            layer.keep(chosen, cut)
