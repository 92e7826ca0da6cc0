"""Isolated attention over a flat row: each segment sees itself alone, and no T x T mask ever exists.

One attention function and one mask function are registered with transformers under a name of ours; a model
is told that name when it is loaded. The segment bounds travel as the forward arguments `cu_seq_lens_q/k`
and `max_length_q/k`, which transformers passes down to every attention layer; so do `segment_parents`, where several
answers continue one prompt: a segment sees its parent whole, and then itself.

This module does not know what a token or a loss is.

Shapes: B batch, H heads, K key/value heads, T tokens, S segments, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.types import ModelError

SDPA = "luthier_segments"  # a name with "sdpa" in it would make transformers apply its own SDPA restrictions
VARLEN = "luthier_varlen"


class NotIsolatedError(ModelError):
    """A model whose segments of one flat row cannot be kept apart, or not proven to be."""


class SegmentAttention:
    """An attention function for transformers, isolating segments where bounds are given.

    Without bounds (generation, scoring with a mask) it is transformers' own SDPA with the mask it was given.
    `calls` counts isolated calls: the self-test uses it to find models that never call this function.
    """

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        self._kernel = kernel
        self.calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        segment_parents: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, T, E), key and value (B, K, T, E) -> output (B, T, H, E).

        `segment_parents` (S,) is the segment that each one continues, or -1.
        """
        if kwargs.get("s_aux") is not None:
            raise NotIsolatedError("attention sinks (gpt-oss) are not supported by the isolated attention")
        if cu_seq_lens_q is None:
            return self._dense(module, query, key, value, attention_mask, scaling, dropout, softcap, kwargs)
        self.calls += 1
        out_THE = self._kernel(
            query, key, value, cu_seq_lens_q, max_length_q,
            scale=scaling, dropout=dropout, window=sliding_window, softcap=softcap, parents=segment_parents,
        )  # fmt: skip
        return out_THE.unsqueeze(0), None

    def _dense(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        dropout: float,
        softcap: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, None]:
        if mask is None and query.shape[2] > 1:
            # Plain causal attention would silently drop a sliding window or a padding mask.
            raise NotIsolatedError("a forward pass with neither an attention mask nor segment bounds")
        if softcap is not None:
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
            scale = scaling if scaling is not None else query.shape[-1] ** -0.5
            out = _softcapped(query, key, value, mask, scale, softcap, dropout)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention whose scores pass through softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118)."""
    scores = query @ key.transpose(-1, -2) * scale
    scores = (softcap * torch.tanh(scores / softcap)).float()
    if mask is not None:
        # Not -inf: the row of a padding token is masked whole, and its NaN would reach every other row.
        least = torch.finfo(torch.float32).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def causal_window_mask(length: int, window: int | None, device: torch.device, before: int = 0) -> Tensor:
    """(length, before + length) bool: True where query i may see key j, that is i - window < j - before <= i.

    `before` keys come before the first query's own.
    """
    mask = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
    return mask if window is None else mask.triu(before + 1 - window)


def sdpa_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int | None,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    parents: Tensor | None = None,
) -> Tensor:
    """One SDPA call per segment: (1, H, T, E), (1, K, T, E) -> (T, H, E)."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and parents is None:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
    # split, not slices: its backward is one concatenation, where each slice would fill a whole zero tensor
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    if parents is None:
        seen: Iterable[tuple[Tensor, Tensor, Tensor, int]] = ((q, k, v, 0) for q, k, v in parts)
    else:
        seen = _with_parents(list(parts), _parent_list(parents, len(lengths)), groups, window)
    outputs = []
    for q, k, v, before in seen:
        length = q.shape[2]
        masked = before > 0 or softcap is not None or (window is not None and length > window)
        mask = causal_window_mask(length, window, q.device, before) if masked else None
        if softcap is not None:
            outputs.append(_softcapped(q, k, v, mask, scale or q.shape[-1] ** -0.5, softcap, dropout))
        else:
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale
                )
            )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _with_parents(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], parents: Sequence[int], groups: int, window: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Each segment's queries, the keys and values that it may see, and how many of those are its parent's."""
    for (q, k, v), parent in zip(parts, parents, strict=True):
        before = 0
        if parent >= 0:
            _, parent_k, parent_v = parts[parent]
            # The first query sees itself and window - 1 keys before it; no other sees more of the parent.
            before = parent_k.shape[2] if window is None else min(parent_k.shape[2], window - 1)
            skipped = parent_k.shape[2] - before
            k = torch.cat((parent_k[:, :, skipped:], k), dim=2)
            v = torch.cat((parent_v[:, :, skipped:], v), dim=2)
        yield q, repeat_kv(k, groups), repeat_kv(v, groups), before


def _parent_list(parents: Tensor, num_segments: int) -> list[int]:
    """Raises ValueError for anything but one level of parents."""
    numbers: list[int] = parents.tolist()
    if len(numbers) != num_segments:
        raise ValueError(f"{len(numbers)} parents for {num_segments} segments")
    for number, parent in enumerate(numbers):
        if parent >= 0 and (parent >= num_segments or parent == number or numbers[parent] >= 0):
            raise ValueError(
                f"segment {number} continues segment {parent}, which must be a segment that continues none"
            )
    return numbers


def varlen_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int | None,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    parents: Tensor | None = None,
) -> Tensor:
    """torch's variable-length FlashAttention: (1, H, T, E), (1, K, T, E) -> (T, H, E). CUDA, 16 bits."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave float32 queries beside 16-bit values; autocast does not know this kernel.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if dropout > 0 or softcap is not None or query.dtype == torch.float32 or not query.is_cuda:
        # The kernel has none of these; the per-segment form is exact, only slower. A model may be on the host for a
        # while before its parts go to the devices.
        return sdpa_segments(
            query, key, value, cu_seqlens, max_length,
            scale=scale, dropout=dropout, window=window, softcap=softcap, parents=parents,
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    if max_length is None:
        max_length = int(cu_seqlens.diff().max())
    cu_keys, max_keys = cu_seqlens, max_length
    if parents is not None:
        seen, cu_keys, max_keys = keys_with_parents(cu_seqlens, parents)
        key, value = key.index_select(2, seen), value.index_select(2, seen)
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            groups = query.shape[1] // key.shape[1]
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens,
        cu_keys,
        max_length,
        max_keys,
        scale=scale,
        # Where a segment has more keys than queries, both ends of the window count from its last key.
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out


def keys_with_parents(cu_seqlens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which keys each segment may see, its parent's before its own: their places in the row, one segment after the
    other; the (S + 1,) int32 bounds of the segments among them; and the number of the longest.

    Raises ValueError for anything but one level of parents.
    """
    _parent_list(parents, len(cu_seqlens) - 1)
    starts_S, lengths_S = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    parents_S = parents.clamp(min=0)
    before_S = lengths_S[parents_S] * (parents >= 0)
    seen_S = before_S + lengths_S
    bounds = F.pad(seen_S.cumsum(0), (1, 0))
    segments = torch.repeat_interleave(torch.arange(len(seen_S), device=seen_S.device), seen_S)
    columns = torch.arange(len(segments), device=seen_S.device) - bounds[segments]
    of_parent = starts_S[parents_S][segments] + columns
    own = starts_S[segments] + columns - before_S[segments]
    places = torch.where(columns < before_S[segments], of_parent, own)
    return places, bounds.to(cu_seqlens.dtype), int(seen_S.max())


def segment_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask for our attention: none for a flat row, transformers' own where there is padding or a cache.

    A causal mask is always materialised, never skipped: our attention function could not tell a skipped
    causal mask from a forgotten one.
    """
    fresh = kwargs["q_length"] == kwargs["kv_length"] and kwargs.get("q_offset", 0) == 0
    if attention_mask is None and fresh:
        return None
    return sdpa_mask(attention_mask=attention_mask, **{**kwargs, "allow_is_causal_skip": False})


KERNELS = {SDPA: SegmentAttention(sdpa_segments), VARLEN: SegmentAttention(varlen_segments)}

for _name, _function in KERNELS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, segment_mask)


def attention_name(choice: str, device: torch.device) -> str:
    """The registered name for a recipe's `model.attention`.

    Raises ModelError where the device has no such kernel.
    """
    if choice == "auto":
        choice = "varlen" if device.type == "cuda" else "sdpa"
    if choice == "varlen" and device.type != "cuda":
        raise ModelError("model.attention=varlen needs a CUDA device; use sdpa (or auto) here")
    return VARLEN if choice == "varlen" else SDPA


@contextmanager
def counted_calls() -> Iterator[Callable[[], int]]:
    """Counts isolated attention calls inside the context."""
    before = sum(kernel.calls for kernel in KERNELS.values())
    yield lambda: sum(kernel.calls for kernel in KERNELS.values()) - before
