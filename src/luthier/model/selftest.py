"""What every model must pass before it trains: isolation, and the kernel's numbers equal to the model's own.

Two random segments go through the flat forward; each goes alone through the model's ordinary forward, dense
logits and all. A model that attends across segments, ignores the registered attention, or scales its logits
by a rule that the kernel does not know, is found here and refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luthier.model.attention import counted_calls
from luthier.types import IGNORE_INDEX, Batch, ModelError

LENGTHS = (11, 7)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a log-probability. A leak moves random tokens by far more than rounding does."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was measured; all differences in nats."""

    attention_calls: int
    difference: float
    leak: float


def two_segments(vocab_size: int, device: torch.device, seed: int = 0) -> Batch:
    """A flat row of two random segments, every next token a target."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    ids = torch.randint(0, vocab_size, (1, total), generator=generator)
    targets = ids[0].roll(-1)
    bounds = torch.tensor([0, LENGTHS[0], total], dtype=torch.int32)
    targets[bounds[1:].long() - 1] = IGNORE_INDEX
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        cu_seqlens=bounds,
        targets=targets,
        target_weights=(targets != IGNORE_INDEX).float(),
        parent=torch.full((2,), -1),
        max_length=max(LENGTHS),
    ).to(device)


@torch.no_grad()
def run_self_test(model: nn.Module) -> SelfTest:
    """Measure a model that has the target forward; `model` may be a PEFT wrapper."""
    from luthier.model.logprobs import ModelPolicy

    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        batch = two_segments(vocab_size, device)
        policy = ModelPolicy(model)
        with counted_calls() as calls:
            flat = policy.logprobs(batch).logprobs
        # The same row with another first segment: what the second one says must not move at all.
        other = two_segments(vocab_size, device, seed=1)
        other.input_ids[:, LENGTHS[0] :] = batch.input_ids[:, LENGTHS[0] :]
        other.targets[LENGTHS[0] :] = batch.targets[LENGTHS[0] :]
        second = slice(LENGTHS[0] - 1, None)
        leak = (policy.logprobs(other).logprobs[second] - flat[second]).abs().max()
        return SelfTest(calls(), float((flat - _alone(model, batch)).abs().max()), float(leak))
    finally:
        model.train(training)


def _alone(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities by the model's ordinary forward, one segment at a time, dense logits."""
    parts = []
    for ids in torch.split(batch.input_ids[0], list(LENGTHS)):
        logits = model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False
        ).logits[0]
        logprobs = logits[:-1].float().log_softmax(-1)
        parts.append(logprobs.gather(-1, ids[1:, None])[:, 0])
    return torch.cat(parts)


def require_isolation(model: nn.Module, arithmetic: torch.dtype | None = None) -> SelfTest:
    """Raise ModelError, saying what was measured, unless flat rows are exact on this model.

    `arithmetic` is the type of an autocast that training will use; None where there is none.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__  # type: ignore[operator]
    first = next(model.parameters())
    with torch.autocast(first.device.type, dtype=arithmetic, enabled=arithmetic is not None):
        result = run_self_test(model)
    tolerance = TOLERANCE[arithmetic or first.dtype]
    if result.attention_calls == 0:
        raise ModelError(
            f"{name} never calls the attention function that was chosen for it, so segments of a packed row "
            "would see each other; this model cannot be trained on flat rows"
        )
    if not (result.leak <= tolerance / 10 and result.difference <= tolerance):
        raise ModelError(
            f"{name} failed the two-segment self-test: log-probabilities of a packed row differ from those "
            f"of its segments alone by {result.difference:.2g} nats (allowed {tolerance:g}), and a change in "
            f"one segment moved the other by {result.leak:.2g}; this model cannot be trained on flat rows"
        )
    return result
