"""What every model must pass before it trains: isolation, and the kernel's numbers equal to the model's own.

Two random segments go through the flat forward; each goes alone through the model's ordinary forward, dense
logits and all. A model that attends across segments or ignores the registered attention is found here and gets
padded rows, which pass the same test or are refused; so is a model that scales its logits by a rule that the kernel
does not know.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from luthier.model.attention import NotIsolatedError, counted_calls
from luthier.model.logprobs import ModelPolicy, chosen_rows, install_target_forward
from luthier.model.rows import Rows, SelfTest, Side
from luthier.types import IGNORE_INDEX, Batch, ModelError

LENGTHS = (11, 7)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a log-probability. A leak moves random tokens by far more than rounding does."""
FLAT_LEAK = {torch.float32: 1e-5, torch.bfloat16: 0.025, torch.float16: 0.01}
"""Most that a change in one segment may move the other. Stricter, because nothing but a leak moves it, and a fresh
random model with small weights leaks little (a short convolution 1e-4 nats)."""


class InexactPaddingError(ModelError):
    """A model whose padded rows say something else than the same rows alone."""


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
    """Measure a model that has the target forward, in its layout of rows; `model` may be a PEFT wrapper."""
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
        alone = [_alone(model, ids) for ids in torch.split(batch.input_ids[0], list(LENGTHS))]
        changed = batch.input_ids[0, : LENGTHS[0]].clone()
        changed[-1] = (changed[-1] + 1) % vocab_size
        lookahead = (_alone(model, changed)[:-1] - alone[0][:-1]).abs().max()
        difference = (flat - torch.cat(alone)).abs().max()
        return SelfTest(calls(), float(difference), float(leak), float(lookahead))
    finally:
        model.train(training)


def _alone(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities (L - 1,) of a segment (L,) by the model's ordinary forward, dense logits."""
    logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits[0]
    logprobs: Tensor = logits[:-1].float().log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0]


def require_isolation(model: nn.Module, arithmetic: torch.dtype | None = None) -> SelfTest:
    """Raise NotIsolatedError, saying what was measured, unless flat rows are exact on this model.

    `arithmetic` is the type of an autocast that training will use; None where there is none.
    """
    try:
        result, kind = _measured(model, arithmetic)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Families refuse a row without a mask, or with bounds, each in its own way (MPT, Qwen3-Next).
        raise NotIsolatedError(f"{_name(model)} cannot compute a flat row ({error})") from error
    if result.attention_calls == 0:
        raise NotIsolatedError(
            f"{_name(model)} never calls the attention function that was chosen for it, so segments of a packed row "
            "would see each other"
        )
    _require_numbers(model, result)
    tolerance = TOLERANCE[kind]
    if not _passes(result, tolerance, FLAT_LEAK[kind]):
        raise NotIsolatedError(
            f"{_name(model)} failed the two-segment self-test: log-probabilities of a packed row differ from those "
            f"of its segments alone by {result.difference:.2g} nats (allowed {tolerance:g}), and a change in "
            f"one segment moved the other by {result.leak:.2g}"
        )
    return result


def require_exact_padding(model: nn.Module, arithmetic: torch.dtype | None = None) -> SelfTest:
    """Raise InexactPaddingError, saying what was measured, unless padded rows are exact on this model; ModelError
    for one that is no causal language model.

    The same two segments, as two rows of one padded batch: each must say what it says alone.
    """
    result, kind = _measured(model, arithmetic)
    _require_numbers(model, result)
    tolerance = TOLERANCE[kind]
    if result.lookahead > tolerance / 10:
        # On flat rows the attention is ours, and causal: there an encoder shows as a difference.
        raise ModelError(
            f"{_name(model)} looks ahead: a change of the last token moved the log-probabilities before it; "
            "a causal language model is needed, and this is an encoder"
        )
    if not _passes(result, tolerance, tolerance / 10):
        side = chosen_rows(model).side
        raise InexactPaddingError(
            f"{_name(model)} failed the self-test of padded rows: with padding on the {side}, log-probabilities differ "
            f"from those of the rows alone by {result.difference:.2g} nats (allowed {tolerance:g}), and a change in "
            f"one row moved the other by {result.leak:.2g}"
            + ("; try model.padding_side=right" if side == "left" else "")
        )
    return result


def _require_numbers(model: nn.Module, result: SelfTest) -> None:
    if math.isnan(result.difference):
        raise ModelError(
            f"{_name(model)} answers with NaN: its weights are damaged, or too large for their type (model.dtype)"
        )


def _measured(model: nn.Module, arithmetic: torch.dtype | None) -> tuple[SelfTest, torch.dtype]:
    """The self-test in the arithmetic of training, and its type."""
    first = next(model.parameters())
    with torch.autocast(first.device.type, dtype=arithmetic, enabled=arithmetic is not None):
        result = run_self_test(model)
    return result, arithmetic or first.dtype


def _passes(result: SelfTest, difference: float, leak: float) -> bool:
    """False for NaN too."""
    return result.leak <= leak and result.difference <= difference


def _name(model: nn.Module) -> str:
    return type(_inner(model)).__name__


def _inner(model: nn.Module) -> nn.Module:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(inner, nn.Module)
    return inner


# --------------------------------------------------------------------------------------------------
# The choice

Build = Callable[[bool], nn.Module]
"""Makes the model that will train; with True, with the attention that transformers gives it by itself."""


def build_with_rows(
    build: Build, wanted: str, side: Side, arithmetic: torch.dtype | None = None
) -> nn.Module:
    """The model with the target forward, laid out as `model.rows` wants and the self-test allows.

    `auto` tries flat rows first; a model that they are not exact on is built again with its own attention, for padded
    rows. Raises ModelError with all that was measured where neither is exact, or the one that is wanted is not.
    """
    reason, model = "model.rows=padded", None
    if wanted != "padded":
        try:
            model = build(False)
            install_target_forward(_inner(model))
            test = require_isolation(model, arithmetic)
        except NotIsolatedError as error:
            if wanted == "flat":
                raise ModelError(
                    f"{error}; so model.rows=flat is not exact here. Give model.rows=padded or auto"
                ) from None
            reason = str(error)
        else:
            install_target_forward(_inner(model), Rows(tests={"flat": test}))
            return model
        # Two copies of the weights need not fit.
        model = None
        gc.collect()
    model = build(True)
    rows = Rows(padded=True, side=side, reason=reason)
    install_target_forward(_inner(model), rows)
    try:
        test = require_exact_padding(model, arithmetic)
    except InexactPaddingError as error:
        raise ModelError(str(error) if wanted == "padded" else f"{reason}; and {error}") from None
    install_target_forward(_inner(model), replace(rows, tests={"padded": test}))
    return model
