"""Claims about numbers: fast paths change nothing, and what is saved is what was trained.

What is compared are the log-probabilities of targets, or, of a reward model, the score of each row; those in units of
their spread, so that a bound means the same for every head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from luthier.data.collate import branch_batch, flat_batch
from luthier.model.kernel import chunk_rows
from luthier.model.load import load_config
from luthier.model.logprobs import ModelPolicy, chosen_rows, logits_transform
from luthier.model.multimodal import language_class
from luthier.model.quantize import finish_quantization, loading_arguments
from luthier.selfcheck.bench import Bench, largest, relative_difference
from luthier.selfcheck.outcome import Outcome, left_out
from luthier.types import IGNORE_INDEX, Batch, Sample


def alone_numbers(bench: Bench, sample: Sample, model: Any = None) -> Tensor:
    """What an ordinary forward of one plain sample says: (N,) log-probabilities of its targets, by dense logits, or
    the (1,) score at its last token. `model` is another one than the bench's."""
    ids = torch.from_numpy(sample.input_ids.astype("int64"))[None].to(bench.device)
    with bench.autocast():
        answer = (model or bench.model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if bench.scores:
        score: Tensor = answer.logits[0].double()
        return score
    learnt = torch.from_numpy(sample.weights[1:] > 0).to(bench.device)
    logits = answer.logits[0, :-1][learnt].double()
    chosen: Tensor = logits.log_softmax(-1).gather(-1, ids[0, 1:][learnt][:, None])[:, 0]
    return chosen


def _batch_numbers(bench: Bench, batch: Batch) -> Tensor:
    """The same numbers of all rows of a flat batch."""
    moved, policy = batch.to(bench.device), ModelPolicy(bench.model)
    with bench.autocast():
        return policy.scores(moved) if bench.scores else policy.logprobs(moved).logprobs


def _unit(bench: Bench, numbers: Tensor) -> tuple[float, str]:
    """What differences are measured in, and how that is called."""
    return (float(numbers.std()) or 1.0, "of their spread") if bench.scores else (1.0, "nats")


def packed(bench: Bench) -> Outcome:
    """Rows in one batch say what each says alone."""
    claim = "packed = padded, one by one"
    with torch.no_grad():
        together = _batch_numbers(bench, flat_batch(bench.sequences))
        alone = torch.cat([alone_numbers(bench, row) for row in bench.sequences])
    size, unit = _unit(bench, alone)
    if together.shape != alone.shape:
        detail = f"{len(together)} numbers in the batch, {len(alone)} in the rows"
        return Outcome("packed", claim, float("inf"), bench.bound, unit, detail)
    measured = float((together.double() - alone).abs().max()) / size
    detail = f"{len(bench.sequences)} rows, {len(alone)} {_names(bench)}"
    return Outcome("packed", claim, measured, bench.bound, unit, detail)


def _names(bench: Bench) -> str:
    return "scores" if bench.scores else "targets"


def gradients(bench: Bench) -> Outcome:
    """The gradient of a packed batch is the sum of those of its rows alone."""
    weights = [_weights(bench, row) for row in bench.sequences]
    numbers = _batch_numbers(bench, flat_batch(bench.sequences))
    torch.autograd.backward((numbers * torch.cat(weights).to(numbers)).sum())
    together = bench.gradients()
    for row, weight in zip(bench.sequences, weights, strict=True):
        alone = alone_numbers(bench, row)
        torch.autograd.backward((alone * weight.to(alone)).sum())
    measured = relative_difference(together, bench.gradients())
    detail = f"{len(together)} parameters that train"
    claim = "packed gradient = sum of single ones"
    return Outcome("gradients", claim, measured, bench.gradient_bound, "of its norm", detail)


def _weights(bench: Bench, row: Sample) -> Tensor:
    """The weight of each number of a row in a sum."""
    return torch.ones(1) if bench.scores else torch.from_numpy(row.weights[1:][row.weights[1:] > 0])


def shared(bench: Bench) -> Outcome:
    """A prompt that is computed once for its answers gives them what a copy for each gives: numbers and gradients."""
    claim, rows = "prompts once = prompts copied", chosen_rows(bench.model)
    if not bench.stage.share_prompts:
        return left_out("shared", claim, rows.unshared_reason or "every row has a prompt of its own here")
    found: list[Tensor] = []
    gradients_of: list[Mapping[str, Tensor]] = []
    batches = [branch_batch(bench.samples, share_prompts=once) for once in (True, False)]
    for batch in batches:
        numbers = _batch_numbers(bench, batch)
        # Unlike weights: what goes to a wrong answer must not cancel.
        torch.autograd.backward((numbers * torch.linspace(1, 2, len(numbers)).to(numbers)).sum())
        found.append(numbers.detach().double())
        gradients_of.append(bench.gradients())
    once, copied = found
    size, unit = _unit(bench, copied)
    apart = float((once - copied).abs().max()) / size if once.shape == copied.shape else float("inf")
    gradient = relative_difference(*gradients_of)
    tokens = [batch.num_tokens for batch in batches]
    detail = (
        f"{_names(bench)} differ by {apart:.3g} {unit}, gradients by {gradient:.3g} of their norm; {tokens[0]} tokens "
        f"instead of {tokens[1]}"
    )
    measured = max(apart / bench.bound, gradient / bench.gradient_bound)
    return Outcome("shared", claim, measured, 1.0, "of what is allowed", detail)


def chunked(bench: Bench) -> Outcome:
    """The kernel that never holds all logits gives what dense logits of the same hidden states give."""
    claim = "chunked = dense"
    if bench.scores:
        return left_out("chunked", claim, "a value head has no vocabulary to go through in chunks")
    head = bench.model.get_output_embeddings()
    batch = flat_batch(bench.sequences).to(bench.device)
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            found = _batch_numbers(bench, batch)
    finally:
        hook.remove()
    targets_N = batch.targets[batch.targets != IGNORE_INDEX]
    with torch.no_grad(), bench.autocast():
        logits_NV = logits_transform(bench.model.config)(head(seen[0]))
    dense = logits_NV.double().log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    measured = float((found.double() - dense).abs().max()) if found.shape == dense.shape else float("inf")
    vocabulary = logits_NV.shape[-1]
    chunks = math.ceil(len(targets_N) / chunk_rows(len(targets_N), vocabulary, bench.device))
    detail = f"{len(targets_N)} targets over {vocabulary} tokens in {chunks} chunks"
    return Outcome("chunked", claim, measured, bench.bound, "nats", detail)


def saved(bench: Bench) -> Outcome:
    """What is saved, loaded again by transformers (and PEFT) alone, answers as the model that trained."""
    folder = bench.folder / "saved"
    folder.mkdir(parents=True, exist_ok=True)
    bench.method.save(bench.model, folder)
    bench.material.template.tokenizer.save_pretrained(folder)
    again = _load_plain(bench, folder)
    rows: Sequence[Sample] = bench.sequences[:4]
    with torch.no_grad():
        expected = [alone_numbers(bench, row) for row in rows]
        differences = [
            float((alone_numbers(bench, row, again) - numbers).abs().max())
            for row, numbers in zip(rows, expected, strict=True)
        ]
    size, unit = _unit(bench, torch.cat(expected))
    detail = f"{len(rows)} rows by the files of {len(list(folder.iterdir()))} names"
    return Outcome("saved", "saved = reloaded", largest(differences) / size, bench.bound, unit, detail)


def _quantized(bench: Bench, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of transformers for a base that is kept in fewer bits."""
    settings = bench.settings.model
    config = load_config(settings, bench.source)

    def bare() -> nn.Module:
        assert isinstance(bench.model, PeftModel)
        base = bench.model.get_base_model()
        assert isinstance(base, nn.Module)
        return base

    return loading_arguments(settings.quantization, config, bench.device, dtype, settings.path, bare)


def _load_plain(bench: Bench, folder: Path) -> Any:
    dtype = next(bench.model.parameters()).dtype
    plain = language_class(load_config(bench.settings.model, bench.source))
    loader: Any = AutoModelForSequenceClassification if bench.scores else plain
    labels = {"num_labels": 1} if bench.scores else {}
    if not isinstance(bench.model, PeftModel):
        model: Any = loader.from_pretrained(folder, dtype=dtype)
    else:
        base = loader.from_pretrained(bench.source.path, dtype=dtype, **labels, **_quantized(bench, dtype))
        finish_quantization(base, bench.settings.model.quantization, bench.device, str(folder))
        model = PeftModel.from_pretrained(base, str(folder))
    return model.to(bench.device).eval()
