"""Whether a model may compute a prompt once for several answers: a shared row must say what the rows alone say.

Two prompts with two branches each go through the model as one shared row, and as four flat rows that each have a copy
of their prompt. The numbers are compared, and where their gradients go. Flat rows have been proven before
(`luthier.model.selftest`); a model that fails here keeps them.

Shapes: T tokens, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

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
from luthier.model.rows import Rows, SharingTest
from luthier.types import IGNORE_INDEX, Batch, ModelError

PROMPTS = (9, 5)
"""Tokens of each prompt, but for its last one, with which every branch begins."""
BRANCHES = ((6, 4), (3, 7))
"""Tokens of its branches."""
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest difference of a gradient at a prompt, as a part of the largest there."""


class NotSharedError(ModelError):
    """A model that says something else where a prompt is computed once."""


def tree_batch(vocab_size: int, device: torch.device, *, shared: bool) -> Batch:
    """Random prompts and branches; all tokens of a branch but its first are targets.

    Shared, the segments are both prompts, the first branch of each, the second branch of each. Otherwise the
    branches come in the same order, each after a copy of its prompt.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(lengths: Sequence[int]) -> list[Tensor]:
        return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]

    prompts, tips = draw(PROMPTS), draw([1] * len(PROMPTS))
    answers = [draw([lengths[k] - 1 for lengths in BRANCHES]) for k in range(2)]
    segments: list[tuple[Tensor, int, int, int]] = []  # tokens, position of the first, context tokens, parent
    if shared:
        segments += [(prompt, 0, len(prompt), -1) for prompt in prompts]
    for k in range(2):
        for number, prompt in enumerate(prompts):
            branch = torch.cat((tips[number], answers[k][number]))
            if shared:
                segments.append((branch, len(prompt), 0, number))
            else:
                segments.append((torch.cat((prompt, branch)), 0, len(prompt), -1))
    return _joined(segments).to(device)


def _joined(segments: Sequence[tuple[Tensor, int, int, int]]) -> Batch:
    lengths = [len(ids) for ids, *_ in segments]
    targets = [ids.roll(-1) for ids, *_ in segments]
    for (_, _, context, _), chosen in zip(segments, targets, strict=True):
        chosen[:context] = IGNORE_INDEX
        chosen[-1] = IGNORE_INDEX
    targets_T = torch.cat(targets)
    return Batch(
        input_ids=torch.cat([ids for ids, *_ in segments])[None],
        position_ids=torch.cat([start + torch.arange(len(ids)) for ids, start, *_ in segments])[None],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        targets=targets_T,
        target_weights=(targets_T != IGNORE_INDEX).float(),
        parent=torch.tensor([parent for *_, parent in segments]),
        max_length=max(lengths),
    )


def run_sharing_test(model: nn.Module, probe: Probe = LANGUAGE) -> SharingTest:
    """Measure a model that has the probe's forward on flat rows; `model` may be a PEFT wrapper."""
    device = next(model.parameters()).device
    vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), watched_embeddings(model) as embedded:
            shared = probe.together(model, tree_batch(vocab_size, device, shared=True))
            apart = probe.together(model, tree_batch(vocab_size, device, shared=False))
    finally:
        model.train(training)
    first = BRANCHES[0][0] - 1  # numbers of the first branch, which come first

    def sizes(chosen: Tensor) -> Tensor:
        """(T,) largest gradient of these numbers at each token's embedding of the shared row."""
        (gradient,) = torch.autograd.grad(chosen.sum(), embedded[0], retain_graph=True)
        return gradient[0].float().abs().amax(-1)

    # Of the last branch only the first half: what comes after may not matter to it.
    half = BRANCHES[-1][1] // 2
    begins = len(shared) - BRANCHES[-1][1] + 1
    early = sizes(shared[begins : begins + half])
    reach = max(
        gradient_part(*_apart(sizes(shared[:first]), prompt=0, start=sum(PROMPTS), length=first + 1)),
        gradient_part(*_apart(early, prompt=1, start=len(early) - BRANCHES[-1][1], length=half)),
    )
    (at_tree,) = torch.autograd.grad(shared.sum(), embedded[0])
    (at_rows,) = torch.autograd.grad(apart.sum(), embedded[1])
    once, copies = at_tree[0, : sum(PROMPTS)].float(), _summed_copies(at_rows[0].float())
    gradient = (once - copies).abs().max() / copies.abs().max()
    return SharingTest(float((shared - apart).detach().abs().max()), float(gradient), reach)


def _apart(sizes_T: Tensor, *, prompt: int, start: int, length: int) -> tuple[Tensor, Tensor]:
    """The sizes where none should be, and those of the prompt and of tokens [start, start + length)."""
    belongs = torch.zeros_like(sizes_T, dtype=torch.bool)
    belongs[sum(PROMPTS[:prompt]) : sum(PROMPTS[: prompt + 1])] = True
    belongs[start : start + length] = True
    return sizes_T[~belongs], sizes_T[belongs]


def _summed_copies(at_rows: Tensor) -> Tensor:
    """(tokens of the prompts, D): the gradients at all copies of each token of a prompt, added."""
    start, sums = 0, [at_rows.new_zeros(length, at_rows.shape[1]) for length in PROMPTS]
    for k in range(2):
        for number, length in enumerate(PROMPTS):
            sums[number] += at_rows[start : start + length]
            start += length + BRANCHES[number][k]
    return torch.cat(sums)


def require_sharing(
    model: nn.Module, arithmetic: torch.dtype | None = None, probe: Probe = LANGUAGE
) -> SharingTest:
    """Raise NotSharedError, saying what was measured, unless shared prompts are exact on this model.

    `arithmetic` is the type of an autocast that training will use; None where there is none.
    """
    first, name = next(model.parameters()), model_name(model)
    kind = coarsest(model, arithmetic or first.dtype)
    try:
        with torch.autocast(first.device.type, dtype=arithmetic, enabled=arithmetic is not None):
            result = run_sharing_test(model, probe)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        # A forward of a fixed signature refuses an argument that it does not know.
        raise NotSharedError(f"{name} cannot compute a shared prompt ({error})") from error
    exact = result.difference <= TOLERANCE[kind] and result.gradient <= GRADIENT_TOLERANCE[kind]
    if not (exact and result.reach <= REACH):  # NaN fails too
        raise NotSharedError(
            f"{name} failed the self-test of shared prompts: {probe.outputs} differ from those of rows with a "
            f"prompt of their own by {result.difference:.2g}{probe.unit} (allowed {TOLERANCE[kind]:g}), gradients at "
            f"the prompt by {result.gradient:.2g} of the largest (allowed {GRADIENT_TOLERANCE[kind]:g}), and "
            f"{result.reach:.1g} of a branch's gradient goes where none should"
        )
    return result


def with_sharing(
    model: nn.Module, rows: Rows, arithmetic: torch.dtype | None = None, probe: Probe = LANGUAGE
) -> Rows:
    """`rows`, the proven flat rows of a model, with whether it shares prompts, and why not.

    They are the caller's to install.
    """
    shared = replace(rows, shares_prompts=True)
    probe.install(inner_model(model), shared)
    try:
        test = require_sharing(model, arithmetic, probe)
    except NotSharedError as error:
        return replace(rows, unshared_reason=str(error))
    return replace(shared, tests={**rows.tests, "shared": test})
