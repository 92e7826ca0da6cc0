"""Is the written model the trained one? It is read back from disk by plain transformers and compared.

The rule of the numbers. The reference is the trained model, adapters unmerged, computed in float32. Written in float32
the merged model computes the same sums in another order: fixed, tight bounds. Written in 16 bits it cannot: how far
rounding alone moves the model is *measured* with the unmerged model, all of whose weights and arithmetic are put into
that type, and the written model may be `SLACK` times as far from the reference. Merging rounds W + BA where that rounds
W, B and A, so both are about equally far; a largest of some hundred positions scatters by a factor of two. A quantized
base is measured in the same way: unmerged adapters on the dequantized base.

What has no rounding is compared exactly: the tensors in the files, tokens, template, prompts, stop tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from luthier.data.rendering import chat_messages
from luthier.data.template import ChatTemplate
from luthier.exporting.answers import (
    Answers,
    Distance,
    EngineOf,
    ask,
    distance,
    greedy_differences,
    padded_scores,
)
from luthier.exporting.merge import changed_tensors, tensor_hashes, value_head_fault
from luthier.exporting.probes import Probes
from luthier.model.faults import LOAD_ERRORS, reason, require_all_weights
from luthier.model.multimodal import language_class
from luthier.model.value_head import value_head
from luthier.model.vocabulary import token_modules
from luthier.types import ModelError, ModelKind

SLACK = 4.0
TIGHT_KL_MEAN, TIGHT_KL_MAX, TIGHT_RELATIVE = 1e-7, 1e-6, 1e-4
"""What float32 may differ by: nats per token, and a share of the largest logit or score."""


@dataclass(frozen=True, slots=True)
class Check:
    """One claim: whether it holds, what was found and, of a number, what was allowed."""

    name: str
    passed: bool
    text: str
    found: float | None = None
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What the written model has to be.

    answers: of the trained model in float32. rounding: how far the written type alone moves it. tensors: hashes of what
    was merged, in `dtype`. template: of the training, on its tokenizer.
    """

    kind: ModelKind
    dtype: torch.dtype
    template: ChatTemplate
    probes: Probes
    answers: Answers
    rounding: Distance
    tensors: Mapping[str, str]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.template.tokenizer


@dataclass(slots=True)
class _Found:
    """Checks as they are made."""

    checks: list[Check] = field(default_factory=list)

    def exact(self, name: str, fault: str | None, held: str) -> None:
        self.checks.append(Check(name, fault is None, held if fault is None else fault))

    def number(self, name: str, text: str, found: float, bound: float) -> None:
        self.checks.append(Check(name, found <= bound, text, found, bound))


