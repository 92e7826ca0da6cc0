"""What every model must pass before it trains: isolation, and the kernel's numbers equal to the model's own.

Two random segments go through the flat forward; each goes alone through the model's ordinary forward. Which numbers
are compared is the probe's affair: of a language model log-probabilities, from dense logits where it is alone. A model
that attends across segments or ignores the registered attention is found here and gets padded rows, which pass the
same test or are refused; so is a model that scales its logits by a rule that the kernel does not know.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from luthier.model.attention import NotIsolatedError, counted_calls
from luthier.model.logprobs import chosen_rows
from luthier.model.probes import (
    LANGUAGE,
    REACH,
    TOLERANCE,
    Probe,
    coarsest,
    gradient_part,
    inner_model,
    model_name,
    watched_embeddings,
)
from luthier.model.rows import FLAT, Rows, SelfTest, Side, padded_rows
from luthier.model.sharing import with_sharing
from luthier.types import IGNORE_INDEX, Batch, ModelError

LENGTHS = (11, 7)


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


def run_self_test(model: nn.Module, probe: Probe = LANGUAGE) -> SelfTest:
    """Measure a model that has the probe's forward, in its layout of rows; `model` may be a PEFT wrapper."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        batch = two_segments(vocab_size, device)
        with torch.no_grad():
            with counted_calls() as calls:
                together = probe.together(model, batch)
            # The same row with another first segment: what the second one says must not move at all.
            other = two_segments(vocab_size, device, seed=1)
            other.input_ids[:, LENGTHS[0] :] = batch.input_ids[:, LENGTHS[0] :]
            other.targets[LENGTHS[0] :] = batch.targets[LENGTHS[0] :]
            moved = (probe.together(model, other) - together)[LENGTHS[0] - 1 :]
            segments = torch.split(batch.input_ids[0], list(LENGTHS))
            alone = torch.cat([probe.alone(model, ids) for ids in segments])
        reach, lookahead = _dependence(model, batch, probe)
        difference = (together - alone).abs().max()
        return SelfTest(calls(), float(difference), float(moved.abs().max()), reach, lookahead)
    finally:
        model.train(training)


def _dependence(model: nn.Module, batch: Batch, probe: Probe) -> tuple[float, float]:
    """`SelfTest.reach` and `SelfTest.lookahead`: where the gradients of the probe's numbers go."""
    with torch.enable_grad(), watched_embeddings(model) as embedded:
        outputs = probe.together(model, batch)
    rows = chosen_rows(model)
    real = torch.ones_like(batch.input_ids, dtype=torch.bool)
    if rows.padded:
        spread = padded_rows(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.targets, rows.side)
        real = spread.attention_mask.bool()
    first = LENGTHS[0]

    def sizes(chosen: Tensor) -> Tensor:
        """(T,) largest gradient of these numbers at each token's embedding."""
        (gradient,) = torch.autograd.grad(chosen.sum(), embedded[-1], retain_graph=True)
        return gradient[real].float().abs().amax(-1)

    second = sizes(outputs[first - 1 :])
    # The last number of the first segment is left out: it comes from the last token but one.
    early = sizes(outputs[: first - 2])
    return gradient_part(second[:first], second[first:]), gradient_part(
        early[first - 2 : first], early[: first - 2]
    )


def require_isolation(
    model: nn.Module, arithmetic: torch.dtype | None = None, probe: Probe = LANGUAGE
) -> SelfTest:
    """Raise NotIsolatedError, saying what was measured, unless flat rows are exact on this model.

    `arithmetic` is the type of an autocast that training will use; None where there is none.
    """
    try:
        result, kind = _measured(model, arithmetic, probe)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # Families refuse a row without a mask, or with bounds, each in its own way (MPT, Qwen3-Next).
        raise NotIsolatedError(f"{model_name(model)} cannot compute a flat row ({error})") from error
    if result.attention_calls == 0:
        raise NotIsolatedError(
            f"{model_name(model)} never calls the attention function that was chosen for it, so segments of a packed "
            "row would see each other"
        )
    _require_numbers(model, result)
    tolerance = TOLERANCE[kind]
    if not _passes(result, tolerance):
        raise NotIsolatedError(
            f"{model_name(model)} failed the two-segment self-test: {probe.outputs} of a packed row differ from those "
            f"of its segments alone by {result.difference:.2g}{probe.unit} (allowed {tolerance:g}), a change in one "
            f"segment moved the other by {result.leak:.2g}, and {result.reach:.1g} of its gradient goes there"
        )
    return result


