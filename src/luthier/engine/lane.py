"""Rows that are answered together: all that are under way with one adapter, one token each at a time.

A row joins as soon as there is room and leaves with its last token (continuous batching). Nobody waits for the longest
answer of a batch, and no forward pass is spent on rows that are finished. A prompt that several rows have is read once:
those that join together with the first, or while one of them is here, get copies of its keys and values.

Shapes: R rows, P prompts, L tokens from the start of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from luthier.engine.choosing import Chooser, choose_rows
from luthier.engine.key_values import HeldRows, rows_cache
from luthier.engine.prompt_inputs import prompt_inputs
from luthier.engine.protocol import Decode
from luthier.engine.row import GrowingAnswer
from luthier.generation import Event, Generation, Request


@dataclass(slots=True)
class Row(GrowingAnswer):
    """A request under way, and what chooses its tokens. `first_V`: the logits that its prompt ends in; `shift`: the
    position of its next token less the number of tokens before it (see `prompt_inputs`)."""

    chooser: Chooser
    first_V: Tensor | None = field(init=False, default=None)
    shift: int = field(init=False, default=0)

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
        self._held: HeldRows | None = None

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
        """Read those prompts of new rows that no row here has, each once, and choose the rows' first tokens."""
        here = {row.request.shown: number for number, row in enumerate(self._rows)}
        prompts = {row.request.shown: row.request for row in rows}
        parts: list[HeldRows] = []
        first: dict[Any, tuple[Tensor | None, int]] = {}
        new = [request for shown, request in prompts.items() if shown not in here]
        if new:
            held, logits_PV, shifts = self._read(new)
            parts.append(held)
            # a view would keep the logits of all tokens
            found = zip(new, logits_PV.clone(), shifts, strict=True)
            first.update((request.shown, (logits_V, shift)) for request, logits_V, shift in found)
        for shown in (shown for shown in prompts if shown in here):
            assert self._held is not None
            parts.append(self._held.start(here[shown], len(prompts[shown].prompt)))
            twin = self._rows[here[shown]]
            first[shown] = twin.first_V, twin.shift
        joining = parts[0]
        for part in parts[1:]:
            joining.join(part)
        places = {shown: place for place, shown in enumerate(first)}
        numbers = [places[row.request.shown] for row in rows]
        if numbers != list(range(len(places))):
            joining.keep(numbers)
        for row in rows:
            row.first_V, row.shift = first[row.request.shown]
        events = self._chosen(rows, torch.stack([row.first_V for row in rows if row.first_V is not None]))
        if self._held is None:
            self._held = joining
        else:
            self._held.join(joining)
        self._rows.extend(rows)
        return self._leave(events)

    def step(self) -> list[Event]:
        """The next token of every row."""
        held = self._held
        assert held is not None
        last_R1 = torch.tensor([[row.choices[-1].token] for row in self._rows], device=held.mask_RL.device)
        held.mask_RL = F.pad(held.mask_RL, (0, 1), value=1)
        positions_R1 = held.mask_RL.sum(-1, keepdim=True) - 1
        if any(row.shift for row in self._rows):
            positions_R1 += torch.tensor([[row.shift] for row in self._rows], device=positions_R1.device)
        logits_RV = self._forward(last_R1, positions_R1, held)
        return self._leave(self._chosen(self._rows, logits_RV))

    def cancel(self, ticket: int) -> Generation | None:
        """Take a row out; what it has so far, or None where it is not here."""
        row = next((row for row in self._rows if row.ticket == ticket), None)
        if row is None:
            return None
        self._keep([number for number, other in enumerate(self._rows) if other is not row])
        return row.ended("cancelled")

    def _read(self, requests: Sequence[Request]) -> tuple[HeldRows, Tensor, list[int]]:
        """A row for the prompt of each request, the (P, V) logits of what comes next, and the shift of its position."""
        read = prompt_inputs(self._model, requests)
        config: Any = self._model.config
        cache = rows_cache(config) if self._together else DynamicCache(config=config)
        assert cache is not None
        held = HeldRows(cache, read.mask_PL)
        return held, self._forward(read.ids_PL, read.positions, held, read.media), read.shifts

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        held: HeldRows,
        media: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """(R, V) logits of the next tokens."""
        name = (
            "cache_params" if "cache_params" in self._accepted else "past_key_values"
        )  # Mamba's, and all others'
        inputs: dict[str, Any] = {"input_ids": ids, name: held.cache, "use_cache": True, **media}
        if name == "past_key_values" or ids.shape[1] > 1:
            inputs["attention_mask"] = held.mask_RL  # Mamba would multiply its one token by all of it
        if "position_ids" in self._accepted:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = 1
        logits_RV: Tensor = self._model(**inputs).logits[:, -1]
        return logits_RV

    def _chosen(self, rows: Sequence[Row], logits_RV: Tensor) -> list[Event]:
        choices = choose_rows([row.chooser for row in rows], logits_RV)
        return [row.take(choice, self._decode) for row, choice in zip(rows, choices, strict=True)]

    def _leave(self, events: Sequence[Event]) -> list[Event]:
        """Take the rows out whose last event this was."""
        gone = {event.ticket for event in events if event.end is not None}
        if gone:
            self._keep([number for number, row in enumerate(self._rows) if row.ticket not in gone])
        return list(events)

    def _keep(self, numbers: Sequence[int]) -> None:
        self._rows = [self._rows[number] for number in numbers]
        if not self._rows:
            self._held = None
            return
        assert self._held is not None
        self._held.keep(numbers)