def verify(
    folder: Path,
    expected: Expected,
    engine_of: EngineOf,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> tuple[list[Check], Distance | None]:
    """All checks of the model in `folder`, and its distance from the trained one where it can be loaded at all."""
    found = _Found()
    tokenizer = _check_tokenizer(folder, expected, found, trust_remote_code)
    try:
        model = load_plain(folder, expected.kind, device, trust_remote_code)
    except (*LOAD_ERRORS, KeyError, ModelError) as error:
        found.exact("loads", f"plain transformers cannot load it: {reason(error)}", "")
        return found.checks, None
    found.exact("loads", None, f"as {type(model).__name__}, {next(model.parameters()).dtype}")
    _check_weights(model, expected, found)
    rows = token_modules(model)[0].weight.shape[0]
    ids = max(expected.tokenizer.get_vocab().values()) + 1
    lacking = f"{rows:,} embedding rows for {ids:,} tokens" if rows < ids else None
    found.exact("embeddings", lacking, f"{rows:,} rows for {ids:,} tokens")
    apart = None
    if lacking is None:
        _check_stops(model, expected, found)
        apart = _check_answers(model, expected, found, engine_of)
    if expected.kind == "reward":
        _check_head(model, tokenizer, folder, expected, found)
    del model
    gc.collect()
    return found.checks, apart


def load_plain(
    folder: Path, kind: ModelKind, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The model in `folder` as anybody loads it. Raises ModelError where weights were missing and are drawn."""
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    auto: Any = AutoModelForSequenceClassification if kind == "reward" else language_class(config)
    model, report = auto.from_pretrained(
        str(folder), dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    require_all_weights(report, len(model.state_dict()), str(folder))
    assert isinstance(model, PreTrainedModel)
    torch.nn.Module.to(model, device)
    model.eval()  # type: ignore[no-untyped-call]
    return model


# --------------------------------------------------------------------------------------------------
# What has no rounding


def _check_tokenizer(
    folder: Path, expected: Expected, found: _Found, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    run = expected.tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        found.exact("tokenizer", f"plain transformers cannot load it: {reason(error)}", "")
        return None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    found.exact("tokenizer", _vocabulary_fault(run, tokenizer), f"{len(tokenizer):,} tokens")
    same = tokenizer.chat_template == run.chat_template
    fault = None if same else "is missing" if not tokenizer.chat_template else "is another one"
    found.exact("chat template", fault and f"the saved chat template {fault}", "as trained")
    for name, fault in (
        ("prompts", _first_fault(_prompt_fault, expected, tokenizer)),
        ("token ids", _first_fault(_ids_fault, expected, tokenizer)),
    ):
        found.exact(name, fault, f"equal on {len(expected.probes.probes)} probes")
    return tokenizer


def _vocabulary_fault(run: PreTrainedTokenizerBase, saved: PreTrainedTokenizerBase) -> str | None:
    ours, theirs = run.get_vocab(), saved.get_vocab()
    lost = sorted(token for token in ours if theirs.get(token) != ours[token])
    if lost or len(theirs) != len(ours):
        return f"{len(theirs):,} tokens instead of {len(ours):,}; lost or under another id: {lost[:3]}"
    marks = {index: (str(token), token.special) for index, token in run.added_tokens_decoder.items()}
    found = {index: (str(token), token.special) for index, token in saved.added_tokens_decoder.items()}
    if marks != found:
        return f"the added tokens differ: {sorted(set(marks.items()) ^ set(found.items()))[:3]}"
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(run, name) != getattr(saved, name):
            return f"{name} is {getattr(saved, name)!r} instead of {getattr(run, name)!r}"
    return None


def _first_fault(
    compare: Callable[..., str | None], expected: Expected, saved: PreTrainedTokenizerBase
) -> str | None:
    faults = (compare(probe, expected, saved) for probe in expected.probes.probes)
    return next((fault for fault in faults if fault is not None), None)


def _prompt_fault(probe: Any, expected: Expected, saved: PreTrainedTokenizerBase) -> str | None:
    """The text of a conversation by the saved template against what the training rendered."""
    if probe.conversation is None:
        return None
    if not saved.chat_template:
        return "the tokenizer has no chat template"
    messages = chat_messages(probe.conversation)
    tools = list(probe.conversation.tools) or None
    text = saved.apply_chat_template(messages, tools=tools, tokenize=False)
    if text == probe.text:
        return None
    return f"{text!r:.80} instead of {probe.text!r:.80}"


def _ids_fault(probe: Any, expected: Expected, saved: PreTrainedTokenizerBase) -> str | None:
    ours = expected.tokenizer(probe.text, add_special_tokens=False)["input_ids"]
    theirs = saved(probe.text, add_special_tokens=False)["input_ids"]
    return None if ours == theirs else f"{theirs[:8]} … instead of {ours[:8]} …"


def _check_weights(model: PreTrainedModel, expected: Expected, found: _Found) -> None:
    changed = changed_tensors(expected.tensors, tensor_hashes(model, expected.dtype))
    fault = (
        f"{len(changed)} of {len(expected.tensors)} tensors are not what was merged: {', '.join(changed[:3])}"
    )
    found.exact("weights", fault if changed else None, f"{len(expected.tensors)} tensors, byte for byte")
    wrong = next((p.dtype for p in model.parameters() if p.dtype != expected.dtype), None)
    found.exact(
        "type", None if wrong is None else f"{wrong} instead of {expected.dtype}", str(expected.dtype)
    )


def _check_stops(model: PreTrainedModel, expected: Expected, found: _Found) -> None:
    """Whatever generates with the model stops where its answers end."""
    if expected.kind == "reward":
        return
    stops, wanted = _stop_ids(model), set(expected.template.stop_ids)
    names = expected.tokenizer.convert_ids_to_tokens
    lost = [str(names(index)) for index in sorted(wanted - stops)]
    more = [str(names(index)) for index in sorted(stops - wanted)]
    fault = f"generation_config lacks {lost} and adds {more}" if stops != wanted else None
    found.exact("stop tokens", fault, ", ".join(str(names(index)) for index in sorted(wanted)))


def _stop_ids(model: PreTrainedModel) -> set[int]:
    said = getattr(model.generation_config, "eos_token_id", None)
    return set(said) if isinstance(said, list) else set() if said is None else {said}


# --------------------------------------------------------------------------------------------------
# What is computed


def bounds(rounding: Distance, scale: float) -> Distance:
    """What each number may be: see the module."""
    tight = TIGHT_RELATIVE * max(scale, 1e-3)
    return Distance(
        TIGHT_KL_MEAN + SLACK * rounding.kl_mean,
        TIGHT_KL_MAX + SLACK * rounding.kl_max,
        tight + SLACK * rounding.logit_max,
        tight + SLACK * rounding.margin_max,
        tight + SLACK * rounding.score_max,
    )


def _check_answers(
    model: PreTrainedModel, expected: Expected, found: _Found, engine_of: EngineOf
) -> Distance:
    live, probes = expected.answers, expected.probes.probes
    stops = tuple(sorted(_stop_ids(model))) if expected.kind == "language" else ()
    answers = ask(model, probes, expected.kind, engine_of, stops, like=live)
    apart = distance(live, answers)
    allowed = bounds(expected.rounding, apart.scale)
    if expected.kind == "reward":
        found.number("scores", "largest difference", apart.score_max, allowed.score_max)
        return apart
    found.number("mean KL", "nats per token", apart.kl_mean, allowed.kl_mean)
    found.number("largest KL", "nats at one token", apart.kl_max, allowed.kl_max)
    found.number("logits", "largest difference", apart.logit_max, allowed.logit_max)
    differing = greedy_differences(live, answers, expected.template.stop_ids)
    real = [one for one in differing if not one.margin <= allowed.margin_max]
    said = f"{len(probes) - len(differing)} of {len(probes)} answers equal"
    if len(differing) > len(real):
        said += f", {len(differing) - len(real)} part where the two best tokens are closer than rounding"
    if real:
        names = expected.tokenizer.convert_ids_to_tokens
        shown = [repr("end" if token is None else names(token)) for token in (real[0].other, real[0].token)]
        said = f"probe {real[0].probe}, token {real[0].position}: {shown[0]} instead of {shown[1]} ({said})"
    found.exact("greedy answers", said if real else None, said)
    return apart


def _check_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    expected: Expected,
    found: _Found,
) -> None:
    """The head's own file, and scores in a padded batch: padding must not be what is scored."""
    head: Any = value_head(model)
    found.exact(
        "value head", value_head_fault(folder, head.weight.detach().cpu()), "its own file is the same"
    )
    pad_id = None if tokenizer is None else tokenizer.pad_token_id
    if pad_id is None or model.config.pad_token_id != pad_id:
        found.exact(
            "padding", f"the config pads with {model.config.pad_token_id}, the tokenizer with {pad_id}", ""
        )
        return
    live = expected.answers
    batch = padded_scores(model, live, int(pad_id))
    apart = distance(live, Answers(live.sequences, live.shown, scores=tuple(batch)))
    bound = bounds(expected.rounding, apart.scale).score_max
    found.number("padding", "largest difference of scores in a padded batch", apart.score_max, bound)


def plain(value: Any) -> dict[str, Any]:
    """A check or a distance as JSON values, which have no infinity."""
    return {
        name: str(number) if isinstance(number, float) and not math.isfinite(number) else number
        for name, number in asdict(value).items()
    }


def table(checks: Sequence[Check]) -> str:
    """The checks as plain text, one line each."""
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{check.name:<{width}}  {'holds' if check.passed else 'FAILS'}  {_said(check)}" for check in checks
    )


def _said(check: Check) -> str:
    if check.found is None:
        return check.text
    return f"{check.found:.3g} of at most {check.bound:.3g} ({check.text})"
