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
from typing import Any

import torch
from torch import Tensor, nn

from luthier.model.attention import NotIsolatedError, counted_calls
from luthier.model.logprobs import ModelPolicy, chosen_rows, install_target_forward
from luthier.model.rows import Rows, SelfTest, Side, padded_rows
from luthier.types import IGNORE_INDEX, Batch, ModelError

LENGTHS = (11, 7)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a log-probability. A leak moves random tokens by far more than rounding does."""
REACH = 1e-9
"""Largest part of a gradient that may go where none should; isolated segments measured 0 exactly."""


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


def run_self_test(model: nn.Module) -> SelfTest:
    """Measure a model that has the target forward, in its layout of rows; `model` may be a PEFT wrapper."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        batch = two_segments(vocab_size, device)
        policy = ModelPolicy(model)
        with torch.no_grad():
            with counted_calls() as calls:
                together = policy.logprobs(batch).logprobs
            # The same row with another first segment: what the second one says must not move at all.
            other = two_segments(vocab_size, device, seed=1)
            other.input_ids[:, LENGTHS[0] :] = batch.input_ids[:, LENGTHS[0] :]
            other.targets[LENGTHS[0] :] = batch.targets[LENGTHS[0] :]
            moved = (policy.logprobs(other).logprobs - together)[LENGTHS[0] - 1 :]
            alone = torch.cat([_alone(model, ids) for ids in torch.split(batch.input_ids[0], list(LENGTHS))])
        reach, lookahead = _dependence(model, batch)
        difference = (together - alone).abs().max()
        return SelfTest(calls(), float(difference), float(moved.abs().max()), reach, lookahead)
    finally:
        model.train(training)


def _dependence(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """`SelfTest.reach` and `SelfTest.lookahead`: where the gradients of log-probabilities go."""
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding = _inner(model).get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logprobs = ModelPolicy(model).logprobs(batch).logprobs
    finally:
        handle.remove()
    rows = chosen_rows(model)
    real = torch.ones_like(batch.input_ids, dtype=torch.bool)
    if rows.padded:
        spread = padded_rows(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.targets, rows.side)
        real = spread.attention_mask.bool()
    first = LENGTHS[0]

    def sizes(chosen: Tensor) -> Tensor:
        """(T,) largest gradient of these log-probabilities at each token's embedding."""
        (gradient,) = torch.autograd.grad(chosen.sum(), embedded[-1], retain_graph=True)
        return gradient[real].float().abs().amax(-1)

    second = sizes(logprobs[first - 1 :])
    # The last log-probability of the first segment is left out: it comes from the last token but one.
    early = sizes(logprobs[: first - 2])
    return _part(second[:first], second[first:]), _part(early[first - 2 : first], early[: first - 2])


def _part(where_none: Tensor, where_some: Tensor) -> float:
    largest = float(where_none.max())
    return largest / float(where_some.max()) if largest else 0.0


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
    if not _passes(result, tolerance):
        raise NotIsolatedError(
            f"{_name(model)} failed the two-segment self-test: log-probabilities of a packed row differ from those "
            f"of its segments alone by {result.difference:.2g} nats (allowed {tolerance:g}), a change in one segment "
            f"moved the other by {result.leak:.2g}, and {result.reach:.1g} of its gradient goes there"
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
    if result.lookahead > REACH:
        # On flat rows the attention is ours, and causal: there an encoder shows as a difference.
        raise ModelError(
            f"{_name(model)} looks ahead: what it says of a token depends on the tokens after it; "
            "a causal language model is needed, and this is an encoder"
        )
    if not _passes(result, tolerance):
        side = chosen_rows(model).side
        raise InexactPaddingError(
            f"{_name(model)} failed the self-test of padded rows: with padding on the {side}, log-probabilities differ "
            f"from those of the rows alone by {result.difference:.2g} nats (allowed {tolerance:g}), a change in one "
            f"row moved the other by {result.leak:.2g}, and {result.reach:.1g} of its gradient goes there"
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


def _passes(result: SelfTest, tolerance: float) -> bool:
    """False for NaN too."""
    return result.difference <= tolerance and result.leak <= tolerance / 10 and result.reach <= REACH


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