def require_exact_padding(
    model: nn.Module, arithmetic: torch.dtype | None = None, probe: Probe = LANGUAGE
) -> SelfTest:
    """Raise InexactPaddingError, saying what was measured, unless padded rows are exact on this model; ModelError
    for one that is no causal language model.

    The same two segments, as two rows of one padded batch: each must say what it says alone.
    """
    result, kind = _measured(model, arithmetic, probe)
    _require_numbers(model, result)
    tolerance = TOLERANCE[kind]
    if result.lookahead > REACH:
        # On flat rows the attention is ours, and causal: there an encoder shows as a difference.
        raise ModelError(
            f"{model_name(model)} looks ahead: what it says of a token depends on the tokens after it; "
            "a causal language model is needed, and this is an encoder"
        )
    if not _passes(result, tolerance):
        side = chosen_rows(model).side
        raise InexactPaddingError(
            f"{model_name(model)} failed the self-test of padded rows: with padding on the {side}, {probe.outputs} "
            f"differ from those of the rows alone by {result.difference:.2g}{probe.unit} (allowed {tolerance:g}), a "
            f"change in one row moved the other by {result.leak:.2g}, and {result.reach:.1g} of its gradient goes there"
            + ("; try model.padding_side=right" if side == "left" else "")
        )
    return result


def _require_numbers(model: nn.Module, result: SelfTest) -> None:
    if math.isnan(result.difference):
        raise ModelError(
            f"{model_name(model)} answers with NaN: its weights are damaged, or too large for their type (model.dtype)"
        )


def _measured(model: nn.Module, arithmetic: torch.dtype | None, probe: Probe) -> tuple[SelfTest, torch.dtype]:
    """The self-test in the arithmetic of training, and its type."""
    first = next(model.parameters())
    with torch.autocast(first.device.type, dtype=arithmetic, enabled=arithmetic is not None):
        result = run_self_test(model, probe)
    return result, coarsest(model, arithmetic or first.dtype)


def _passes(result: SelfTest, tolerance: float) -> bool:
    """False for NaN too."""
    return result.difference <= tolerance and result.leak <= tolerance / 10 and result.reach <= REACH


# --------------------------------------------------------------------------------------------------
# The choice

Build = Callable[[bool], nn.Module]
"""Makes the model that will train; with True, with the attention that transformers gives it by itself."""


def build_with_rows(
    build: Build,
    wanted: str,
    side: Side,
    arithmetic: torch.dtype | None = None,
    probe: Probe = LANGUAGE,
    *,
    share_prompts: bool = False,
    media: bool = False,
) -> nn.Module:
    """The model with the probe's forward, laid out as `model.rows` wants and the self-test allows.

    `auto` tries flat rows first, but not where `media` says that rows may have images, films or sounds; a model that
    they are not exact on is built again with its own attention, for padded rows. Where `share_prompts` asks for it,
    flat rows are tried with shared prompts too (`luthier.model.sharing`); a model that may not share them has
    `Rows.unshared_reason`. Raises ModelError with all that was measured where neither layout is exact, or the one that
    is wanted is not.
    """
    reason, model = "model.rows=padded", None
    if media and wanted == "auto":
        reason, wanted = "the towers of media know no segments of a flat row", "padded"
    if wanted != "padded":
        try:
            model = build(False)
            probe.install(inner_model(model), FLAT)
            test = require_isolation(model, arithmetic, probe)
        except NotIsolatedError as error:
            if wanted == "flat":
                raise ModelError(
                    f"{error}; so model.rows=flat is not exact here. Give model.rows=padded or auto"
                ) from None
            reason = str(error)
        else:
            rows = Rows(tests={"flat": test})
            if share_prompts:
                rows = with_sharing(model, rows, arithmetic, probe)
            probe.install(inner_model(model), rows)
            return model
        # Two copies of the weights need not fit.
        model = None
        gc.collect()
    model = build(True)
    unshared = "rows are padded, and a prompt can only be shared in a flat row" if share_prompts else ""
    rows = Rows(padded=True, side=side, reason=reason, unshared_reason=unshared)
    probe.install(inner_model(model), rows)
    try:
        test = require_exact_padding(model, arithmetic, probe)
    except InexactPaddingError as error:
        raise ModelError(str(error) if wanted == "padded" else f"{reason}; and {error}") from None
    probe.install(inner_model(model), replace(rows, tests={"padded": test}))
    return model
