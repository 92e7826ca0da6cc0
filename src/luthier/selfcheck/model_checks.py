"""Claims about numbers: fast paths change nothing, and what is saved is what was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.assemble import training_steps
from luthier.model.logprobs import ModelPolicy, chosen_rows, chunk_rows, logits_transform
from luthier.selfcheck.bench import Bench, largest, relative_difference
from luthier.selfcheck.outcome import Outcome
from luthier.trainer.arguments import training_arguments
from luthier.trainer.trainer import PeftTrainer
from luthier.types import IGNORE_INDEX, Batch, Sample


def _dense_logprobs(bench: Bench, sample: Sample, model: Any = None) -> Tensor:
    """(N,) log-probabilities of a sample's targets by an ordinary forward of it alone, with dense logits."""
    ids = torch.from_numpy(sample.input_ids.astype("int64"))[None].to(bench.device)
    learnt = torch.from_numpy(sample.weights[1:] > 0).to(bench.device)
    with bench.autocast():
        answer = (model or bench.model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits = answer.logits[0, :-1][learnt].double()
    chosen: Tensor = logits.log_softmax(-1).gather(-1, ids[0, 1:][learnt][:, None])[:, 0]
    return chosen


def _flat_logprobs(bench: Bench, samples: Sequence[Sample]) -> tuple[Tensor, Batch]:
    batch = bench.material.stage.collate(samples).to(bench.device)
    with bench.autocast():
        return ModelPolicy(bench.model).logprobs(batch).logprobs, batch


def packed(bench: Bench) -> Outcome:
    """Samples in one batch have the log-probabilities that each has alone."""
    with torch.no_grad():
        together, _ = _flat_logprobs(bench, bench.samples)
        alone = torch.cat([_dense_logprobs(bench, sample) for sample in bench.samples])
    if together.shape != alone.shape:
        return Outcome(
            "packed",
            "packed = padded, one by one",
            float("inf"),
            bench.bound,
            "nats",
            f"{len(together)} targets in the batch, {len(alone)} in the samples",
        )
    measured = float((together.double() - alone).abs().max())
    detail = f"{len(bench.samples)} samples, {len(alone)} targets"
    return Outcome("packed", "packed = padded, one by one", measured, bench.bound, "nats", detail)


def gradients(bench: Bench) -> Outcome:
    """The gradient of a packed batch is the sum of those of its samples alone."""
    weights = [torch.from_numpy(sample.weights[1:][sample.weights[1:] > 0]) for sample in bench.samples]
    logprobs, _ = _flat_logprobs(bench, bench.samples)
    torch.autograd.backward((logprobs * torch.cat(weights).to(logprobs)).sum())
    together = bench.gradients()
    for sample, weight in zip(bench.samples, weights, strict=True):
        alone = _dense_logprobs(bench, sample)
        torch.autograd.backward((alone * weight.to(alone)).sum())
    measured = relative_difference(together, bench.gradients())
    detail = f"{len(together)} parameters that train"
    claim = "packed gradient = sum of single ones"
    return Outcome("gradients", claim, measured, bench.gradient_bound, "of its norm", detail)


def chunked(bench: Bench) -> Outcome:
    """The kernel that never holds all logits gives what dense logits of the same hidden states give."""
    head = bench.model.get_output_embeddings()
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            found, batch = _flat_logprobs(bench, bench.samples)
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
    return Outcome("chunked", "chunked = dense", measured, bench.bound, "nats", detail)


def accumulation(bench: Bench) -> Outcome:
    """The gradient of a step does not depend on how it is cut into passes: all at once, or row by row."""
    trainer = _trainer(bench)
    collate = bench.material.stage.collate
    cuts = {"one pass": [collate(bench.samples)], "row by row": [collate([one]) for one in bench.samples]}
    found, losses = {}, {}
    for name, batches in cuts.items():
        losses[name] = float(trainer.training_step(bench.model, batches))
        found[name] = bench.gradients()
    bench.model.eval()
    measured = relative_difference(found["row by row"], found["one pass"])
    apart = abs(losses["row by row"] - losses["one pass"]) / max(abs(losses["one pass"]), 1e-12)
    detail = f"{len(bench.samples)} passes against 1: losses {losses['row by row']:.8g} and {losses['one pass']:.8g}"
    claim = "1 pass = many passes"
    return Outcome("accumulation", claim, max(measured, apart), bench.gradient_bound, "of its norm", detail)


def mean(bench: Bench) -> Outcome:
    """The loss of a step is the weighted mean over its targets, by dense logits."""
    if getattr(bench.settings.stage, "label_smoothing", 0.0):
        return Outcome("mean", "loss = mean over targets", 0.0, 0.0, "nats", "not with label smoothing")
    trainer = _trainer(bench)
    batches = [bench.material.stage.collate([one]) for one in bench.samples]
    found = float(trainer.training_step(bench.model, batches))
    bench.gradients()
    bench.model.eval()
    total = weight = 0.0
    with torch.no_grad():
        for sample in bench.samples:
            weights = torch.from_numpy(sample.weights[1:][sample.weights[1:] > 0]).double()
            total -= float((_dense_logprobs(bench, sample).cpu() * weights).sum())
            weight += float(weights.sum())
    expected = total / weight
    detail = f"{found:.8g} against {expected:.8g}"
    return Outcome("mean", "loss = mean over targets", abs(found - expected), bench.bound, "nats", detail)


def _trainer(bench: Bench) -> PeftTrainer:
    """The training loop of this recipe around the model, without noise: nothing random may differ."""
    recipe = bench.settings
    quiet = recipe.train.model_copy(
        update={"output": str(bench.folder / "loop"), "report_to": (), "neftune_alpha": 0.0, "callbacks": ()}
    )
    recipe = recipe.model_copy(update={"train": quiet})
    return PeftTrainer(
        model=bench.model,
        args=training_arguments(recipe, use_cpu=bench.hardware.device == "cpu"),
        stage=bench.material.stage,
        method=bench.method,
        optim=recipe.optim,
        steps=training_steps(recipe, bench.material, 1, 0, padded=chosen_rows(bench.model).padded),
        eval_sets={},
        tokenizer=bench.material.template.tokenizer,
        callbacks=[],
    )


def saved(bench: Bench) -> Outcome:
    """What is saved, loaded again by transformers (and PEFT) alone, answers as the model that trained."""
    folder = bench.folder / "saved"
    folder.mkdir(parents=True, exist_ok=True)
    bench.method.save(bench.model, folder)
    bench.material.template.tokenizer.save_pretrained(folder)
    again = _load_plain(bench, folder)
    with torch.no_grad():
        differences = []
        for sample in bench.samples[:4]:
            expected = _dense_logprobs(bench, sample)
            differences.append(float((_dense_logprobs(bench, sample, again) - expected).abs().max()))
    detail = f"{len(differences)} samples by the files of {len(list(folder.iterdir()))} names"
    return Outcome("saved", "saved = reloaded", largest(differences), bench.bound, "nats", detail)


def _load_plain(bench: Bench, folder: Path) -> Any:
    dtype = next(bench.model.parameters()).dtype
    if not isinstance(bench.model, PeftModel):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(bench.source.path, dtype=dtype)
        model = PeftModel.from_pretrained(base, str(folder))
    return model.to(bench.device).eval()
