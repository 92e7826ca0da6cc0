"""Keys and values of the rows that are being answered: rows join and leave between two tokens.

All rows end at the same place and start where their prompt did, so the left of a short row is padding. A buffer grows
by blocks: transformers' own cache copies everything for every token.

Shapes: R rows, H heads, L tokens from the start of the longest row, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_BLOCK = 64
"""Tokens by which a buffer grows."""


class RowsLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer: `keys` and `values` (R, H, L, E) are the used part of a buffer.

    A layer with a sliding window keeps all tokens too: the mask hides those outside of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._used = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        total = self._used + key_states.shape[-2]
        if self._buffers is None or total > self._buffers[0].shape[-2]:
            self._buffers = (self._grown(0, key_states, total), self._grown(1, value_states, total))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., self._used : total, :] = states
        return self._show(total)

    def join(self, other: RowsLayer) -> None:
        """Add the rows of another layer below."""
        longest = max(self._used, other._used)
        parts = zip(self._parts(), other._parts(), strict=True)
        self._set([torch.cat([_padded(mine, longest), _padded(theirs, longest)]) for mine, theirs in parts])

    def part(self, row: int, tokens: slice) -> RowsLayer:
        """A layer of one row alone, and of it these tokens."""
        keys, values = (part[row : row + 1, :, tokens] for part in self._parts())
        layer = RowsLayer()
        layer.lazy_initialization(keys, values)
        layer._set([keys, values])
        return layer

    def keep(self, rows: Tensor, cut: int) -> None:
        """Keep these rows alone, each as often as it is named, and drop `cut` tokens of padding on the left."""
        self._set([part[rows][..., cut:, :] for part in self._parts()])

    def _parts(self) -> list[Tensor]:
        assert self._buffers is not None
        return [buffer[..., : self._used, :] for buffer in self._buffers]

    def _set(self, parts: Sequence[Tensor]) -> None:
        self._buffers = (parts[0].contiguous(), parts[1].contiguous())
        self._show(parts[0].shape[-2])

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        self._used = used
        keys, values = self._parts()
        self.keys, self.values = keys, values
        return keys, values

    def _grown(self, which: int, like: Tensor, total: int) -> Tensor:
        room = -(-total // _BLOCK) * _BLOCK
        buffer = like.new_zeros(*like.shape[:-2], room, like.shape[-1])
        if self._used:
            buffer[..., : self._used, :] = self._parts()[which]
        return buffer


def _padded(part: Tensor, length: int) -> Tensor:
    return F.pad(part, (0, 0, length - part.shape[-2], 0))


@dataclass(slots=True)
class HeldRows:
    """The keys and values of rows, and which of them are real: `mask_RL` is 0 where a row is padded."""

    cache: Cache
    mask_RL: Tensor

    def join(self, other: HeldRows) -> None:
        """Add other rows below."""
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.join(theirs)
        longest = max(self.mask_RL.shape[1], other.mask_RL.shape[1])
        masks = [F.pad(mask, (longest - mask.shape[1], 0)) for mask in (self.mask_RL, other.mask_RL)]
        self.mask_RL = torch.cat(masks)

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep these rows alone, in this order and each as often as it is named, and no more padding than they need."""
        chosen = torch.tensor(numbers, device=self.mask_RL.device)
        mask_RL = self.mask_RL[chosen]
        cut = int(mask_RL.argmax(-1).min())  # the first real token of the longest row
        self.mask_RL = mask_RL[:, cut:]
        for layer in self._layers:
            layer.keep(chosen, cut)

    def start(self, number: int, length: int) -> HeldRows:
        """The first tokens of one row, copied; the row stays as it is."""
        first = int(self.mask_RL[number].argmax())
        tokens = slice(first, first + length)
        cache = DynamicCache()
        cache.layers = [layer.part(number, tokens) for layer in self._layers]
        return HeldRows(cache, self.mask_RL[number : number + 1, tokens])

    @property
    def _layers(self) -> list[RowsLayer]:
        layers = self.cache.layers
        assert all(isinstance(layer, RowsLayer) for layer in layers)
        return layers  # type: ignore[return-value]


def rows_cache(config: PretrainedConfig) -> DynamicCache | None:
    """A cache whose rows can join and leave; None for a model that keeps anything but keys and values."""
    cache = DynamicCache(config=config)
    if not cache.layers or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        return None
    cache.layers = [RowsLayer() for _ in cache.layers]
    return cache


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What one token of one row takes in the cache, in bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dimension = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * dimension * dtype.itemsize)
