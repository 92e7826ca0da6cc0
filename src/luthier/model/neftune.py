"""NEFTune: uniform noise on the input embeddings in training (Jain et al., 2023, arXiv:2310.05914).

The noise of a sample of L tokens is U(-1, 1) * alpha / sqrt(L * D), so that its expected norm depends on alpha alone.
L is the length of the sample itself. Tools that scale by the length of the row give a sample other noise in a packed
or padded row than alone; here it is the same.

Shapes: T tokens of a flat row, S segments or rows, W width of padded rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from luthier.types import ModelError


class EmbeddingNoise:
    """Noise on a causal language model's input embeddings, wherever gradients are computed in training mode.

    Two hooks: one on the backbone sees the bounds of the samples, one on the embedding adds the noise. Nothing is
    saved; the draws come from torch's generator of the embedding's device, so a restored generator repeats them.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        """`model` is the causal language model, or its PEFT wrapper, before accelerate wraps it.

        Raises ModelError where it has no backbone and no input embedding to tell apart.
        """
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        backbone, embedding = inner.base_model, inner.get_input_embeddings()  # type: ignore[operator]
        if not isinstance(backbone, nn.Module) or backbone is inner or embedding is None:
            raise ModelError(
                f"train.neftune_alpha: {type(inner).__name__} has no input embedding behind a backbone; remove it"
            )
        self.alpha = alpha
        self._lengths: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            backbone.register_forward_pre_hook(self._see_bounds, with_kwargs=True),
            embedding.register_forward_hook(self._add_noise),
        ]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _see_bounds(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bounds, mask = kwargs.get("cu_seq_lens_q"), kwargs.get("attention_mask")
        self._lengths = None
        if bounds is not None:
            lengths_S = bounds.diff().long()
            self._lengths = lengths_S.repeat_interleave(lengths_S)[None]
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            self._lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)

    def _add_noise(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not embedding.training or not torch.is_grad_enabled():
            return None
        lengths = self._lengths  # (1, T) of a flat row, (S, 1) of padded ones
        if lengths is None:
            lengths = torch.full((1, 1), output.shape[1], device=output.device)
        noise = torch.empty(output.shape, dtype=torch.float32, device=output.device).uniform_(-1, 1)
        noise *= (self.alpha / (lengths.float() * output.shape[-1]).sqrt()).unsqueeze(-1)
        return output + noise.to(output.dtype)
