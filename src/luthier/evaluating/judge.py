"""A trained model that judges: log-probabilities of given tokens, exactly as an evaluation in training has them.

open_judge(trained)  ->  Judge

It is loaded as it was trained (base, adapters, new tokens, type) with the layout of rows that the self-test allows.
Shapes: N targets of a sample, K tokens asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from luthier.answering import Answerer, answerer, typed
from luthier.data.collate import branch_batch, flat_batch
from luthier.data.packing import best_fit, by_length
from luthier.data.template import ChatTemplate
from luthier.environment import detect_hardware
from luthier.model.load import ModelSource, locate
from luthier.model.logprobs import ModelPolicy, chosen_rows
from luthier.model.probes import LANGUAGE
from luthier.model.selftest import build_with_rows
from luthier.recipe.resolve import TOKENS_PER_PASS
from luthier.show import Say
from luthier.trained.load import Loader
from luthier.trained.source import Trained, require_base
from luthier.trained.template import trained_template
from luthier.trainer.precision import AUTOCAST, autocast_type
from luthier.types import Batch, ModelError, Sample

Numbers = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found of one sample: the log-probabilities (N,) of its targets, in their order, and whether each is the
    most likely token (N,)."""

    logprobs: Numbers
    is_greedy: np.ndarray[Any, np.dtype[np.bool_]] | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """A loaded model with its template. arithmetic: as its run evaluated. tokens_per_pass: of one forward pass."""

    label: str
    model: nn.Module
    template: ChatTemplate
    trained: Trained
    source: ModelSource
    device: torch.device
    arithmetic: torch.dtype | None
    tokens_per_pass: int
    policy: ModelPolicy = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", ModelPolicy(self.model, self.arithmetic))

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model has positions for, where its config says so."""
        inner: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        length: int | None = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        return length

    @property
    def has_adapter(self) -> bool:
        """Whether the model below the adapter can be asked too."""
        return isinstance(self.model, PeftModel)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """What training of the adapter started from, for the length of the context."""
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    def answerer(self) -> Answerer:
        """The same loaded model, ready to answer."""
        return answerer(self.trained, self.source, self.model, self.template)

    @torch.no_grad()
    def judge(self, samples: Sequence[Sample], *, greedy: bool = False) -> Iterator[tuple[int, Judged]]:
        """The number of each sample and what was found of it; samples of like length first where rows are padded."""
        rows = chosen_rows(self.model)
        group = by_length if rows.padded else best_fit
        for indices in group([len(sample) for sample in samples], self.tokens_per_pass):
            chosen = [samples[index] for index in indices]
            batch = flat_batch(chosen).to(self.device)
            answers = self.policy.logprobs(batch, predictions=greedy)
            counts = [int((sample.weights[1:] > 0).sum()) for sample in chosen]
            stops = np.cumsum(counts)[:-1].tolist()
            logprobs = np.split(answers.logprobs.cpu().numpy(), stops)
            matches: list[Any] = [None] * len(chosen)
            if answers.predictions is not None:
                wanted = batch.targets[batch.targets >= 0]
                matches = np.split((answers.predictions == wanted).cpu().numpy(), stops)
            for index, found, match in zip(indices, logprobs, matches, strict=True):
                yield index, Judged(found, match)

    @torch.no_grad()
    def next_logprobs(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> Numbers:
        """(n, K) log-probabilities of each of these tokens right after each prompt.

        What all prompts begin with is computed once for a whole pass, where the self-test showed that this is exact.
        """
        found = np.zeros((len(prompts), len(tokens)), np.float32)
        tokens_K = torch.tensor(list(tokens), device=self.device)
        rows = chosen_rows(self.model)
        shared = _common(prompts) if rows.shares_prompts and len(prompts) > 1 else 0
        for indices, batch in self._passes(prompts, tokens[0], shared, padded=rows.padded):
            found[indices] = self.policy.next_logprobs(batch.to(self.device), tokens_K).cpu().numpy()
        return found

    def _passes(
        self, prompts: Sequence[Sequence[int]], filler: int, shared: int, *, padded: bool
    ) -> Iterator[tuple[list[int], Batch]]:
        """Every prompt followed by one token, whose predecessor is the only supervised position."""
        if shared < 2:
            lengths = [len(prompt) + 1 for prompt in prompts]
            for indices in (by_length if padded else best_fit)(lengths, self.tokens_per_pass):
                yield indices, flat_batch([_asked(prompts[index], filler) for index in indices])
            return
        room = max(1, self.tokens_per_pass - shared)
        for indices in best_fit([len(prompt) - shared + 2 for prompt in prompts], room):
            tails = [[*prompts[index][shared:], filler] for index in indices]
            starts = shared + np.cumsum([0, *(len(tail) for tail in tails[:-1])])
            ids = [*prompts[indices[0]][:shared], *(token for tail in tails for token in tail)]
            weights = np.zeros(len(ids), np.float32)
            weights[[start + len(tail) - 1 for start, tail in zip(starts, tails, strict=True)]] = 1
            sample = Sample(np.array(ids, np.int32), weights, branches=tuple(starts.tolist()))
            yield indices, branch_batch([sample], share_prompts=True)


def _asked(prompt: Sequence[int], filler: int) -> Sample:
    weights = np.zeros(len(prompt) + 1, np.float32)
    weights[-1] = 1
    return Sample(np.array([*prompt, filler], np.int32), weights)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with."""
    lists = [list(prompt) for prompt in prompts]
    first, last = min(lists), max(lists)  # whatever these two share, all that lie between them share
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def open_judge(
    trained: Trained,
    *,
    template: ChatTemplate | None = None,
    tokens_per_pass: int | None = None,
    media: bool = False,
    say: Say = lambda text: None,
) -> Judge:
    """Load a language model in its parts. template: in place of its own. tokens_per_pass: that of its run where absent.
    media: whether samples may have images, films and sounds, which rows that are padded alone can hold.

    Raises ModelError for a reward model, for parts that do not fit together, and for a model that is exact in no layout
    of rows.
    """
    if trained.kind == "reward":
        raise ModelError(f"{trained.label} is a reward model, which has no probabilities of tokens")
    source = locate(trained.model)
    if trained.bases:
        require_base(trained, source)
    own = template or trained_template(trained, say)
    hardware = detect_hardware()
    device = torch.device(hardware.device)
    loader = Loader(typed(trained, device, bf16=hardware.bf16), source, device)
    run = None if trained.recipe is None else trained.recipe.train
    precision = "auto" if run is None else run.eval_precision
    model = build_with_rows(
        lambda own_attention: loader.live(own_attention=own_attention),
        trained.model.rows,
        trained.model.padding_side,
        None if precision == "auto" else autocast_type(precision),
        LANGUAGE,
        share_prompts=True,
        media=media and own.opener is not None,
    )
    model.eval().requires_grad_(False)
    room = tokens_per_pass or (run.tokens_per_pass if run is not None else None)
    return Judge(
        trained.label,
        model,
        own,
        loader.trained,
        source,
        device,
        AUTOCAST.get(precision),
        room or TOKENS_PER_PASS[hardware.device],
    )
